"""Equal to transformers' own classes with the same random weights."""

import pytest
import torch
from builders import random_pixels, randomize, relative_error, small_model
from native import NATIVE, native_twin, sam_twin
from small import SMALL

from image_encoder_vit import ImageEncoderViTConfig, ImageEncoderViTModel

SIZES_PX = [(512, 512), (640, 640), (1024, 1024), (1280, 1280), (672, 896), (1024, 640)]
FLOAT32_BOUND = 1e-5  # relative error against the native class
BFLOAT16_FACTOR = 1.15  # our error against float32 over theirs
# A windowed and a global block at the published training size and window.
TWO_BLOCKS = {
    **SMALL,
    "image_size": 1024,
    "window_size": 14,
    "num_hidden_layers": 2,
    "global_attn_indexes": [1],
}


@pytest.mark.parametrize("size_px", SIZES_PX, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", NATIVE)
def test_equals_the_native_class_in_float32(
    kind: str, attn_implementation: str, batch: int, size_px: tuple[int, int]
) -> None:
    model = small_model(**{**TWO_BLOCKS, "downsample_channels": NATIVE[kind].downsample_channels})
    model.set_attn_implementation(attn_implementation)
    native = native_twin(kind, model, attn_implementation)
    pixels = random_pixels(batch, 3, *size_px)
    with torch.inference_mode():
        error = relative_error(model(pixels).last_hidden_state, native(pixels).last_hidden_state)
    assert error <= FLOAT32_BOUND


@pytest.mark.parametrize("size_px", [(512, 512), (672, 896)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", NATIVE)
def test_bfloat16_error_is_the_native_class_s(kind: str, attn_implementation: str, size_px: tuple[int, int]) -> None:
    model = small_model(**{**TWO_BLOCKS, "downsample_channels": NATIVE[kind].downsample_channels})
    model.set_attn_implementation(attn_implementation)
    native = native_twin(kind, model, attn_implementation)
    pixels = random_pixels(3, 3, *size_px)
    assert bfloat16_errors_ratio(model, native, pixels) <= BFLOAT16_FACTOR


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_equals_sam_in_transformers(attn_implementation: str) -> None:
    model = small_model(**{**TWO_BLOCKS, "image_size": 512, "downsample_channels": []})
    model.set_attn_implementation(attn_implementation)
    native = sam_twin(model, attn_implementation)
    pixels = random_pixels(2, 3, 512, 512)
    with torch.inference_mode():
        error = relative_error(model(pixels).last_hidden_state, native(pixels).last_hidden_state)
    assert error <= FLOAT32_BOUND


@pytest.mark.full_size
def test_full_size_equals_the_native_class_in_float32_and_bfloat16() -> None:
    model = randomize(ImageEncoderViTModel(ImageEncoderViTConfig())).eval()
    native = native_twin("unlimited_ocr", model, "sdpa")
    pixels = random_pixels(1, 3, 1024, 1024)
    with torch.inference_mode():
        error = relative_error(model(pixels).last_hidden_state, native(pixels).last_hidden_state)
    assert error <= FLOAT32_BOUND
    assert bfloat16_errors_ratio(model, native, pixels) <= BFLOAT16_FACTOR


@torch.inference_mode()
def bfloat16_errors_ratio(model: torch.nn.Module, native: torch.nn.Module, pixels: torch.Tensor) -> float:
    """How far ours moves from float32 when cast to bfloat16, over how far the native class moves."""
    expected = native(pixels).last_hidden_state
    native_error, our_error = (
        relative_error(module.to(torch.bfloat16)(pixels.to(torch.bfloat16)).last_hidden_state, expected)
        for module in (native, model)
    )
    return our_error / native_error
