"""
The files of a model folder: weights written tensor by tensor, settings with the code that they name, and a check of
what lies on the disk.
"""

import hashlib
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers.dynamic_module_utils import custom_object_save

from ..image_processing_image_encoder_vit import ImageEncoderViTImageProcessorPil
from ..modeling_image_encoder_vit import name_auto_classes
from ..storage.safetensors_format import build_header
from ..support import message_of
from .families import OWN_LAYOUT, closest_family
from .files import FORMAT_DTYPES, LocalTensors
from .inference import Shape
from .layouts import preprocessing_of
from .model_kinds import kind_of, read_config
from .sources import OpenedCheckpoint

WEIGHTS_FILE = "model.safetensors"
MAX_SIDE_PX = 8192


def write_weights(
    path: Path, shapes: dict[str, Shape], read: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """
    Writes a safetensors file tensor by tensor, so that memory holds one at a time; returns the shape, dtype and
    SHA-256 of each.

    Raises:
        DamagedWeights: If a weight is NaN or infinite.
        ValueError: If one becomes so by the change of dtype.
        OSError: If the file cannot be written.
    """
    header, order = build_header({name: (FORMAT_DTYPES[dtype], shape) for name, shape in shapes.items()})
    records = {}
    with path.open("wb") as file:
        file.write(header)
        for name in order:
            tensor = read(name)
            data = _to_bytes(_checked(name, tensor.to(dtype), tensor))
            file.write(data)
            records[name] = {
                "shape": list(shapes[name]),
                "dtype": str(dtype).removeprefix("torch."),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    return records


class DamagedWeights(ValueError):
    """Weights that no other choice of the user's makes usable."""


def _checked(name: str, tensor: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    if bool(torch.isfinite(tensor).all()):
        return tensor
    if bool(torch.isfinite(original).all()):
        raise ValueError(f"Weight {name!r} does not fit into {tensor.dtype}: choose another dtype.")
    raise DamagedWeights(f"Weight {name!r} holds NaN or infinite values: the checkpoint is damaged.")


def _to_bytes(tensor: torch.Tensor) -> bytes:
    # Flattened first: a transposed tensor with sides of 1 counts as contiguous, but cannot be seen as bytes.
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_settings(opened: OpenedCheckpoint, folder: Path, dtype: torch.dtype) -> tuple[str, ...]:
    """
    Writes config.json and preprocessor_config.json, and beside them the code that both name; returns sentences that
    the user should read.
    """
    kind = kind_of(opened.layout.config)
    config = type(opened.layout.config).from_dict(opened.layout.config.to_dict())
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [kind.model.__name__]
    with torch.device("meta"):
        model = kind.model(config)
    if model._auto_class is not None:
        name_auto_classes(config, type(model))
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    processor, notices = _image_processor(opened)
    check_settings(processor)
    processor.save_pretrained(folder)
    return notices


def _image_processor(opened: OpenedCheckpoint) -> tuple[Any, tuple[str, ...]]:
    layout, own = opened.layout, opened.source.preprocessor
    if layout.family.name != OWN_LAYOUT:
        return ImageEncoderViTImageProcessorPil(**layout.preprocessing), ()
    if str(own.get("image_processor_type", "")).startswith("ImageEncoderViT"):
        try:
            return ImageEncoderViTImageProcessorPil.from_dict({k: v for k, v in own.items() if k != "auto_map"}), ()
        except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
            raise ValueError(f"preprocessor_config.json cannot work: {message_of(error)}") from None
    closest = closest_family(layout.config)
    notice = f"The source has no preprocessor_config.json of this encoder: assuming {closest.title}'s."
    return ImageEncoderViTImageProcessorPil(**preprocessing_of(closest, layout.config)), (notice,)


def check_settings(processor: Any) -> None:
    """
    Checks that an image processor's settings can make pixels of an image.

    Raises:
        ValueError: Naming a setting that cannot work.
    """
    settings = processor.to_dict()
    sizes = settings.get("size") or {}
    numbers = {
        **({f"size[{name!r}]": side for name, side in sizes.items()} if isinstance(sizes, dict) else {"size": sizes}),
        **{name: settings[name] for name in ("patch_size", "tile_size") if settings.get(name) is not None},
    }
    for name, value in numbers.items():
        if value is not None and not (isinstance(value, int) and 1 <= value <= MAX_SIDE_PX):
            raise ValueError(f"preprocessor_config.json: {name} must be 1 to {MAX_SIDE_PX} px, got {value!r}.")
    for name in ("image_mean", "image_std"):
        values = settings.get(name)
        values = values if isinstance(values, (list, tuple)) else [values]
        if not all(isinstance(v, (int, float)) and isfinite(v) and (v > 0 or name == "image_mean") for v in values):
            raise ValueError(f"preprocessor_config.json: {name} must be finite numbers above 0, got {values!r}.")
    try:
        pixels = processor(Image.new("RGB", (5, 3)), return_tensors="pt")["pixel_values"]
    except (ValueError, TypeError, RuntimeError, ArithmeticError, KeyError, AttributeError) as error:
        raise ValueError(f"preprocessor_config.json cannot work: {message_of(error)}") from None
    if not torch.isfinite(pixels).all():
        raise ValueError("preprocessor_config.json cannot work: it makes pixels that are not finite.")


def check_folder(folder: Path, digests: dict[str, str]) -> None:
    """
    Reads a written folder back: its weights are exactly those of its configuration's model, finite, and have the
    SHA-256 `digests`; its image processor loads. The weights are read one at a time, and the strict load is one of
    names and shapes, without memory for a model.

    Raises:
        OSError: If what lies on the disk is not what was written.
    """
    config = read_config(folder)
    ImageEncoderViTImageProcessorPil.from_pretrained(folder)
    tensors = LocalTensors.open([folder / WEIGHTS_FILE])
    with torch.device("meta"):
        model = kind_of(config).model(config)
        empty = {name: torch.empty(shape) for name, shape in tensors.shapes.items()}
    try:
        model.load_state_dict(empty, strict=True, assign=True)
    except RuntimeError as error:
        raise OSError(f"The folder that was written does not load: {error}") from None
    for name, digest in digests.items():
        tensor = tensors.read(name)
        if hashlib.sha256(_to_bytes(tensor)).hexdigest() != digest:
            raise OSError(f"{WEIGHTS_FILE} cannot be read back as it was written: {name!r} differs. Is the disk bad?")
        _checked(name, tensor, tensor)
