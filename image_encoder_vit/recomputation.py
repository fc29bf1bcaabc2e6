"""
What training keeps for its backward pass, and what it computes again instead: attention without its logits and their
bias, an MLP without the output of its GELU, and linear layers without the output of the norm before them. Linear layers
go through oneDNN on the CPU, in both passes.

Letters in shapes: B images or windows, N heads, D channels per head, Q and K the number of queries and keys, which lie
on a grid of H rows and W columns.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_weight

# Logits that exist at a time: 8 MB in float32 on the CPU, where they stay in its cache; 256 MB elsewhere.
LOGITS_PER_CHUNK_ON_CPU = 1 << 21
LOGITS_PER_CHUNK = 1 << 26


def recomputed_attention(query: Tensor, key: Tensor, value: Tensor, table_h: Tensor, table_w: Tensor) -> Tensor:
    """
    Attention (B, N, Q, D) whose logits and bias exist a chunk at a time, in the forward and in the backward pass.

    `query`, `key`, `value` are (B, N, Q, D); `table_h` (2 * H - 1, D) and `table_w` (2 * W - 1, D) the tables of
    relative positions for a grid of H x W = Q patches. Lower precisions are computed in float32, as PyTorch's own
    attention with a bias to learn does.
    """
    height, width = (len(table_h) + 1) // 2, (len(table_w) + 1) // 2
    flat = (part.flatten(0, 1) for part in (query, key, value))
    with _without_autocast(query):
        tables = joined_tables(table_h, table_w).to(torch.promote_types(query.dtype, torch.float32))
        attended: Tensor = _RecomputedAttention.apply(*flat, tables, height, width)
    return attended.unflatten(0, query.shape[:2])


def joined_tables(table_h: Tensor, table_w: Tensor) -> Tensor:
    """Both tables one below the other, (2 * H - 1 + 2 * W - 1, D), each from its last offset to its first."""
    return torch.cat([table_h.flip(0), table_w.flip(0)])


def relative_parts(products: Tensor, height: int, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """
    The two parts of the bias as views of the products (N, h, W, offsets) of some rows of queries with `joined_tables`:
    by key row (N, h, W, H) and by key column (N, h, W, W). The queries are those from row `first_row` of the grid on.

    The key in row k lies k - h rows below a query in row h. So what a query needs are H products in turn, beginning
    one offset earlier than those of the query in the row above.
    """
    heads, rows, width, _ = products.shape
    head, row, column, _ = products.stride()
    start_h = products.storage_offset() + height - 1 - first_row
    start_w = products.storage_offset() + 2 * height - 1 + width - 1
    by_row = products.as_strided((heads, rows, width, height), (head, row - 1, column, 1), start_h)
    by_column = products.as_strided((heads, rows, width, width), (head, row, column - 1, 1), start_w)
    return by_row, by_column


class _RecomputedAttention(torch.autograd.Function):
    """
    As FlashAttention (arXiv 2205.14135) does, it makes the weights of a chunk again when their gradients are due, and
    keeps nothing of them. Shapes with one axis M for B and N.
    """

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, tables: Tensor, height: int, width: int) -> Tensor:
        dtype = tables.dtype
        attended = torch.empty_like(query, memory_format=torch.contiguous_format)
        for heads, rows in _chunks(query, width):
            k, v = key[heads].to(dtype), value[heads].to(dtype)
            logits = _logits(query[heads, rows].to(dtype), k, tables, height, rows.start // width)
            attended[heads, rows] = torch.bmm(torch.softmax(logits, dim=2, out=logits), v).to(attended.dtype)
        return attended

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.height, ctx.width = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, tables = ctx.saved_tensors
        gradients: tuple[Tensor | None, ...]
        with _without_autocast(grad):
            if torch.is_grad_enabled():  # The gradients are to be differentiated again.
                gradients = _differentiable_gradients(grad, query, key, value, tables, ctx.height)
            else:
                gradients = _gradients(grad, query, key, value, tables, ctx.height, ctx.width)
        return *gradients, None, None


def _without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """The precision of each step is chosen here."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _chunks(query: Tensor, width: int) -> Iterator[tuple[slice, slice]]:
    """Some heads, or whole rows of the grid of a head's queries, at a time, so that not too many logits are at once."""
    limit = LOGITS_PER_CHUNK_ON_CPU if query.device.type == "cpu" else LOGITS_PER_CHUNK
    total_heads, queries, _ = query.shape
    heads = max(1, limit // queries**2)
    step = queries if heads > 1 else max(1, limit // (queries * width)) * width
    for first in range(0, total_heads, heads):
        for start in range(0, queries, step):
            yield slice(first, first + heads), slice(start, start + step)


def _logits(query: Tensor, key: Tensor, tables: Tensor, height: int, first_row: int = 0) -> Tensor:
    """The logits (M, Q, K) of the queries from row `first_row` of the grid on, in an array of their own."""
    heads, _, dim = query.shape
    width = key.shape[1] // height
    products = (query.flatten(0, 1) @ tables.T).view(heads, -1, width, len(tables))
    by_row, by_column = relative_parts(products, height, first_row)
    bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(3).flatten(1, 2)
    return bias.baddbmm_(query, key.transpose(1, 2), alpha=dim**-0.5)


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, tables: Tensor, height: int, width: int
) -> tuple[Tensor, ...]:
    """The gradients of queries, keys, values and tables, a chunk of the weights at a time."""
    dtype, scale = tables.dtype, query.shape[2] ** -0.5
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    # Sums over chunks of queries, so in full precision.
    grad_key, grad_value, grad_tables = (
        torch.zeros(part.shape, dtype=dtype, device=part.device) for part in (key, value, tables)
    )
    for heads, rows in _chunks(query, width):
        q, k, v = query[heads, rows].to(dtype), key[heads].to(dtype), value[heads].to(dtype)
        g, first_row = grad[heads, rows].to(dtype), rows.start // width
        logits = _logits(q, k, tables, height, first_row)
        weights = torch.softmax(logits, dim=2, out=logits)
        grad_value[heads].baddbmm_(weights.transpose(1, 2), g)
        grad_weights = torch.bmm(g, v.transpose(1, 2))
        grad_logits = torch.ops.aten._softmax_backward_data(grad_weights, weights, 2, dtype)
        grad_key[heads].baddbmm_(grad_logits.transpose(1, 2), q, alpha=scale)
        by_place = grad_logits.view(len(q), -1, width, height, width)
        grad_products = q.new_zeros(*by_place.shape[:3], len(tables))
        by_row, by_column = relative_parts(grad_products, height, first_row)
        by_row.copy_(by_place.sum(dim=4))
        by_column.copy_(by_place.sum(dim=3))
        grad_tables.addmm_(grad_products.flatten(0, 2).T, q.flatten(0, 1))
        of_products = (grad_products.flatten(0, 2) @ tables).view_as(q)
        grad_query[heads, rows] = of_products.baddbmm_(grad_logits, k, alpha=scale).to(query.dtype)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_tables


def _differentiable_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, tables: Tensor, height: int
) -> tuple[Tensor | None, ...]:
    """The gradients as a graph of their own, with all logits at once."""
    dtype = tables.dtype
    weights = _logits(query.to(dtype), key.to(dtype), tables, height).softmax(dim=2)
    attended = (weights @ value.to(dtype)).to(query.dtype)
    inputs = (query, key, value, tables)
    trained = [part for part in inputs if part.requires_grad]
    gradients = iter(torch.autograd.grad(attended, trained, grad, create_graph=True))
    return tuple(next(gradients) if part.requires_grad else None for part in inputs)


def is_trained(tensors: Iterable[Tensor | None]) -> bool:
    """
    Whether autograd, and nothing else, keeps what a backward pass through some of these needs: no compiler, which
    chooses that by itself, no trace, no forward-mode derivative and no transformation of torch.func.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def fits_trained_linear(input: Tensor, weight: Tensor) -> bool:
    """Whether `trained_linear` computes a layer with this input faster than PyTorch's own linear layer does."""
    return (
        is_trained((input, weight))
        and input.device.type == "cpu"
        and input.ndim == 4
        and type(weight) in (Tensor, torch.nn.Parameter)
        and input.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def trained_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """
    A linear layer over the channels of (B, H, W, C), in training on the CPU: as a 1 x 1 convolution, which PyTorch
    computes by oneDNN in both passes, where it takes another, slower library for linear layers in float32.
    """
    images = input.permute(0, 3, 1, 2)  # Channels last in memory, as oneDNN wants them.
    return F.conv2d(images, weight[:, :, None, None], bias).permute(0, 2, 3, 1)


def gelu_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """
    The exact GELU of (B, H, W, C) and a linear layer, for training: the GELU's output is not kept but made again. In
    the precision of `input`, as under autocast.
    """
    bias = None if bias is None else bias.to(input.dtype)
    output: Tensor = _GeluLinear.apply(input, weight.to(input.dtype), bias)
    return output


class _GeluLinear(torch.autograd.Function):
    """Its gradients consist of differentiable operations alone, so that they can be differentiated again."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _linear(F.gelu(input), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        grad_input = grad_weight = None
        if needs_input:
            grad_input = torch.ops.aten.gelu_backward(_linear(grad, weight.T, None), input)
        if needs_weight:
            grad_weight = _weight_gradient(F.gelu(input), weight, grad)
        return grad_input, grad_weight, grad.sum(dim=(0, 1, 2)) if needs_bias else None


def norm_linear(input: Tensor, norm: nn.LayerNorm, layer: nn.Linear) -> Tensor:
    """
    `layer` of `norm` of (B, H, W, C), for training: the norm's output is not kept but made again. In the precision of
    autocast where that is on.
    """
    device = input.device.type
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    is_double = torch.float64 in (input.dtype, layer.weight.dtype)  # Autocast leaves that alone.
    dtype = torch.get_autocast_dtype(device) if is_autocast and not is_double else layer.weight.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    input = input.to(torch.promote_types(input.dtype, norm.weight.dtype))  # Autocast would compute a norm so too.
    with _without_autocast(input):
        output: Tensor = _NormLinear.apply(input, norm.weight, norm.bias, layer.weight.to(dtype), bias, norm.eps)
    return output


class _NormLinear(torch.autograd.Function):
    """Of differentiable operations alone, likewise."""

    @staticmethod
    def forward(input: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        normed = F.layer_norm(input, input.shape[-1:], scale, shift, eps)
        return _linear(normed.to(weight.dtype), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.eps = inputs[5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, scale, shift, weight = ctx.saved_tensors
        *needs_norm, needs_weight, needs_bias, _ = ctx.needs_input_grad
        channels = input.shape[-1:]
        with _without_autocast(grad):
            normed, mean, deviation = torch.native_layer_norm(input, channels, scale, shift, ctx.eps)
            grad_weight = _weight_gradient(normed.to(weight.dtype), weight, grad) if needs_weight else None
            of_norm: tuple[Tensor | None, ...] = (None, None, None)
            if any(needs_norm):
                grad_normed = _linear(grad, weight.T, None).to(normed.dtype)
                of_norm = torch.ops.aten.native_layer_norm_backward(
                    grad_normed, input, channels, mean, deviation, scale, shift, needs_norm
                )
        return *of_norm, grad_weight, grad.sum(dim=(0, 1, 2)) if needs_bias else None, None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if input.device.type == "cpu" and input.dtype == torch.float32:
        return trained_linear(input, weight, bias)
    return F.linear(input, weight, bias)


def _weight_gradient(input: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """Of a linear layer over the last axis, from its input and the gradient of its output."""
    if input.device.type == "cpu" and input.dtype == torch.float32:
        images, gradients = input.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
        shape = (*weight.shape, 1, 1)
        return conv2d_weight(images, shape, gradients)[:, :, 0, 0]
    return grad.flatten(0, 2).T @ input.flatten(0, 2)
