"""The small encoder that the tests build, in numbers."""

# Two windowed and two global blocks, grid 8 x 8 at the training size, windows that do not divide it.
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 128,
    "output_channels": 8,
    "downsample_channels": [12, 20],
    "window_size": 3,
    "global_attn_indexes": [1, 3],
}
