"""
Attention with relative positions by the package's own kernel, cpu_kernel.c: in inference, on CPUs with AVX-512 or AVX2.

Installing the package compiles the kernel where a C compiler is at hand. Where it is missing, as on other processors,
the encoder computes the same through PyTorch, more slowly.
"""

import ctypes
import json
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from torch import Tensor

from .cpu_inference import INTERFACE, attention_flop, fake_attention, has_products, register_flops

LIBRARY = "_cpu_kernel.so"
PACKAGE = "image_encoder_vit"
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


class Kernel(NamedTuple):
    """The functions for this processor by precision, and that of PyTorch's OpenMP which runs them in threads."""

    functions: dict[torch.dtype, Any]
    parallel: Any


@torch.compiler.assume_constant_result
def has_attention_kernel(dtype: torch.dtype) -> bool:
    """Whether the kernel is installed, and runs on this processor and in this precision."""
    kernel = attention_kernel()
    return kernel is not None and dtype in kernel.functions


@cache
def attention_kernel() -> Kernel | None:
    """The kernel, or None where it is not installed, cannot be loaded, or the processor is another."""
    names = kernel_names(torch.backends.cpu.get_cpu_capability())
    path = installed_library() if names else None
    if path is None:
        return None
    try:
        return load_kernel(path, names)
    except (OSError, AttributeError, ValueError) as error:
        warnings.warn(
            f"{path} cannot be used, PyTorch computes the attention instead, more slowly: {error}. Installing the "
            "package again compiles it anew.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def kernel_names(capability: str) -> dict[torch.dtype, list[str]]:
    """
    The kernels for each precision, the best first, as hatch_build.py names them, for a processor of this `capability`.

    Low precision is spread into float32 within the kernel, but for bfloat16 where the processor multiplies it. There is
    none for processors without AVX2.
    """
    vectors = next((vectors for vectors in ("AVX512", "AVX2") if vectors in capability), None)
    if vectors is None:
        return {}
    names = {dtype: [f"{vectors.lower()}_{str(dtype).removeprefix('torch.')}"] for dtype in PRECISIONS}
    if vectors == "AVX512" and has_products(torch.bfloat16):
        names[torch.bfloat16].insert(0, "avx512bf16_bfloat16")
    return names


def installed_library() -> Path | None:
    """
    Where the library lies in the package as installed, if it does.

    Code that was saved beside a checkpoint has none of its own: the installed package's serves. A folder of that
    name which merely lies on Python's path does not.
    """
    if __package__ == PACKAGE:
        folders = [Path(__file__).parent]
    else:
        try:
            distribution = metadata.distribution(PACKAGE)
            origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        except (metadata.PackageNotFoundError, ValueError, OSError):
            return None
        folders = [Path(str(distribution.locate_file(PACKAGE)))]
        if origin.get("dir_info", {}).get("editable"):
            folders.append(Path(url2pathname(urlparse(origin["url"]).path), PACKAGE))
    return next((path for folder in folders if (path := folder / LIBRARY).is_file()), None)


def load_kernel(path: Path, names: dict[torch.dtype, list[str]]) -> Kernel:
    """
    Loads the first kernel of each list that the library has; an old compiler may have left some out.

    Raises:
        OSError: If it is no library for this machine.
        AttributeError: If it, or PyTorch, lacks what it is called with.
        ValueError: If it was compiled for another version of this module, or has none of these kernels.
    """
    library = ctypes.CDLL(str(path))
    interface = ctypes.c_int.in_dll(library, "image_encoder_vit_interface").value
    if interface != INTERFACE:
        raise ValueError(f"its interface is version {interface}, not {INTERFACE}")
    functions = {
        dtype: function
        for dtype, candidates in names.items()
        for name in reversed(candidates)  # The best one comes last, and stays.
        if (function := getattr(library, f"image_encoder_vit_attention_{name}", None)) is not None
    }
    if not functions:
        raise ValueError(f"it has none of the kernels for this processor: {list(names.values())}")
    return Kernel(functions, ctypes.CDLL(torch._C.__file__).GOMP_parallel)


# An operator of PyTorch's, so that torch.compile takes it into its graphs as it is.
@torch.library.custom_op(f"image_encoder_vit::cpu_attention_v{INTERFACE}", mutates_args=(), device_types="cpu")
def kernel_attention(
    qkv: Tensor, padding: Tensor | None, table_h: Tensor, table_w: Tensor, num_heads: int, window_size: int
) -> Tensor:
    """
    Attention over a grid (B, H, W, 3 * C) of queries, keys and values side by side: (B, H, W, C).

    In windows of `window_size` patches, filled up with `padding` (3 * C,), or over the whole grid where that is 0. The
    tables (2 * length - 1, C / heads) are those of relative positions, resized for the window or the grid. All have
    one dtype; C / heads is even. `padding` may be None where no window sticks out of the grid.

    Raises:
        ValueError: If the shapes or dtypes do not fit together.
        MemoryError: If there is no memory for the kernel's buffers, about 1 MB for each thread.
    """
    check_operands(qkv, padding, table_h, table_w, num_heads, window_size)
    batch, height, width, channels = qkv.shape
    attended = qkv.new_empty(batch, height, width, channels // 3)
    arrays = [qkv if tensor is None else tensor.contiguous() for tensor in (qkv, padding, table_h, table_w)]
    sizes = batch, height, width, num_heads, channels // 3 // num_heads, window_size
    kernel = attention_kernel()
    assert kernel is not None
    failed = kernel.functions[qkv.dtype](
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (attended, *arrays)),
        *map(ctypes.c_long, sizes),
        ctypes.c_uint(torch.get_num_threads()),
        kernel.parallel,
    )
    if failed:
        raise MemoryError(f"No memory for the attention of {height} x {width} patches.")
    return attended


def check_operands(
    qkv: Tensor, padding: Tensor | None, table_h: Tensor, table_w: Tensor, num_heads: int, window_size: int
) -> None:
    """
    Checks that the operands of `kernel_attention`, which reads memory by these shapes, fit together.

    Raises:
        ValueError: Naming the shapes seen.
    """
    _, height, width, channels = qkv.shape
    dim = channels // 3 // max(1, num_heads)
    tables = [(2 * (window_size or side) - 1, dim) for side in (height, width)]
    sticks_out = bool(window_size) and bool(height % window_size or width % window_size)
    operands = [tensor for tensor in (qkv, padding, table_h, table_w) if tensor is not None]
    if (
        num_heads < 1
        or window_size < 0
        or channels != 3 * num_heads * dim
        or dim < 2
        or dim % 2
        or [tuple(table_h.shape), tuple(table_w.shape)] != tables
        or (tuple(padding.shape) != (channels,) if padding is not None else sticks_out)
        or any(tensor.dtype != qkv.dtype or tensor.device.type != "cpu" for tensor in operands)
        or qkv.dtype not in PRECISIONS
    ):
        shapes = ", ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in operands)
        raise ValueError(
            f"The attention kernel cannot take {shapes} with {num_heads} heads in windows of {window_size}: it needs "
            "(B, H, W, 3 * C), padding (3 * C,) where windows stick out, and tables (2 * length - 1, C / heads), all "
            "float32, all bfloat16 or all float16, with an even C / heads."
        )


kernel_attention.register_fake(fake_attention)
register_flops("cpu_attention", attention_flop)
