"""
The files of a model folder: weights written tensor by tensor, settings with the code that they name, and a check of
what lies on the disk.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import custom_object_save

from ..image_processing_image_encoder_vit import ImageEncoderViTImageProcessorPil
from ..modeling_image_encoder_vit import name_auto_classes
from ..storage.safetensors_format import build_header
from .families import OWN_LAYOUT, closest_family
from .files import FORMAT_DTYPES, LocalTensors
from .inference import Shape
from .layouts import preprocessing_of
from .model_kinds import kind_of, read_config
from .sources import OpenedCheckpoint

WEIGHTS_FILE = "model.safetensors"


def write_weights(
    path: Path, shapes: dict[str, Shape], read: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """
    Writes a safetensors file tensor by tensor, so that memory holds one at a time; returns the shape, dtype and
    SHA-256 of each.

    Raises:
        ValueError: If a weight is NaN or infinite, or becomes so by the change of dtype.
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


def _checked(name: str, tensor: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    if bool(torch.isfinite(tensor).all()):
        return tensor
    if bool(torch.isfinite(original).all()):
        raise ValueError(f"Weight {name!r} does not fit into {tensor.dtype}: choose another dtype.")
    raise ValueError(f"Weight {name!r} holds NaN or infinite values: the checkpoint is damaged.")


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
    processor.save_pretrained(folder)
    return notices


def _image_processor(opened: OpenedCheckpoint) -> tuple[Any, tuple[str, ...]]:
    layout, own = opened.layout, opened.source.preprocessor
    if layout.family.name != OWN_LAYOUT:
        return ImageEncoderViTImageProcessorPil(**layout.preprocessing), ()
    if str(own.get("image_processor_type", "")).startswith("ImageEncoderViT"):
        return ImageEncoderViTImageProcessorPil.from_dict({k: v for k, v in own.items() if k != "auto_map"}), ()
    closest = closest_family(layout.config)
    notice = f"The source has no preprocessor_config.json of this encoder: assuming {closest.title}'s."
    return ImageEncoderViTImageProcessorPil(**preprocessing_of(closest, layout.config)), (notice,)


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
