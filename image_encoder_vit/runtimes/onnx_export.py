"""
The encoder as one ONNX file for images of one size, with a free batch: made by the exporter of torch.export, compared
with the PyTorch model in ONNX Runtime, and only then put in its place.

Input `pixel_values` (batch, 3, height, width); outputs `last_hidden_state`, `pooler_output`, `patch_embeds` as in
`ImageEncoderViTModelOutput`. All in float32. The position tables are resized for the size and stored.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modeling_image_encoder_vit import ImageEncoderViTModel
from ..support import import_extra
from .fixed_size import EXAMPLE_BATCH, OUTPUT_NAMES, FixedSizeEncoder, export_program, without_exporters_warnings

OPSET = 20
MAX_RELATIVE_ERROR = 1e-4
MAX_FILE_BYTES = 2**31 - 1  # What protobuf can hold in one message.
CHECKED_BATCHES = (1, EXAMPLE_BATCH)
SEED = 0


def export_onnx(
    model: ImageEncoderViTModel, output_file: str | Path, size: tuple[int, int], source: dict[str, Any] | None = None
) -> float:
    """
    Writes the model for images of `size` = (height, width) in px to `output_file`, weights included, and returns the
    largest relative error ||onnx - pytorch|| / ||pytorch|| that ONNX Runtime had against the model on random pixels.

    The file is complete or not there. Its metadata hold the configuration, and `source` if given: where the weights
    come from, for instance repository and commit.

    Raises:
        FileExistsError: If the file exists.
        ImportError: If onnx, onnxscript or onnxruntime are not installed.
        ValueError: If the size cannot be cut into patches, the weights are quantised, or too large for one file.
        ArithmeticError: If ONNX Runtime computes something else than the model.
    """
    output = Path(output_file)
    if output.exists():
        raise FileExistsError(f"{str(output)!r} exists already: remove it, or choose another name.")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        import_extra(name, "export")
    encoder = FixedSizeEncoder(model, size, chunked=True)
    proto = to_onnx(encoder)
    describe(proto, model, size, source)
    if proto.ByteSize() > MAX_FILE_BYTES:
        raise ValueError(f"The encoder takes {proto.ByteSize():,} bytes, and one ONNX file holds {MAX_FILE_BYTES:,}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.unfinished")
    try:
        with partial.open("wb") as file:
            file.write(proto.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        del proto
        error = largest_error(partial, encoder, model)
        if not error <= MAX_RELATIVE_ERROR:
            raise ArithmeticError(
                f"ONNX Runtime differs from the model by {error:.1e}, more than {MAX_RELATIVE_ERROR:.0e}: "
                f"{str(output)!r} was not written."
            )
        partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)
    return error


def to_onnx(encoder: FixedSizeEncoder) -> Any:
    """The encoder as an onnx.ModelProto."""
    with without_exporters_warnings():
        program = torch.onnx.export(
            export_program(encoder),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=list(OUTPUT_NAMES),
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def describe(proto: Any, model: ImageEncoderViTModel, size: tuple[int, int], source: dict[str, Any] | None) -> None:
    """Writes producer, configuration, size and source into the metadata."""
    metadata = {
        "config": model.config.to_json_string(use_diff=False),
        "image_size_px": json.dumps(list(size)),
        "source": json.dumps(source or {}),
    }
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value


def largest_error(path: Path, encoder: FixedSizeEncoder, model: ImageEncoderViTModel) -> float:
    """The largest relative error of ONNX Runtime's outputs for random images, over `CHECKED_BATCHES`."""
    onnxruntime = import_extra("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(SEED)
    errors = []
    for batch in CHECKED_BATCHES:
        pixels = torch.rand(batch, encoder.encoder.in_chans, *encoder.size, generator=generator) * 2 - 1
        with torch.inference_mode():
            expected = expected_outputs(model, encoder, pixels)
        actual = session.run(list(OUTPUT_NAMES), {"pixel_values": pixels.numpy()})
        errors += [relative_error(torch.from_numpy(a), e) for a, e in zip(actual, expected, strict=True)]
    return max(errors)


def expected_outputs(model: ImageEncoderViTModel, encoder: FixedSizeEncoder, pixels: Tensor) -> tuple[Tensor, ...]:
    """What the model itself gives; the float32 copy of its weights where they are in another precision."""
    if model.dtype != torch.float32 or model.device.type != "cpu":
        return encoder(pixels)
    outputs = model(pixels)
    return tuple(outputs[name] for name in OUTPUT_NAMES)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
