"""Equal to transformers' Unlimited-OCR with the same random weights, up to the text that its decoder generates."""

import itertools
import os

import pytest
import torch
from builders import random_pixels, randomize, relative_error
from deep import small_deep_encoder, unlimited_ocr
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from image_encoder_vit import DeepEncoderConfig, DeepEncoderModel

FLOAT32_BOUND = 1e-5
BFLOAT16_FACTOR = 1.1  # our error against float32 over theirs
# Side of the view and of the tiles in px, as the processor's presets have them, and each image's rows and columns.
BATCHES = {
    "tiny": (512, 64, [(0, 0), (0, 0)]),
    "small": (640, 64, [(0, 0), (0, 0)]),
    "base": (1024, 64, [(0, 0)]),
    "large": (1280, 64, [(0, 0)]),
    "gundam": (1024, 640, [(1, 2), (0, 0), (3, 2)]),
    "unlimited-ocr": (1024, 128, [(4, 8), (1, 32)]),
    "deepseek-ocr-2": (1024, 768, [(2, 1)]),
}
# As few blocks as show each kind, at the published training size and window.
TRAINED_AT_1024 = {"image_size": 1024, "window_size": 14, "num_hidden_layers": 2, "global_attn_indexes": [1]}


def batch_of(name: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Pixels of the views, of the tiles, and the grids of a batch."""
    side, tile, grids = BATCHES[name]
    count = sum(rows * columns for rows, columns in grids)
    tiles = random_pixels(count, 3, tile, tile, seed=1) if count else None
    return random_pixels(len(grids), 3, side, side), tiles, torch.tensor(grids)


def native_tokens(
    native: nn.Module, pixels: torch.Tensor, tiles: torch.Tensor | None, grids: torch.Tensor
) -> list[torch.Tensor]:
    """What transformers gives for the batch; its grids are (columns, rows)."""
    counts = [int(rows * columns) for rows, columns in grids]
    outputs = native.model.get_image_features(pixels, tiles, counts, [[int(c), int(r)] for r, c in grids])
    return list(outputs.pooler_output)


@torch.inference_mode()
def errors(model: DeepEncoderModel, native: nn.Module, name: str) -> list[float]:
    pixels, tiles, grids = batch_of(name)
    actual = model(pixels, pixel_values_local=tiles, tile_grids=grids).vision_tokens
    expected = native_tokens(native, pixels, tiles, grids)
    return [relative_error(ours, theirs) for ours, theirs in zip(actual, expected, strict=True)]


@torch.inference_mode()
def bfloat16_errors_ratio(model: DeepEncoderModel, native: nn.Module, name: str) -> float:
    """How far ours moves from float32 when cast to bfloat16, over how far the native class moves."""
    pixels, tiles, grids = batch_of(name)
    expected = torch.cat(native_tokens(native, pixels, tiles, grids))
    native, model = native.to(torch.bfloat16), model.to(torch.bfloat16)
    low_tiles = None if tiles is None else tiles.to(torch.bfloat16)
    theirs = torch.cat(native_tokens(native, pixels.to(torch.bfloat16), low_tiles, grids))
    ours = torch.cat(model(pixels, pixel_values_local=tiles, tile_grids=grids).vision_tokens)
    return relative_error(ours, expected) / relative_error(theirs, expected)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_equals_the_native_class_for_every_preset_and_grid(attn_implementation: str) -> None:
    model = small_deep_encoder(sam_changes=TRAINED_AT_1024, clip_grid_size=16)
    model.set_attn_implementation(attn_implementation)
    native = unlimited_ocr(model)
    native.set_attn_implementation(attn_implementation)
    names = BATCHES if attn_implementation == "sdpa" else ["tiny", "small"]
    assert {name: max(errors(model, native, name)) for name in names} == pytest.approx(
        dict.fromkeys(names, 0.0), abs=FLOAT32_BOUND
    )


def test_float64_is_the_native_class_s_where_nothing_is_resized() -> None:
    """Elsewhere transformers resizes CLIP's positions in float32."""
    model = small_deep_encoder().to(torch.float64)
    native = unlimited_ocr(model).to(torch.float64)
    pixels = random_pixels(2, 3, 128, 128).double()
    with torch.inference_mode():
        expected = native_tokens(native, pixels, None, torch.zeros(2, 2))
        actual = model(pixels).vision_tokens
    assert max(itertools.starmap(relative_error, zip(actual, expected, strict=True))) <= 1e-13


@pytest.mark.parametrize("name", ["tiny", "small", "unlimited-ocr"])
def test_bfloat16_error_is_the_native_class_s(name: str) -> None:
    model = small_deep_encoder(sam_changes=TRAINED_AT_1024, clip_grid_size=16)
    assert bfloat16_errors_ratio(model, unlimited_ocr(model), name) <= BFLOAT16_FACTOR


def test_the_decoder_of_transformers_generates_the_same_text_from_our_tokens() -> None:
    model = small_deep_encoder(sam_changes=TRAINED_AT_1024, clip_grid_size=16)
    native = unlimited_ocr(model)
    pixels, tiles, grids = batch_of("gundam")
    pixels, tiles, grids = pixels[:1], tiles[:2], grids[:1]
    with torch.inference_mode():
        tokens = model(pixels, pixel_values_local=tiles, tile_grids=grids).vision_tokens
    placeholders = torch.full((1, len(tokens[0])), native.config.image_token_id)
    input_ids = torch.cat((torch.tensor([[0]]), placeholders, torch.tensor([[5, 9, 17]])), dim=1)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    with torch.inference_mode():
        expected = native.generate(
            input_ids,
            pixel_values=pixels,
            pixel_values_local=tiles,
            num_local_patches=[2],
            patches_grid=[[2, 1]],
            **options,
        )
        handed = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
        actual = native.generate(input_ids, mm_encoder_outputs=handed, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    logits = torch.stack(expected.logits)
    assert relative_error(torch.stack(actual.logits), logits) <= FLOAT32_BOUND
    # And the text depends on what was read.
    handed = {"image": BaseModelOutputWithPooling(pooler_output=[tokens[0].flip(0)])}
    with torch.inference_mode():
        other = native.generate(input_ids, mm_encoder_outputs=handed, **options)
    assert relative_error(torch.stack(other.logits), logits) > 0.01


@pytest.mark.full_size
def test_full_size_equals_the_native_class() -> None:
    model, native = full_size_pair()
    assert max(errors(model, native, "tiny")) <= FLOAT32_BOUND


@pytest.mark.full_size
@pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="takes many minutes: LONG_TESTS=1 runs it")
def test_full_size_equals_the_native_class_at_every_size_and_in_bfloat16() -> None:
    model, native = full_size_pair()
    for name in ("small", "base", "large", "gundam"):
        assert max(errors(model, native, name)) <= FLOAT32_BOUND, name
    assert bfloat16_errors_ratio(model, native, "base") <= BFLOAT16_FACTOR


def full_size_pair() -> tuple[DeepEncoderModel, nn.Module]:
    """A random DeepEncoder and transformers' class, with a decoder of one layer, over the same weights."""
    model = randomize(DeepEncoderModel(DeepEncoderConfig())).eval()
    return model, unlimited_ocr(model, num_hidden_layers=1, num_attention_heads=10, num_key_value_heads=10)
