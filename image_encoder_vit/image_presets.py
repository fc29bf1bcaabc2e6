"""
The image processors' settings by name: DeepSeek-OCR's modes and those of the other models with this encoder. The one
place that says them; checkpoints that are pulled get theirs from here too.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)


def square(side_px: int) -> dict[str, int]:
    """A square `size`."""
    return {"height": side_px, "width": side_px}


BASE: dict[str, Any] = {
    "size": square(1024),
    "do_pad": True,
    "keep_aspect_ratio": True,
    "image_mean": IMAGENET_STANDARD_MEAN,
    "image_std": IMAGENET_STANDARD_STD,
    "resample": int(PILImageResampling.BICUBIC),
    "padding_position": "center",
    "padding_color": [127, 127, 127],
    "tile_size": None,
}
GUNDAM: dict[str, Any] = BASE | {"tile_size": 640, "min_tiles": 2, "max_tiles": 6}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": BASE | {"size": square(512)},
    "small": BASE | {"size": square(640)},
    "base": BASE,
    "large": BASE | {"size": square(1280)},
    "gundam": GUNDAM,
    "unlimited-ocr": GUNDAM | {"max_tiles": 32},
    "deepseek-ocr-2": GUNDAM | {"tile_size": 768},
    # segment-anything's ResizeLongestSide and Sam.preprocess (commit 6fdee8f): bilinear, zeros after normalising.
    "sam": BASE
    | {
        "image_mean": IMAGENET_DEFAULT_MEAN,
        "image_std": IMAGENET_DEFAULT_STD,
        "resample": int(PILImageResampling.BILINEAR),
        "padding_position": "bottom_right",
        "padding_color": "mean",
    },
    # Stretched to the canvas, so that there is no padding to place.
    "got-ocr2": {name: value for name, value in BASE.items() if not name.startswith("padding")}
    | {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD, "keep_aspect_ratio": False},
}


def preset_settings(name: str) -> dict[str, Any]:
    """
    The settings of a preset, a copy.

    Raises:
        ValueError: For a name that is none, listing those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}. Known: {', '.join(PRESETS)}.")
    return deepcopy(PRESETS[name])


def preset_name(settings: Mapping[str, Any]) -> str | None:
    """The first preset whose every setting has the same value here; None where there is no such preset."""
    for name, preset in PRESETS.items():
        if all(_plain(settings.get(key)) == _plain(value) for key, value in preset.items()):
            return name
    return None


def _plain(value: Any) -> Any:
    """A setting in one form, whether it comes from JSON, a tuple or an enumeration."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
