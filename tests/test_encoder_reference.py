"""Every stage of the encoder against the slow float64 reference."""

import pytest
import torch
from builders import random_pixels, randomize, relative_error
from reference import encode
from small import SMALL

from image_encoder_vit import ImageEncoderViT

PUBLISHED = {
    "embed_dim": SMALL["hidden_size"],
    "depth": SMALL["num_hidden_layers"],
    "num_heads": SMALL["num_attention_heads"],
    "img_size": SMALL["image_size"],
    "out_chans": SMALL["output_channels"],
    "downsample_channels": SMALL["downsample_channels"],
    "window_size": SMALL["window_size"],
    "global_attn_indexes": SMALL["global_attn_indexes"],
}


def stages_of(
    encoder: ImageEncoderViT, pixels: torch.Tensor, attn_implementation: str, with_gradients: bool
) -> dict[str, torch.Tensor]:
    """What each stage of the encoder gives for one image, as (H, W, C), caught by hooks."""
    stages: dict[str, torch.Tensor] = {}

    def keep(name: str, channels_first: bool) -> object:
        def hook(module: object, inputs: object, output: torch.Tensor) -> None:
            stages[name] = output[0].permute(1, 2, 0) if channels_first else output[0]

        return hook

    def keep_input(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        stages["positions"] = inputs[0][0]

    encoder.patch_embed.register_forward_hook(keep("patch_embed", channels_first=False))
    encoder.blocks[0].register_forward_pre_hook(keep_input)
    for index, block in enumerate(encoder.blocks):
        block.register_forward_hook(keep(f"blocks.{index}", channels_first=False))
    for name in ("neck", *encoder.downsample_names):
        encoder.get_submodule(name).register_forward_hook(keep(name, channels_first=True))
    with torch.set_grad_enabled(with_gradients):
        encoder(pixels[None], attn_implementation=attn_implementation)
    return stages


# Inference on the CPU takes other steps than training does.
@pytest.mark.parametrize("with_gradients", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("height", "width"),
    [
        (128, 128),  # the training size: no table is resized
        (112, 80),  # smaller and not square
        (144, 160),  # larger
    ],
)
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False, "use_abs_pos": False, "use_rel_pos": False}])
def test_each_stage_equals_the_reference(
    attn_implementation: str, with_gradients: bool, height: int, width: int, changes: dict[str, bool]
) -> None:
    encoder = randomize(ImageEncoderViT(**{**PUBLISHED, **changes})).to(torch.float64)
    pixels = random_pixels(3, height, width).to(torch.float64)
    expected = encode(
        pixels,
        encoder.state_dict(),
        heads=SMALL["num_attention_heads"],
        window=SMALL["window_size"],
        global_attn_indexes=SMALL["global_attn_indexes"],
    )
    actual = stages_of(encoder, pixels, attn_implementation, with_gradients)
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert all(error <= 1e-12 for error in errors.values()), errors
