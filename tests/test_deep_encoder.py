"""The whole DeepEncoder: parameters, outputs, precision, gradients, the slow reference, and clear errors."""

import re
from pathlib import Path

import pytest
import torch
from builders import random_pixels, relative_error, small_model
from deep import SMALL_CLIP, small_deep_config, small_deep_encoder
from reference import clip, project, token_sequence
from small import SMALL

from image_encoder_vit import (
    DeepEncoder,
    DeepEncoderConfig,
    DeepEncoderModel,
    ImageEncoderViT,
    ImageEncoderViTConfig,
    ImageEncoderViTImageProcessorPil,
    ImageEncoderViTModel,
)
from image_encoder_vit.cpu_inference import INTERFACE

SAMPLE_PAGE = Path(__file__).parent.parent / "samples" / "page.png"
# Two images, the first with 3 x 2 tiles; a tile of 64 px has one cell.
GRIDS = torch.tensor([[3, 2], [0, 0]])


def tiled_batch(tile_px: int = 128) -> dict[str, torch.Tensor]:
    tiles = random_pixels(6, 3, tile_px, tile_px, seed=1)
    return {"pixel_values": random_pixels(2, 3, 128, 128), "pixel_values_local": tiles, "tile_grids": GRIDS}


def test_default_has_the_published_parameters() -> None:
    with torch.device("meta"):
        model, plain = DeepEncoderModel(DeepEncoderConfig()), DeepEncoder()
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert shapes == {name: tuple(weight.shape) for name, weight in plain.state_dict().items()}
    assert len(shapes) == 475
    assert sum(parameter.numel() for parameter in model.parameters()) == 400_770_048
    with torch.device("meta"):
        encoder = ImageEncoderViT()
    expected = {f"sam_model.{name}": tuple(weight.shape) for name, weight in encoder.state_dict().items()}
    expected |= {"vision_model.embeddings.class_embedding": (1024,), "image_newline": (1280,)}
    expected |= {"vision_model.embeddings.position_embedding.weight": (257, 1024), "view_seperator": (1280,)}
    expected |= {"projector.layers.weight": (1280, 2048), "projector.layers.bias": (1280,)}
    expected |= {f"vision_model.pre_layrnorm.{kind}": (1024,) for kind in ("weight", "bias")}
    linears = {"self_attn.qkv_proj": (3072, 1024), "self_attn.out_proj": (1024, 1024)}
    linears |= {"mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}
    for index in range(24):
        block = f"vision_model.transformer.layers.{index}"
        expected |= {
            f"{block}.{norm}.{kind}": (1024,) for norm in ("layer_norm1", "layer_norm2") for kind in ("weight", "bias")
        }
        for name, shape in linears.items():
            expected |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    assert shapes == expected


@pytest.mark.parametrize("with_gradients", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("size_px", [(128, 128), (64, 192), (400, 208)], ids=str)
def test_each_stage_after_sam_equals_the_reference(
    attn_implementation: str, with_gradients: bool, size_px: tuple[int, int]
) -> None:
    model = small_deep_encoder().to(torch.float64)
    model.set_attn_implementation(attn_implementation)
    weights = model.state_dict()
    whole, tiles = random_pixels(1, 3, *size_px).double(), random_pixels(2, 3, 64, 128, seed=1).double()
    with torch.set_grad_enabled(with_gradients):
        outputs = model(whole, pixel_values_local=tiles, tile_grids=torch.tensor([[1, 2]]), output_hidden_states=True)
        sam_maps = [outputs.sam_feature_map[0], *model.sam_model(tiles, attn_implementation)]

    clip_weights = {name.removeprefix("vision_model."): w for name, w in weights.items() if "vision_model." in name}
    heads = SMALL_CLIP["clip_num_attention_heads"]
    states = [clip(sam_map.permute(1, 2, 0), clip_weights, heads) for sam_map in sam_maps]
    cells, *tile_cells = (
        project(sam_map.permute(1, 2, 0), own[-1], weights) for sam_map, own in zip(sam_maps, states, strict=True)
    )
    tokens = token_sequence(cells, [tile_cells], weights["image_newline"], weights["view_seperator"])
    assert len(outputs.clip_hidden_states) == len(states[0]) == 1 + SMALL_CLIP["clip_num_hidden_layers"]
    for actual, expected in zip(outputs.clip_hidden_states, states[0], strict=True):
        assert relative_error(actual[0], expected) <= 1e-12
    assert relative_error(outputs.last_hidden_state[0].permute(1, 2, 0), cells) <= 1e-12
    assert relative_error(outputs.vision_tokens[0], tokens) <= 1e-12


def test_outputs_are_what_their_documentation_says() -> None:
    model = small_deep_encoder()
    batch = tiled_batch()
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True, output_attentions=True)
        sam = ImageEncoderViTModel(model.config.sam_config)
        sam.load_state_dict(model.sam_model.state_dict())
        sam_outputs = sam.eval()(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert outputs.last_hidden_state.shape == (2, 24, 2, 2)
    assert outputs.local_feature_maps[0].shape == (24, 6, 4)
    assert outputs.local_feature_maps[1] is None
    assert [tuple(tokens.shape) for tokens in outputs.vision_tokens] == [(6 * 5 + 2 * 3 + 1, 24), (2 * 3 + 1, 24)]
    torch.testing.assert_close(outputs.sam_feature_map, sam_outputs.last_hidden_state)
    torch.testing.assert_close(outputs.patch_embeds, sam_outputs.patch_embeds)
    torch.testing.assert_close(outputs.hidden_states, sam_outputs.hidden_states)
    torch.testing.assert_close(outputs.attentions, sam_outputs.attentions)
    assert [tuple(state.shape) for state in outputs.clip_hidden_states] == [(2, 5, 20)] * 4
    assert [tuple(weights.shape) for weights in outputs.clip_attentions] == [(2, 4, 5, 5)] * 3
    torch.testing.assert_close(outputs.clip_attentions[0].sum(-1), torch.ones(2, 4, 5))
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean((2, 3)))

    # The tokens of the first image: its stitched tiles, then the whole view, line by line.
    lines, newline = outputs.vision_tokens[0], model.image_newline
    assert torch.equal(lines[:4], outputs.local_feature_maps[0][:, 0].T)
    assert torch.equal(lines[4], newline)
    assert torch.equal(lines[30:32], outputs.last_hidden_state[0, :, 0].T)
    assert torch.equal(lines[-2], newline)
    assert torch.equal(lines[-1], model.view_seperator)

    plain = model(**batch)
    assert plain.hidden_states is None
    assert plain.clip_hidden_states is None
    assert model(**batch, return_dict=False)[0].shape == (2, 24, 2, 2)


def test_the_plain_module_gives_the_same_tokens() -> None:
    model = small_deep_encoder()
    sam = ImageEncoderViT(128, 16, 3, 32, 4, 2, 4.0, 8, (1, 3), window_size=3, downsample_channels=(12, 20))
    plain = DeepEncoder(sam, clip_depth=3, clip_heads=4, clip_mlp_dim=48, clip_grid_size=2, projection_size=24).eval()
    plain.load_state_dict({f"model.{name}": value for name, value in model.state_dict().items()})
    batch = tiled_batch()
    with torch.no_grad():
        expected = model(**batch).vision_tokens
        torch.testing.assert_close(plain(*batch.values()), expected, rtol=0, atol=0)
        torch.testing.assert_close(plain(batch["pixel_values"])[1], expected[1])


@pytest.mark.parametrize(
    ("preset", "tokens"),
    [("tiny", 73), ("small", 111), ("base", 273), ("large", 421), ("gundam", 903), ("unlimited-ocr", None)],
)
def test_every_preset_of_the_processor(preset: str, tokens: int | None) -> None:
    """The counts that the decoder expects: for the sample page 3 x 2 tiles in gundam mode."""
    processor = ImageEncoderViTImageProcessorPil(preset=preset)
    inputs = processor(SAMPLE_PAGE, return_tensors="pt")
    model = small_deep_encoder(
        sam_changes={"num_hidden_layers": 1, "global_attn_indexes": []}, clip_num_hidden_layers=1
    )
    with torch.no_grad():
        outputs = model(**inputs, tile_batch_size=4)
    if tokens is None:
        rows, columns = inputs["tile_grids"][0].tolist()
        tokens = 273 + 10 * rows * (10 * columns + 1)
    assert tuple(outputs.vision_tokens[0].shape) == (tokens, 24)
    maps = processor.post_process_feature_maps(outputs, inputs)[0]
    assert maps.global_map.features.shape[0] == 24
    assert (maps.local_map is None) == (outputs.local_feature_maps is None)


@pytest.mark.parametrize("size_px", [(16, 16), (64, 128), (256, 384), (400, 80)], ids=str)
def test_any_size_and_aspect_ratio(size_px: tuple[int, int]) -> None:
    rows, columns = (-(-side // 64) for side in size_px)
    with torch.no_grad():
        outputs = small_deep_encoder()(random_pixels(2, 3, *size_px))
    assert outputs.last_hidden_state.shape == (2, 24, rows, columns)
    assert [len(tokens) for tokens in outputs.vision_tokens] == [rows * (columns + 1) + 1] * 2
    assert all(torch.isfinite(tokens).all() for tokens in outputs.vision_tokens)


def test_tiles_a_few_at_a_time_and_images_apart_give_the_same() -> None:
    model, batch = small_deep_encoder(), tiled_batch()
    with torch.no_grad():
        expected = model(**batch)
        torch.testing.assert_close(model(**batch, tile_batch_size=2).vision_tokens, expected.vision_tokens)
        alone = model(batch["pixel_values"][1:])
    torch.testing.assert_close(alone.vision_tokens[0], expected.vision_tokens[1])


def test_pooling_leaves_padding_out() -> None:
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    with torch.no_grad():
        outputs = small_deep_encoder()(random_pixels(1, 3, 128, 128), pixel_mask=mask)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[..., :1].mean((2, 3)))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_gradients_reach_every_parameter_with_and_without_checkpointing(attn_implementation: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small_deep_encoder().train()
        model.set_attn_implementation(attn_implementation)
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        sum(tokens.square().mean() for tokens in model(**tiled_batch()).vision_tokens).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    with torch.no_grad():
        expected = small_deep_encoder()(**tiled_batch()).vision_tokens
        actual = small_deep_encoder().to(dtype)(**tiled_batch()).vision_tokens
    for low, high in zip(actual, expected, strict=True):
        assert low.dtype == dtype
        assert relative_error(low, high) <= (0.03 if dtype == torch.bfloat16 else 0.004)


def test_autocast_gives_the_precision_of_bfloat16() -> None:
    model = small_deep_encoder()
    with torch.no_grad():
        expected = model(**tiled_batch()).vision_tokens
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(**tiled_batch()).vision_tokens
    assert 1e-4 < relative_error(actual[0], expected[0]) <= 0.03


def test_inference_on_the_cpu_takes_its_own_linear_layer_in_both_towers() -> None:
    # 64 tokens and more; the widths are oneDNN's business.
    model, pixels = small_deep_encoder(), random_pixels(1, 3, 512, 512)
    expected = model(pixels).last_hidden_state.detach()
    with torch.no_grad(), torch.profiler.profile() as profile:
        actual = model(pixels).last_hidden_state
    calls = {event.key: event.count for event in profile.key_averages()}
    assert relative_error(actual, expected) <= 1e-6
    if torch.backends.mkldnn.is_available():
        assert calls[f"image_encoder_vit::cpu_linear_v{INTERFACE}"] >= 4 * SMALL_CLIP["clip_num_hidden_layers"] + 1


def test_compiled_without_a_break() -> None:
    model = small_deep_encoder(
        sam_changes={"num_hidden_layers": 2, "global_attn_indexes": [1]}, clip_num_hidden_layers=1
    )
    compiled = torch.compile(model.encode_views, fullgraph=True, backend="eager", dynamic=False)
    pixels = random_pixels(2, 3, 192, 128)  # CLIP's positions are resized.
    with torch.no_grad():
        cells, sam_map = compiled(pixels)
        expected = model(pixels)
    assert relative_error(cells, expected.last_hidden_state) <= 1e-6
    assert relative_error(sam_map, expected.sam_feature_map) <= 1e-6


def test_new_weights_are_random_and_the_tokens_differ() -> None:
    model = DeepEncoderModel(small_deep_config()).eval()
    for name, parameter in model.named_parameters():
        is_learned_from_zero = name.endswith("bias") or "norm" in name or "neck.1" in name or "neck.3" in name
        assert is_learned_from_zero or parameter.std() > 0, name
    assert not torch.equal(model.image_newline, model.view_seperator)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_num_hidden_layers": 0}, "clip_num_hidden_layers must be at least 1, got 0"),
        ({"clip_num_attention_heads": 3}, "a multiple of clip_num_attention_heads, got 20 and 3"),
        ({"sam_config": {"downsample_channels": []}}, "downsample_channels is empty: the CLIP tower reads"),
        ({"sam_config": "vit_b"}, "sam_config must be an ImageEncoderViTConfig or its values, got 'vit_b'"),
        ({"clip_layers": 12}, "DeepEncoderConfig has no keyword 'clip_layers'"),
        ({"projection_sizes": 12}, "Did you mean 'projection_size'"),
        ({"sam_config": {"depht": 12}}, "Did you mean 'depth'"),
    ],
)
def test_configurations_that_make_no_encoder_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=re.escape(message)):
        DeepEncoderConfig(**{"sam_config": ImageEncoderViTConfig(**SMALL), **SMALL_CLIP, **changes})


def test_configuration_round_trip_and_second_name(tmp_path: Path) -> None:
    config = small_deep_config()
    config.save_pretrained(tmp_path)
    loaded = DeepEncoderConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.sam_config, ImageEncoderViTConfig)
    assert loaded.hidden_size == loaded.projection_size == 24
    assert DeepEncoderConfig(hidden_size=12).projection_size == 12
    assert DeepEncoderConfig().sam_config.to_dict() == ImageEncoderViTConfig().to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_grids": None}, "pixel_values_local needs tile_grids"),
        ({"tile_grids": torch.tensor([[2, 2], [0, 0]])}, "hold 4 tiles, but there are 6"),
        ({"tile_grids": torch.tensor([[3, 2]])}, "a row for each of 2 images, got 1"),
        ({"tile_batch_size": 0}, "tile_batch_size must be at least 1, got 0"),
        ({"pixel_values": torch.zeros(2, 3, 100, 128)}, "multiples of patch_size=16 px, got 100 x 128 px"),
        ({"pixel_mask": torch.ones(2, 64, 64)}, "pixel_mask must be (batch, height, width) = (2, 128, 128)"),
    ],
)
def test_bad_inputs_are_explained(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small_deep_encoder()(**{**tiled_batch(), **changes})


def test_the_sam_part_is_the_encoder_of_the_small_model() -> None:
    """One pull serves both uses: the map of the plain encoder with the same weights."""
    model, encoder = small_deep_encoder(), small_model()
    encoder.load_state_dict(model.sam_model.state_dict())
    pixels = random_pixels(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(model(pixels).sam_feature_map, encoder(pixels).last_hidden_state)
