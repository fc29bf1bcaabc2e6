"""When the encoder may take its path for inference on the CPU, and the linear layer of that path."""

import torch
from torch import Tensor

MIN_TOKENS_IN_ONEDNN = 64  # Below, setting up a product there costs more than it saves.


def is_cpu_inference(hidden: Tensor) -> bool:
    """
    Whether `hidden` is computed on the CPU without gradients, and not for a graph that other runtimes are to read:
    then, and only then, operators that have neither gradients nor a translation may compute it.
    """
    return (
        hidden.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not is_exporting()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def is_exporting() -> bool:
    # Before 2.7 torch does not tell export from compilation, which is then taken for it.
    asked = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return bool(asked())


@torch.compiler.assume_constant_result
def has_onednn_linear(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch offers oneDNN's linear layer, which is no public name, and for this precision."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


# An operator of PyTorch's, since torch.compile does not take oneDNN's own into its graphs.
@torch.library.custom_op("image_encoder_vit::cpu_linear", mutates_args=(), device_types="cpu")
def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """`input` (..., C) projected by `weight` (D, C) and `bias` (D,), then, if `gelu`, the exact (erf) GELU of that."""
    activation, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, activation, [], algorithm)


@onednn_linear.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])
