"""
Attention with relative positions by the package's own kernel, cpu_kernel.c: in inference, on CPUs with AVX-512.

Installing the package compiles the kernel where a C compiler is at hand. Where it is missing, as on other processors,
the encoder computes the same through PyTorch, more slowly.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIBRARY = "_cpu_kernel.so"


class Kernel(NamedTuple):
    """The kernel's library, and the function of the OpenMP library PyTorch is linked with that runs it in threads."""

    library: ctypes.CDLL
    parallel: Any


@torch.compiler.assume_constant_result
def has_attention_kernel(dtype: torch.dtype) -> bool:
    """Whether the kernel is installed, and this processor can run it in this precision."""
    if attention_kernel() is None:
        return False
    if dtype == torch.bfloat16:
        # PyTorch knows of the processor's bfloat16 products, under no public name.
        is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return is_supported is not None and bool(is_supported())
    return dtype == torch.float32


@cache
def attention_kernel() -> Kernel | None:
    """The kernel, or None where it is not installed or the processor is another."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return None
    # Code that was saved beside a checkpoint has no library of its own; where the package is installed, its one serves.
    spec = importlib.util.find_spec("image_encoder_vit")
    folders = (spec.submodule_search_locations or []) if spec else []
    paths = [path for folder in folders if (path := Path(folder, LIBRARY)).exists()]
    parallel = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    return Kernel(ctypes.CDLL(str(paths[0])), parallel) if paths and parallel else None


# An operator of PyTorch's, so that torch.compile takes it into its graphs as it is.
@torch.library.custom_op("image_encoder_vit::cpu_attention", mutates_args=(), device_types="cpu")
def kernel_attention(
    qkv: Tensor, padding: Tensor | None, table_h: Tensor, table_w: Tensor, num_heads: int, window_size: int
) -> Tensor:
    """
    Attention over a grid (B, H, W, 3 * C) of queries, keys and values side by side: (B, H, W, C).

    In windows of `window_size` patches, filled up with `padding` (3 * C,), or over the whole grid where that is 0. The
    tables (2 * length - 1, C / heads) are those of relative positions, resized for the window or the grid. All have
    one dtype; C / heads is even.

    Raises:
        MemoryError: If there is no memory for the kernel's buffers, about 1 MB for each thread.
    """
    batch, height, width, channels = qkv.shape
    attended = qkv.new_empty(batch, height, width, channels // 3)
    arrays = [qkv if tensor is None else tensor.contiguous() for tensor in (qkv, padding, table_h, table_w)]
    sizes = batch, height, width, num_heads, channels // 3 // num_heads, window_size
    kernel = attention_kernel()
    assert kernel is not None
    name = "image_encoder_vit_attention_" + {torch.float32: "float32", torch.bfloat16: "bfloat16"}[qkv.dtype]
    failed = kernel.library[name](
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (attended, *arrays)),
        *map(ctypes.c_long, sizes),
        ctypes.c_uint(torch.get_num_threads()),
        kernel.parallel,
    )
    if failed:
        raise MemoryError(f"No memory for the attention of {height} x {width} patches.")
    return attended


@kernel_attention.register_fake
def _(
    qkv: Tensor, padding: Tensor | None, table_h: Tensor, table_w: Tensor, num_heads: int, window_size: int
) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
