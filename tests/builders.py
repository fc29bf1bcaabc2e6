"""Small random models, pixels and comparisons that many tests build on."""

import platform

import numpy as np
import torch
from PIL import Image
from small import SMALL
from torch import nn

from image_encoder_vit import ImageEncoderViTConfig, ImageEncoderViTModel

# The modules that saving copies beside the weights.
REMOTE_CODE = {
    "attention.py",
    "cpu_kernel.py",
    "cpu_inference.py",
    "configuration_image_encoder_vit.py",
    "feature_maps.py",
    "image_geometry.py",
    "image_presets.py",
    "image_processing_image_encoder_vit.py",
    "image_reading.py",
    "modeling_image_encoder_vit.py",
    "recomputation.py",
}
DEEP_ENCODER_CODE = REMOTE_CODE | {"configuration_deep_encoder.py", "modeling_deep_encoder.py"}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """
    Gives every parameter a random value of a trained model's size: positions far from zero, gains away from 1, so
    that a mistake with any of them shows.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "rel_pos" in name or "pos_embed" in name or "position_embedding" in name:
                value = 0.5 * noise
            elif parameter.ndim == 1 and name.endswith("weight"):
                value = 1 + 0.2 * noise
            elif parameter.ndim == 1:
                value = 0.2 * noise
            else:
                value = noise / parameter[0].numel() ** 0.5
            parameter.copy_(value)
    return model


def small_model(seed: int = 0, **changes: object) -> ImageEncoderViTModel:
    """A small random model in eval mode; `changes` go to its configuration."""
    return randomize(ImageEncoderViTModel(ImageEncoderViTConfig(**{**SMALL, **changes})), seed).eval()


def random_pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    """Pixels as a processor gives them, -1 to 1."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise_image(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """An image of random pixels."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0]).convert(mode)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; NaN never compares as small."""
    actual, expected = actual.to(torch.float64), expected.to(torch.float64)
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def has_instructions(kernel: str) -> bool:
    """Whether this processor has what a kernel of hatch_build.py is compiled for."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    supported = {
        "avx2": torch.cpu._is_avx2_supported,
        "avx512": torch.cpu._is_avx512_supported,
        "avx512bf16": torch.cpu._is_avx512_bf16_supported,
    }
    return bool(supported[kernel.split("_")[0]]())
