"""
The encoder's maths as plain functions: position tables, decomposed relative positions, windows and attention.

Letters in shapes: B images, N heads, D channels per head, H and W the grid in patches, L the length of a relative
position table, Q and K the number of queries and keys (tokens of one window or of the whole grid).
"""

import importlib
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A bias of B x N x Q x K values is built for this many values at a time: 64 MB in float32.
MAX_BIAS_VALUES = 1 << 24
# Logits that exist at a time on the CPU: 8 MB in float32, those of a head and 512 queries at 1024 x 1024 px.
LOGITS_PER_CHUNK = 1 << 21


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
    channels_first = at_least_float32(pos_embed).permute(0, 3, 1, 2)
    resized = F.interpolate(channels_first, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return resized.to(pos_embed.dtype).permute(0, 2, 3, 1)


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


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, relative: tuple[Tensor, Tensor] | None) -> Tensor:
    """
    The same through PyTorch's scaled_dot_product_attention, a chunk of queries at a time, so that no more than
    `MAX_BIAS_VALUES` of the bias exist at once. Shapes as in `eager_attention`; returns (B, N, Q, D).
    """
    if relative is None:
        return F.scaled_dot_product_attention(query, key, value)
    rel_h, rel_w = relative
    queries = query.shape[2]
    # A compiled or exported graph has chunks for one image, so that its batch can stay free.
    images = 1 if torch.compiler.is_compiling() else query.shape[0]
    values_per_query = images * query.shape[1] * key.shape[2]
    chunk = max(1, MAX_BIAS_VALUES // values_per_query)
    if chunk >= queries:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=relative_bias(rel_h, rel_w))
    chunks = [
        F.scaled_dot_product_attention(
            query[:, :, start : start + chunk],
            key,
            value,
            attn_mask=relative_bias(rel_h[:, :, start : start + chunk], rel_w[:, :, start : start + chunk]),
        )
        for start in range(0, queries, chunk)
    ]
    return torch.cat(chunks, dim=2)


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
    # Not at the top: torch 2.4 has none.
    return importlib.import_module("torch.nn.attention.flex_attention").flex_attention


@cache
def _compiled_flex_attention() -> Any:
    # A kernel for each size: one for any size would be slower. In a model that is compiled as a whole, this is inlined.
    return torch.compile(_flex_attention(), dynamic=False)


def cpu_inference_attention(
    query: Tensor, key: Tensor, value: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]
) -> Tensor:
    """
    Attention over a whole grid on the CPU, for inference: a head and a few hundred queries at a time, in one buffer.

    The bias is written into the buffer by broadcasting, the matrix product added to it, and the softmax taken in
    place, so that no more than LOGITS_PER_CHUNK of them ever exist. `query`, `key`, `value` are (B, N, Q, D) with
    any strides; `rel_pos_h` and `rel_pos_w` are the tables. Returns (B, Q, N, D), contiguous.
    """
    batch, heads, queries, dim = query.shape
    height, width = grid
    table_h = relative_positions(rel_pos_h, height).transpose(1, 2)  # (H, D, H)
    table_w = relative_positions(rel_pos_w, width).transpose(1, 2)  # (W, D, W)
    attended = query.new_empty(batch, queries, heads, dim)
    queries_per_chunk = min(queries, max(1, LOGITS_PER_CHUNK // (height * width)))
    buffer = query.new_empty(queries_per_chunk, height, width)
    for image in range(batch):
        for head in range(heads):
            # (Q, D), (K, D) and (K, D); read many times each, so rows that lie together repay the copy.
            q, k, v = (part[image, head].contiguous() for part in (query, key, value))
            by_row = q.unflatten(0, grid)  # (H, W, D)
            rel_h = (by_row @ table_h).flatten(0, 1)  # (Q, H)
            rel_w = (by_row.transpose(0, 1) @ table_w).transpose(0, 1).flatten(0, 1)  # (Q, W)
            for start in range(0, queries, queries_per_chunk):
                chunk = slice(start, min(start + queries_per_chunk, queries))
                bias = buffer[: chunk.stop - chunk.start]
                torch.add(rel_h[chunk, :, None], rel_w[chunk, None, :], out=bias)
                logits = bias.flatten(1)
                torch.addmm(logits, q[chunk], k.T, alpha=dim**-0.5, out=logits)
                torch.softmax(logits, dim=-1, out=logits)
                torch.mm(logits, v, out=attended[image, chunk, head])
    return attended


def window_partition(hidden: Tensor, window: int, padding: Tensor) -> Tensor:
    """
    Cuts (B, H, W, C) into windows (B * windows, window, window, C), row by row, after padding the bottom and right
    with `padding` (C,) up to whole windows (ViTDet, arXiv 2203.16527).
    """
    batch, height, width, channels = hidden.shape
    right, bottom = -width % window, -height % window
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
