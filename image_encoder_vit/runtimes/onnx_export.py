"""
The encoder as an ONNX file for images of one size, with a free batch: made by the exporter of torch.export, compared
with the PyTorch model in ONNX Runtime, and only then put in its place. Weights beyond what one file can hold lie in a
second one beside it, "NAME.onnx.data".

Input `pixel_values` (batch, 3, height, width); outputs `last_hidden_state`, `pooler_output`, `patch_embeds` as in
`ImageEncoderViTModelOutput`; of a whole DeepEncoder also `vision_tokens` (batch, n, 1280) of the whole view. All in
float32. The position tables are resized for the size and stored.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modeling_deep_encoder import DeepEncoderModel
from ..modeling_image_encoder_vit import ImageEncoderViTModel
from ..storage.atomic_file import sync
from ..storage.output_folder import discard, unfinished_path
from ..support import import_extra
from .fixed_size import EXAMPLE_BATCH, FixedSizeEncoder, export_program, without_exporters_warnings
from .fixed_size_deep import FixedSizeDeepEncoder, fixed_size_of

OPSET = 20
MAX_RELATIVE_ERROR = 1e-4
MAX_WEIGHT_BYTES = 2**31 - (64 << 20)  # Of one file: protobuf holds 2 GiB in a message, the graph takes some of it.
MAX_INLINE_BYTES = 1024  # Smaller tensors stay in the file: ONNX Runtime reads shapes from there.
CHECKED_BATCHES = (1, EXAMPLE_BATCH)
SEED = 0


def export_onnx(
    model: ImageEncoderViTModel | DeepEncoderModel,
    output_file: str | Path,
    size: tuple[int, int],
    source: dict[str, Any] | None = None,
) -> float:
    """
    Writes the model for images of `size` = (height, width) in px to `output_file`, weights included, and returns the
    largest relative error ||onnx - pytorch|| / ||pytorch|| that ONNX Runtime had against the model on random pixels.
    Weights of more than 2 GB go to a file of their own, `data_file(output_file)`, which must stay beside it.

    What is written is complete or not there. Its metadata hold the configuration, and `source` if given: where the
    weights come from, for instance repository and commit.

    Raises:
        FileExistsError: If the file exists.
        ImportError: If onnx, onnxscript or onnxruntime are not installed.
        ValueError: If the size cannot be cut into patches, or the weights are quantised.
        ArithmeticError: If ONNX Runtime computes something else than the model.
    """
    output = Path(output_file)
    data = data_file(output)
    for path in (output, data):
        if path.exists():
            raise FileExistsError(f"{str(path)!r} exists already: remove it, or choose another name.")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        import_extra(name, "export")
    encoder = fixed_size_of(model, size, chunked=True)
    graph = to_onnx(encoder)
    graph.metadata_props.update(metadata(model, size, source))
    folder = unfinished_path(output)
    with ExitStack() as stack:
        discard(folder)  # Of an export that was killed.
        folder.mkdir(parents=True)
        stack.callback(discard, folder)
        save(graph, folder / output.name)
        del graph
        error = largest_error(folder / output.name, encoder, model)
        if not error <= MAX_RELATIVE_ERROR:
            raise ArithmeticError(
                f"ONNX Runtime differs from the model by {error:.1e}, more than {MAX_RELATIVE_ERROR:.0e}: "
                f"{str(output)!r} was not written."
            )
        publish(folder, output)
    return error


def publish(folder: Path, output: Path) -> None:
    """Moves the files of the folder beside it. The one that runtimes open comes last: once it is there, all is."""
    for path in folder.iterdir():
        sync(path)
    data = data_file(output)
    if (folder / data.name).exists():
        (folder / data.name).rename(data)
    try:
        (folder / output.name).rename(output)
    except OSError:
        data.unlink(missing_ok=True)
        raise
    sync(output.parent)


def data_file(output: Path) -> Path:
    """Where the weights of a large ONNX file lie."""
    return output.with_name(f"{output.name}.data")


def to_onnx(encoder: FixedSizeEncoder | FixedSizeDeepEncoder) -> Any:
    """The encoder as an onnx_ir.Model."""
    with without_exporters_warnings():
        program = torch.onnx.export(
            export_program(encoder),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=list(encoder.output_names),
            verbose=False,
        )
    assert program is not None
    return program.model


def metadata(
    model: ImageEncoderViTModel | DeepEncoderModel, size: tuple[int, int], source: dict[str, Any] | None
) -> dict[str, str]:
    """Configuration, size and source, as they are written into the file."""
    return {
        "config": model.config.to_json_string(use_diff=False),
        "image_size_px": json.dumps(list(size)),
        "source": json.dumps(source or {}),
    }


def save(graph: Any, path: Path) -> None:
    """Writes an onnx_ir.Model to one file, or to two where its weights are too large for one."""
    weight_bytes = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    is_large = weight_bytes > MAX_WEIGHT_BYTES
    import_extra("onnx_ir", "export").save(
        graph,
        path,
        external_data=data_file(path).name if is_large else None,
        size_threshold_bytes=MAX_INLINE_BYTES,
    )


def largest_error(
    path: Path, encoder: FixedSizeEncoder | FixedSizeDeepEncoder, model: ImageEncoderViTModel | DeepEncoderModel
) -> float:
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
        actual = session.run(list(encoder.output_names), {"pixel_values": pixels.numpy()})
        errors += [relative_error(torch.from_numpy(a), e) for a, e in zip(actual, expected, strict=True)]
    return max(errors)


def expected_outputs(
    model: ImageEncoderViTModel | DeepEncoderModel, encoder: FixedSizeEncoder | FixedSizeDeepEncoder, pixels: Tensor
) -> tuple[Tensor, ...]:
    """What the model itself gives; the float32 copy of its weights where they are in another precision."""
    if model.dtype != torch.float32 or model.device.type != "cpu":
        return encoder(pixels)
    outputs = model(pixels)
    # A DeepEncoder has one sequence of tokens for each image.
    return tuple(
        torch.stack(outputs[name]) if isinstance(outputs[name], tuple) else outputs[name]
        for name in encoder.output_names
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
