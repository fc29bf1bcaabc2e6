"""
The encoder's maths as plain functions: position tables, decomposed relative positions, windows and attention.

Letters in shapes: B images, N heads, D channels per head, H and W the grid in patches, L the length of a relative
position table, Q and K the number of queries and keys (tokens of one window or of the whole grid).
"""

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .cpu_inference import chunked_attention, runs_in_float32, takes_cpu_path
from .cpu_kernel import has_attention_kernel, kernel_attention
from .recomputation import is_trained, recomputed_attention

# A bias of B x N x Q x K values is built for this many values at a time: 64 MB in float32.
MAX_BIAS_VALUES = 1 << 24


def at_least_float32(values: Tensor) -> Tensor:
    """Lower precisions as float32, for the steps that the published code computes in float32; others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """
    Resizes the absolute position table (1, H0, W0, C) to `grid` = (H, W), giving (1, H, W, C) in the table's dtype.

    Bicubic with antialiasing, computed in float32, as DeepSeek-OCR does (arXiv 2510.18234); theirs takes square grids
    only, here each axis is resized by itself.
    """
    if tuple(pos_embed.shape[1:3]) == tuple(grid):
        return pos_embed
    if takes_cpu_path(pos_embed) and not torch.is_autocast_enabled("cpu"):
        return resize_by_matrices(pos_embed, grid)
    channels_first = at_least_float32(pos_embed).permute(0, 3, 1, 2)
    resized = F.interpolate(channels_first, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return resized.to(pos_embed.dtype).permute(0, 2, 3, 1)


def resize_by_matrices(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """The same by a matrix product for each axis: several times faster where channels lie last in memory."""
    table = at_least_float32(pos_embed)[0]  # (H0, W0, C)
    by_height, by_width = (
        F.interpolate(
            torch.eye(before, dtype=table.dtype)[None, None],
            size=(after, before),
            mode="bicubic",
            antialias=True,
            align_corners=False,
        )[0, 0]
        for before, after in zip(table.shape[:2], grid, strict=True)
    )  # (H, H0) and (W, W0)
    rows = by_width @ table  # (H0, W, C)
    return (by_height @ rows.flatten(1)).unflatten(1, rows.shape[1:]).to(pos_embed.dtype)[None]


def resize_rel_pos(table: Tensor, length: int) -> Tensor:
    """
    Resizes a relative position table (L, D) for a side of `length` patches: (2 * length - 1, D), in its dtype. Linear,
    computed in float32 (MViTv2, arXiv 2112.01526).
    """
    offsets = 2 * length - 1
    if table.shape[0] == offsets:
        return table
    by_channel = at_least_float32(table).T[None]  # (1, D, L)
    return F.interpolate(by_channel, size=offsets, mode="linear", align_corners=False)[0].T.to(table.dtype)


def relative_positions(table: Tensor, length: int) -> Tensor:
    """
    Spreads a relative position table (L, D) into (length, length, D), where entry [q, k] belongs to the offset q - k.

    The table is resized when it was trained for another length.
    """
    table = resize_rel_pos(table, length)
    position = torch.arange(length, device=table.device)
    return table[position[:, None] - position[None, :] + (length - 1)]


def relative_logits(
    query: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """
    The two parts of the decomposed relative position bias: (B, N, Q, H) by key row and (B, N, Q, W) by key column.

    `query` (B, N, H * W, D) is the unscaled query. The bias of a query on the key in row h, column w is the sum of the
    two parts at h and w; the callers add it chunk by chunk, since whole it has Q x H x W values per head.
    """
    height, width = grid
    by_position = query.unflatten(2, (height, width))  # (B, N, H, W, D)
    rel_h = torch.einsum("bnhwd,hkd->bnhwk", by_position, relative_positions(rel_pos_h, height))
    rel_w = torch.einsum("bnhwd,wkd->bnhwk", by_position, relative_positions(rel_pos_w, width))
    return rel_h.flatten(2, 3), rel_w.flatten(2, 3)


def relative_bias(rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Adds the two parts of `relative_logits`, (B, N, Q, H) and (B, N, Q, W), up to the bias (B, N, Q, H * W)."""
    if rel_h.device.type == "cpu":  # The CPU adds short rows of low precision several times slower than float32.
        return (at_least_float32(rel_h)[..., :, None] + at_least_float32(rel_w)[..., None, :]).flatten(-2).to(rel_h)
    return (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, relative: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """
    Attention written out, softmax in float32. `query`, `key`, `value` are (B, N, Q, D); `relative` is what
    `relative_logits` gives. Returns the attended values (B, N, Q, D) and the attention weights (B, N, Q, K).
    """
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if relative is not None:
        logits = logits + relative_bias(*relative)
    weights = at_least_float32(logits).softmax(dim=-1).to(query.dtype)
    return weights @ value, weights


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, relative: tuple[Tensor, Tensor] | None, queries_per_chunk: int
) -> Tensor:
    """
    The same through PyTorch's scaled_dot_product_attention, `queries_per_chunk` at a time, so that no more of the bias
    exists at once. Shapes as in `eager_attention`; returns (B, N, Q, D).
    """
    if relative is None:
        return F.scaled_dot_product_attention(query, key, value)
    rel_h, rel_w = relative
    chunks = [slice(start, start + queries_per_chunk) for start in range(0, query.shape[2], queries_per_chunk)]
    attended = [
        F.scaled_dot_product_attention(
            query[:, :, chunk], key, value, attn_mask=relative_bias(rel_h[:, :, chunk], rel_w[:, :, chunk])
        )
        for chunk in chunks
    ]
    return attended[0] if len(attended) == 1 else torch.cat(attended, dim=2)


def flex_attention(query: Tensor, key: Tensor, value: Tensor, relative: tuple[Tensor, Tensor]) -> Tensor:
    """
    The same through PyTorch's FlexAttention (arXiv 2412.05496), whose kernel adds the two parts of the bias to each
    logit as it is computed: no bias exists, not even a chunk of it. Shapes as in `eager_attention`; returns
    (B, N, Q, D). On a GPU it is compiled at the first call; elsewhere it runs unfused, for comparison only.
    """
    rel_h, rel_w = relative
    width = rel_w.shape[-1]

    def add_relative_bias(score: Tensor, b: Tensor, n: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + rel_h[b, n, q, k // width] + rel_w[b, n, q, k % width]

    attend = _compiled_flex_attention() if query.device.type == "cuda" else _flex_attention()
    return attend(query, key, value, score_mod=add_relative_bias)


def _flex_attention() -> Any:
    # Not at the top: it imports much of the compiler.
    return importlib.import_module("torch.nn.attention.flex_attention").flex_attention


@cache
def _compiled_flex_attention() -> Any:
    # A kernel for each size: one for any size would be slower. In a model that is compiled as a whole, this is inlined.
    return torch.compile(_flex_attention(), dynamic=False)


class RelativeTables(NamedTuple):
    """A block's relative position tables, (L, D) each: along the height and the width of the page."""

    height: Tensor
    width: Tensor


def attend(
    qkv: Tensor,
    padding: Tensor | None,
    tables: RelativeTables | None,
    num_heads: int,
    window_size: int,
    implementation: str = "sdpa",
) -> tuple[Tensor, Tensor | None]:
    """
    Attention over a grid of queries, keys and values side by side, (B, H, W, 3 * C), as `choose_attention` says: the
    attended values (B, H, W, C) and, from eager attention, the weights (B * windows, N, Q, K).

    In windows of `window_size` patches, filled up with `padding` (3 * C,), or over the whole grid where that is 0.
    """
    height, width = qkv.shape[1:3]
    how, dtype = choose_attention(qkv, tables, num_heads, window_size, implementation)
    if how in ("kernel", "chunks"):
        assert tables is not None
        table_h = resize_rel_pos(tables.height, window_size or height)
        table_w = resize_rel_pos(tables.width, window_size or width)
        if how == "chunks":
            return chunked_attention(qkv, padding, table_h, table_w, num_heads, window_size), None
        padding = None if padding is None else padding.to(dtype)
        return kernel_attention(qkv, padding, table_h.to(dtype), table_w.to(dtype), num_heads, window_size), None
    if window_size:
        qkv = window_partition(qkv, window_size, padding)
    grid = qkv.shape[1], qkv.shape[2]
    by_head = qkv.flatten(1, 2).unflatten(2, (3, num_heads, -1))
    query, key, value = by_head.permute(2, 0, 3, 1, 4).unbind(0)  # (B, N, H * W, D) each
    query, key, value = (part.to(dtype) for part in (query, key, value))
    weights = None
    if how == "recomputed":
        assert tables is not None
        resized = (resize_rel_pos(*table) for table in zip(tables, grid, strict=True))
        attended = recomputed_attention(query, key, value, *resized)
    else:
        relative = None
        if tables is not None:
            relative = relative_logits(query, tables.height.to(dtype), tables.width.to(dtype), grid)
        if how == "eager":
            attended, weights = eager_attention(query, key, value, relative)
        elif how == "flex" and relative is not None:
            attended = flex_attention(query, key, value, relative)
        else:
            attended = sdpa_attention(query, key, value, relative, queries_per_chunk(query, implementation))
    attended = attended.transpose(1, 2).to(qkv.dtype)
    if implementation.startswith("export"):
        # Exporters lower the attention to steps whose result lies in memory otherwise: only a copy reshapes always.
        attended = attended.clone(memory_format=torch.contiguous_format)
    attended = attended.reshape(*qkv.shape[:3], -1)
    if window_size:
        attended = window_unpartition(attended, (height, width))
    return attended, weights if implementation == "eager" else None


def choose_attention(
    qkv: Tensor, tables: RelativeTables | None, num_heads: int, window_size: int, implementation: str
) -> tuple[str, torch.dtype]:
    """
    The one place that decides how attention is computed, and in which precision; all ways give the same.

    | way | when |
    |---|---|
    | "eager" | asked for, as only it has weights to return; and for forward-mode derivatives, which only it has |
    | "sdpa" | in graphs for other runtimes ("export", "export_chunked"), without positions |
    | "kernel" | `takes_cpu_path` and the kernel runs here; it sums in float32 |
    | "chunks" | `takes_cpu_path` without the kernel: over the whole grid, in float32 in windows too |
    | "flex" | asked for, over the whole grid; windows have too little bias for it |
    | "recomputed" | `is_trained`: PyTorch's own attention would keep all of the bias |
    | "sdpa" | all else |
    """
    if implementation == "eager" or forward_ad._current_level >= 0:
        return "eager", qkv.dtype
    if implementation in ("export", "export_chunked") or tables is None:
        return "sdpa", qkv.dtype
    if takes_cpu_path(qkv, *tables):
        head_dim = qkv.shape[3] // 3 // num_heads
        if head_dim % 2 == 0 and has_attention_kernel(qkv.dtype):  # Two values of bfloat16 make a word of the kernel's.
            return "kernel", qkv.dtype
        dtype = torch.float32 if runs_in_float32(qkv.dtype) else qkv.dtype
        # Windows in low precision would be less exact than they are through sdpa.
        is_exact = dtype in (torch.float32, torch.float64)
        return ("chunks" if is_exact or not window_size else "sdpa"), dtype
    if implementation == "flex_attention" and not window_size:
        return "flex", qkv.dtype
    return ("recomputed" if is_trained((qkv, *tables)) else "sdpa"), qkv.dtype


def queries_per_chunk(query: Tensor, implementation: str) -> int:
    """How many of the queries (B, N, Q, D) `sdpa_attention` takes at a time, for MAX_BIAS_VALUES of the bias."""
    batch, heads, queries, _ = query.shape
    if implementation == "export":
        return queries
    # A compiled or exported graph has chunks for one image, so that its batch can stay free.
    images = 1 if implementation == "export_chunked" or torch.compiler.is_compiling() else batch
    return min(queries, max(1, MAX_BIAS_VALUES // (images * heads * queries)))


def window_partition(hidden: Tensor, window: int, padding: Tensor | None) -> Tensor:
    """
    Cuts (B, H, W, C) into windows (B * windows, window, window, C), row by row, after padding the bottom and right
    with `padding` (C,), or with zeros where that is None, up to whole windows (ViTDet, arXiv 2203.16527).
    """
    batch, height, width, channels = hidden.shape
    right, bottom = -width % window, -height % window
    if padding is None:
        padding = hidden.new_zeros(channels)
    if right:
        hidden = torch.cat([hidden, padding.expand(batch, height, right, channels)], dim=2)
    if bottom:
        hidden = torch.cat([hidden, padding.expand(batch, bottom, width + right, channels)], dim=1)
    rows, columns = hidden.shape[1] // window, hidden.shape[2] // window
    hidden = hidden.reshape(batch, rows, window, columns, window, channels)
    return hidden.transpose(2, 3).reshape(batch * rows * columns, window, window, channels)


def window_unpartition(windows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Puts the windows of `window_partition` together again: (B, H, W, C) for `grid` = (H, W), padding dropped."""
    height, width = grid
    window, channels = windows.shape[1], windows.shape[3]
    rows, columns = -(-height // window), -(-width // window)
    hidden = windows.reshape(-1, rows, columns, window, window, channels).transpose(2, 3)
    return hidden.reshape(-1, rows * window, columns * window, channels)[:, :height, :width]
