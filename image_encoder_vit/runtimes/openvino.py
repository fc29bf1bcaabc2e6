"""
The encoder run by OpenVINO on the CPU, from the weights in memory:

    encoder = openvino_encoder(model, precision="bf16")
    features = encoder(pixel_values).last_hidden_state
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..modeling_deep_encoder import DeepEncoderModel, DeepEncoderModelOutput
from ..modeling_image_encoder_vit import (
    ImageEncoderViTModel,
    ImageEncoderViTModelOutput,
    check_pixel_values,
    mean_over_cells,
)
from ..support import import_extra
from .fixed_size import check_convertible, export_program, without_exporters_warnings
from .fixed_size_deep import fixed_size_of

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def openvino_encoder(
    model: ImageEncoderViTModel | DeepEncoderModel,
    precision: str = "fp32",
    *,
    threads: int | None = None,
    max_compiled: int = 4,
) -> "OpenVINOEncoder":
    """
    An encoder that is called as `model` is, and computes in OpenVINO on the CPU.

    It is compiled at the first call with each shape of `pixel_values`, some seconds at full size, and holds the last
    `max_compiled` shapes, each with its own copy of the weights. Later changes of `model` reach only what is compiled
    afterwards.

    Args:
        model: An encoder, or a whole DeepEncoder, which computes whole views here and no tiles; with float weights in
            memory, in any dtype.
        precision: "fp32", or "bf16" where the CPU has it: faster, with the error of a bfloat16 model.
        threads: Of OpenVINO; PyTorch's number by default.
        max_compiled: Shapes that are held compiled.

    Raises:
        ImportError: If openvino is not installed.
        ValueError: If the precision is another, a number is not positive, or the weights are quantised or offloaded.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}.")
    for name, value in (("threads", threads), ("max_compiled", max_compiled)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    import_extra("openvino", "export")
    check_convertible(model)
    return OpenVINOEncoder(model, precision, threads or torch.get_num_threads(), max_compiled)


class OpenVINOEncoder:
    """What `openvino_encoder` returns."""

    def __init__(
        self, model: ImageEncoderViTModel | DeepEncoderModel, precision: str, threads: int, max_compiled: int
    ) -> None:
        self.model = model
        self.config = model.config
        self.precision = precision
        self.threads = threads
        self._compiled_for = lru_cache(maxsize=max_compiled)(self._compile)

    def __call__(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, **kwargs: Any
    ) -> ImageEncoderViTModelOutput | DeepEncoderModelOutput:
        """
        Encodes a batch of images; arguments, errors and outputs are those of `ImageEncoderViTModel.forward`, in float32
        and without gradients. The image processor's other outputs are accepted and not used.

        Raises:
            ValueError: As the model does, and if hidden states or attentions are asked for.
        """
        if isinstance(self.model, DeepEncoderModel) and kwargs.get("pixel_values_local") is not None:
            raise ValueError("Tiles need the PyTorch model: OpenVINO computes the whole view of a DeepEncoder.")
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise ValueError(f"{name}=True needs the PyTorch model: OpenVINO computes the features alone.")
        encoder = self.model.encoder
        check_pixel_values(pixel_values, encoder.in_chans, encoder.patch_size)
        pixels = pixel_values.detach().to("cpu", torch.float32).contiguous()
        outputs = self._compiled_for(tuple(pixels.shape))([pixels.numpy()])
        features, pooled, tokens, *sequences = (torch.from_numpy(outputs[index]) for index in range(len(outputs)))
        if pixel_mask is not None:
            pooled = mean_over_cells(features, pixels, pixel_mask, encoder.stride)
        if sequences:
            return DeepEncoderModelOutput(
                last_hidden_state=features,
                pooler_output=pooled,
                patch_embeds=tokens,
                vision_tokens=tuple(sequences[0]),
                sam_feature_map=tokens.transpose(1, 2).unflatten(2, features.shape[2:]),
            )
        return ImageEncoderViTModelOutput(last_hidden_state=features, pooler_output=pooled, patch_embeds=tokens)

    def _compile(self, shape: tuple[int, ...]) -> Any:
        # OpenVINO runs attention with a whole bias faster than in chunks.
        program = export_program(fixed_size_of(self.model, (shape[2], shape[3]), chunked=False))
        return compile_for_openvino(program, shape, self.precision, self.threads)


def compile_for_openvino(program: ExportedProgram, shape: tuple[int, ...], precision: str, threads: int) -> Any:
    """
    Compiles a graph of torch.export for pixels of one `shape` (B, 3, height in px, width in px), which OpenVINO runs
    faster than a free batch.
    """
    openvino = import_extra("openvino", "export")
    with without_exporters_warnings():
        graph = openvino.convert_model(program)
    graph.reshape(list(shape))
    return openvino.Core().compile_model(graph, "CPU", cpu_settings(precision, threads))


def cpu_settings(precision: str, threads: int) -> dict[str, Any]:
    """OpenVINO's settings for one call at a time on the CPU."""
    return {
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
