"""
Inference on the CPU: when its path may be taken, the layers of that path, and attention in one small buffer.

The path differs from PyTorch's own in speed, memory and rounding only. Letters in shapes: B images, N heads, D channels
per head, H and W the grid in patches, Q and K the number of queries and keys.
"""

import ctypes
import itertools
import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .recomputation import fits_trained_linear, joined_tables, relative_parts, trained_linear

# Of the operators here and of the kernel's library, in their names: copies of this code that were saved beside weights
# may be loaded in the same process, and share neither with another version.
INTERFACE = 3
MIN_TOKENS_IN_ONEDNN = 64  # Below, setting up a product there costs more than it saves.
ROWS_PER_CAST = 512  # Tokens whose low precision is spread into float32 at a time: 6 MB behind lin1.
# Logits that exist at a time: 8 MB in float32, those of a head and 512 queries at 1024 x 1024 px.
LOGITS_PER_CHUNK = 1 << 21
RECORDERS = "transformers.utils.output_capturing"  # Its hooks stay where they were once needed, and then do nothing.


def takes_cpu_path(
    input: Tensor, *others: Tensor, modules: Iterable[nn.Module] = (), calls_layers: bool = False
) -> bool:
    """
    Whether the path for inference on the CPU may compute something from `input` and `others`, in place of calls of
    `modules`, or by calls of them with parts of a batch. It may where nobody can tell, but by time, memory, rounding:

    - the tensors are plain ones in the CPU's memory, no subclass, as quantised weights are, and no other layout;
    - gradients are off, forward-mode derivatives too, and no transformation of torch.func (vmap, jvp, ...) is at work;
    - no graph is made that other runtimes are to read, by torch.export or torch.jit.trace;
    - `torch.backends.mkldnn.flags(enabled=False)` does not ask for PyTorch's own arithmetic;
    - autocast is off, or leaves `input` as it is, or `calls_layers`: then it acts within those;
    - neither the modules nor any within are watched: see `is_watched`.
    """
    return (
        all(
            type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.layout == torch.strided
            for tensor in (input, *others)
        )
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and bool(torch.backends.mkldnn.enabled)
        and (calls_layers or not torch.is_autocast_enabled("cpu") or input.dtype == torch.get_autocast_dtype("cpu"))
        and not any(is_watched(module) for module in modules)
    )


def is_watched(module: nn.Module) -> bool:
    """
    Whether anything sees or changes a call of `module`, or of one within: hooks, those for all modules included, or a
    `forward` put in the place of its own, as Accelerate's offloading and adapters do.
    """
    return bool(_has_any_global_hook()) or any(is_hooked(inner) for inner in module.modules())


def is_hooked(module: nn.Module) -> bool:
    """Whether `module` itself has hooks or a `forward` that is not its own, so that it may compute something else."""
    hooks = module._forward_hooks
    return bool(
        (hooks and any(getattr(hook, "__module__", None) != RECORDERS for hook in hooks.values()))
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is PyTorch's own and nobody watches it, so that it can be computed without being called."""
    return type(layer) is nn.Linear and not is_watched(layer)


def linear(layer: nn.Module, input: Tensor, gelu: bool = False) -> Tensor:
    """`layer` of `input` (..., C), a linear layer or what stands for one; then, if `gelu`, the exact (erf) GELU."""
    if is_plain_linear(layer) and fits_cpu_linear(layer, input):
        return cpu_linear(input, layer.weight, layer.bias, gelu)
    if is_plain_linear(layer) and fits_trained_linear(input, layer.weight):
        output = trained_linear(input, layer.weight, layer.bias)
        return F.gelu(output) if gelu else output
    warn_where_openmp_breaks(input)
    output = layer(input)
    return F.gelu(output) if gelu else output


def fits_cpu_linear(layer: nn.Linear, input: Tensor) -> bool:
    """Whether `cpu_linear` may compute a linear layer, and has the better arithmetic for it."""
    parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    # The path first: an exported graph would be bound to the batches on one side of the comparison of sizes.
    if input.dtype != layer.weight.dtype or not takes_cpu_path(input, *parameters):
        return False
    return runs_in_float32(input.dtype) or (
        input.numel() >= MIN_TOKENS_IN_ONEDNN * layer.in_features and has_onednn_linear(input.dtype)
    )


def convolve(layer: nn.Module, input: Tensor) -> Tensor:
    """`layer` of `input` (B, C, H, W), a convolution or what stands for one."""
    if (
        type(layer) is nn.Conv2d
        and runs_in_float32(input.dtype)
        and input.dtype == layer.weight.dtype
        and takes_cpu_path(input, layer.weight, modules=(layer,))
    ):
        bias = None if layer.bias is None else layer.bias.float()
        return F.conv2d(input.float(), layer.weight.float(), bias, layer.stride, layer.padding).to(input.dtype)
    return layer(input)


@torch.compiler.assume_constant_result
def runs_in_float32(dtype: torch.dtype) -> bool:
    """
    Whether the CPU's path computes this precision in float32, weights and results staying as they are: where the
    processor has no products for it, or OpenMP grants too few threads for those of oneDNN.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    return not (has_products(dtype) and openmp_grants_threads())


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether PyTorch says that this processor multiplies in this precision, and that oneDNN may do so here."""
    if dtype != torch.bfloat16 or not has_onednn_linear(dtype):
        return False  # Nothing below sums float16 in float32, which attention needs.
    if not torch.cpu._is_avx2_supported():
        return True  # No x86: there the question that `has_onednn_linear` asks is the whole one.
    # On AVX-512 alone oneDNN emulates them.
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and torch.cpu._is_avx512_bf16_supported()


@torch.compiler.assume_constant_result
def has_onednn_linear(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch offers oneDNN's linear layer, which is no public name, and for this precision."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _openmp() -> Any:
    """The OpenMP library that PyTorch runs its threads with; None where it cannot be asked."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        for name in ("thread_limit", "dynamic", "max_active_levels"):
            getattr(library, f"omp_get_{name}")
    except (OSError, AttributeError):
        return None
    return library


def openmp_grants_threads() -> bool:
    """
    Whether OpenMP gives PyTorch all threads that it asks for. oneDNN leaves a part of its results unwritten where
    it gets fewer: by OMP_THREAD_LIMIT, OMP_DYNAMIC or OMP_MAX_ACTIVE_LEVELS, or within a parallel region.
    """
    threads, openmp = torch.get_num_threads(), _openmp()
    if threads == 1 or openmp is None:
        return True
    return bool(
        openmp.omp_get_thread_limit() >= threads
        and not openmp.omp_get_dynamic()
        and openmp.omp_get_max_active_levels() > 0
        and not openmp.omp_in_parallel()
    )


def warn_where_openmp_breaks(input: Tensor) -> None:
    """Warns once where PyTorch's own layers of low precision are about to compute what is no number."""
    if input.dtype != torch.bfloat16 or input.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not openmp_grants_threads():
        warnings.warn(
            f"OpenMP grants fewer than the {torch.get_num_threads()} threads that PyTorch asks for (OMP_THREAD_LIMIT, "
            "OMP_DYNAMIC or OMP_MAX_ACTIVE_LEVELS is set): its layers in bfloat16 may then give NaN. Call "
            "torch.set_num_threads with what OpenMP grants, or use float32.",
            RuntimeWarning,
            stacklevel=3,
        )


# An operator of PyTorch's, since torch.compile does not take oneDNN's own into its graphs.
@torch.library.custom_op(f"image_encoder_vit::cpu_linear_v{INTERFACE}", mutates_args=(), device_types="cpu")
def cpu_linear(input: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """`input` (..., C) projected by `weight` (D, C) and `bias` (D,), then, if `gelu`, the exact (erf) GELU of that."""
    if not runs_in_float32(input.dtype):
        return _float32_or_native(input, weight, bias, gelu)
    weight, bias = weight.float(), None if bias is None else bias.float()
    output = input.new_empty(*input.shape[:-1], weight.shape[0])
    rows = zip(input.flatten(0, -2).split(ROWS_PER_CAST), output.flatten(0, -2).split(ROWS_PER_CAST), strict=True)
    for some, result in rows:
        result.copy_(_float32_or_native(some.float(), weight, bias, gelu))
    return output


def _float32_or_native(input: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    # Asked here too: what a compiled graph took for settled may have changed since.
    if has_onednn_linear(input.dtype) and torch.backends.mkldnn.enabled and openmp_grants_threads():
        activation, algorithm = ("gelu", "none") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, activation, [], algorithm)
    output = F.linear(input, weight, bias)
    return F.gelu(output) if gelu else output


@cpu_linear.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def linear_flop(input_shape: Any, weight_shape: Any, *rest: Any, **keywords: Any) -> int:
    """What `cpu_linear` computes, for PyTorch's FlopCounterMode: two for each multiplication and addition."""
    return 2 * input_shape.numel() * weight_shape[0]


def register_flops(name: str, formula: Any) -> None:
    """Registers the FLOPs of the operator `name` of ours, once for all copies of this code in a process."""
    operator = getattr(torch.ops.image_encoder_vit, f"{name}_v{INTERFACE}")
    if operator not in flop_registry:
        register_flop_formula(operator)(formula)


register_flops("cpu_linear", linear_flop)


def attention_flop(
    qkv: Any, padding: Any, table_h: Any, table_w: Any, num_heads: int, window_size: int, **keywords: Any
) -> int:
    """
    What attention in an operator of ours computes by the shapes of its operands, for PyTorch's FlopCounterMode, counted
    as the plain path's is: logits, values and both parts of the bias, of all tokens of a window, real or padding.
    """
    batch, height, width, channels = qkv
    rows, columns = (window_size, window_size) if window_size else (height, width)
    regions = batch * -(-height // rows) * -(-width // columns)
    keys = rows * columns
    return 2 * regions * keys * (2 * keys + rows + columns) * channels // 3


def fake_attention(
    qkv: Tensor, padding: Tensor | None, table_h: Tensor, table_w: Tensor, num_heads: int, window_size: int
) -> Tensor:
    """The shape and dtype of what attention in an operator of ours gives, for compilers."""
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


# An operator of PyTorch's, so that torch.compile takes it into its graphs as it is.
@torch.library.custom_op(f"image_encoder_vit::chunked_attention_v{INTERFACE}", mutates_args=(), device_types="cpu")
def chunked_attention(
    qkv: Tensor, padding: Tensor | None, table_h: Tensor, table_w: Tensor, num_heads: int, window_size: int
) -> Tensor:
    """
    What `kernel_attention` computes, by PyTorch alone: attention over a grid (B, H, W, 3 * C), in windows or whole, a
    window and some of its heads, or a head and some of its queries at a time, in one buffer of LOGITS_PER_CHUNK.

    The bias is written into the buffer by broadcasting, the matrix product added to it, and the softmax taken in
    place, all in float32 where `runs_in_float32`. Returns (B, H, W, C) in the dtype of `qkv`.
    """
    batch, height, width = qkv.shape[:3]
    dtype = torch.float32 if runs_in_float32(qkv.dtype) else qkv.dtype
    rows, columns = (window_size, window_size) if window_size else (height, width)
    tokens = rows * columns
    heads_per_chunk = min(num_heads, max(1, LOGITS_PER_CHUNK // tokens**2))
    parts = qkv.unflatten(3, (3, num_heads, -1)).permute(0, 3, 4, 1, 2, 5)  # (B, 3, N, H, W, D)
    filling = None if padding is None else padding.reshape(3, num_heads, 1, 1, -1)
    tables = joined_tables(table_h, table_w).to(dtype)
    attended = qkv.new_empty(batch, height, width, num_heads, parts.shape[5])
    buffer = qkv.new_empty(max(tokens, min(LOGITS_PER_CHUNK, heads_per_chunk * tokens**2)), dtype=dtype)
    for image, top, left, first in itertools.product(
        range(batch), range(0, height, rows), range(0, width, columns), range(0, num_heads, heads_per_chunk)
    ):
        down, right, heads = slice(top, top + rows), slice(left, left + columns), slice(first, first + heads_per_chunk)
        real = parts[image, :, heads, down, right]
        # Read many times each, so rows that lie together repay the copy.
        window = qkv.new_empty(*real.shape[:2], rows, columns, real.shape[4], dtype=dtype)
        if window.shape != real.shape:
            assert filling is not None
            window.copy_(filling[:, heads])
        window[:, :, : real.shape[2], : real.shape[3]].copy_(real)
        results = _attend_window(window[0], window[1], window[2], tables, buffer)  # (N, rows, columns, D)
        attended[image, down, right, heads] = results[:, : real.shape[2], : real.shape[3]].permute(1, 2, 0, 3)
    return attended.flatten(3)


chunked_attention.register_fake(fake_attention)
register_flops("chunked_attention", attention_flop)


def _attend_window(query: Tensor, key: Tensor, value: Tensor, tables: Tensor, buffer: Tensor) -> Tensor:
    """Attention of some heads over a grid (N, H, W, D), as many queries at a time as `buffer` has room for."""
    heads, height, width, dim = query.shape
    tokens = height * width
    q, k, v = (part.flatten(1, 2) for part in (query, key, value))
    products = (query.flatten(0, 2) @ tables.T).view(heads, height, width, len(tables))
    by_row, by_column = relative_parts(products, height)
    rel_h, rel_w = by_row.flatten(1, 2)[..., :, None], by_column.flatten(1, 2)[..., None, :]
    attended = torch.empty_like(q)
    queries_per_chunk = len(buffer) // (heads * tokens)
    for start in range(0, tokens, queries_per_chunk):
        some = slice(start, min(start + queries_per_chunk, tokens))
        bias = buffer[: heads * (some.stop - start) * tokens].view(heads, -1, height, width)
        torch.add(rel_h[:, some], rel_w[:, some], out=bias)
        logits = bias.flatten(2)
        multiply_into(logits, q[:, some], k.transpose(1, 2), dim**-0.5)
        torch.softmax(logits, dim=-1, out=logits)
        torch.matmul(logits, v, out=attended[:, some])
    return attended.view_as(query)


def multiply_into(sums: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """Adds `factor` times the products of matrices (n, Q, D) and (n, D, K) to `sums` (n, Q, K), in place."""
    if len(sums) == 1:  # Threads share one product better than a batch of one.
        torch.addmm(sums[0], left[0], right[0], alpha=factor, out=sums[0])
    else:
        torch.baddbmm(sums, left, right, alpha=factor, out=sums)
