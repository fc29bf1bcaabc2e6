"""
What training keeps for its backward pass, and what it computes again instead: attention without its logits, and an MLP
without the output of its GELU. Linear layers go through oneDNN on the CPU, in both passes.

Letters in shapes: B images or windows, N heads, D channels per head, Q and K the number of queries and keys, which lie
on a grid of H rows and W columns.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_weight

# Logits that exist at a time: 8 MB in float32 on the CPU, where they stay in its cache; 256 MB elsewhere.
LOGITS_PER_CHUNK_ON_CPU = 1 << 21
LOGITS_PER_CHUNK = 1 << 26


def recomputed_attention(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """
    Attention (B, N, Q, D) whose logits exist a chunk at a time, in the forward and in the backward pass.

    `query`, `key`, `value` are (B, N, Q, D); `rel_h` (B, N, Q, H) and `rel_w` (B, N, Q, W) the two parts of the bias.
    Lower precisions are computed in float32, as PyTorch's own attention with a bias to learn does.
    """
    flat = (part.flatten(0, 1) for part in (query, key, value, rel_h, rel_w))
    with _without_autocast(query):
        attended: Tensor = _RecomputedAttention.apply(*flat)[0]
    return attended.unflatten(0, query.shape[:2])


class _RecomputedAttention(torch.autograd.Function):
    """
    As FlashAttention (arXiv 2205.14135) does: of the logits it keeps the logarithm of each row's sum of exponentials
    alone, and makes the weights of a chunk again when their gradients are due. Shapes with one axis M for B and N.
    """

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(query.dtype, torch.float32)
        attended = torch.empty_like(query, memory_format=torch.contiguous_format)
        normalizer = query.new_empty(query.shape[:2], dtype=dtype)
        for heads, rows in _chunks(query, key):
            k, v = key[heads].to(dtype), value[heads].to(dtype)
            logits = _logits(query[heads, rows], k, rel_h[heads, rows], rel_w[heads, rows])
            chunk = logits.logsumexp(dim=2)
            normalizer[heads, rows] = chunk
            attended[heads, rows] = torch.bmm(logits.sub_(chunk[..., None]).exp_(), v).to(attended.dtype)
        return attended, normalizer

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        query, key, value, rel_h, rel_w, normalizer = ctx.saved_tensors
        with _without_autocast(query):
            if torch.is_grad_enabled():  # The gradients are to be differentiated again.
                return _differentiable_gradients(grad, query, key, value, rel_h, rel_w)
            return _gradients(grad, query, key, value, rel_h, rel_w, normalizer)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """The precision of each step is chosen here."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor, normalizer: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of the five inputs, a chunk of the weights at a time."""
    dtype, scale = normalizer.dtype, query.shape[2] ** -0.5
    grad_query, grad_rel_h, grad_rel_w = (
        torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, rel_h, rel_w)
    )
    # Sums over chunks of queries, so in full precision.
    grad_key, grad_value = (torch.zeros(part.shape, dtype=dtype, device=part.device) for part in (key, value))
    for heads, rows in _chunks(query, key):
        q, k, v = query[heads, rows].to(dtype), key[heads].to(dtype), value[heads].to(dtype)
        g = grad[heads, rows].to(dtype)
        logits = _logits(q, k, rel_h[heads, rows], rel_w[heads, rows])
        weights = logits.sub_(normalizer[heads, rows, None]).exp_()
        grad_value[heads].baddbmm_(weights.transpose(1, 2), g)
        grad_logits = torch.bmm(g, v.transpose(1, 2))
        # The sum over a row of weights * grad_logits, without an array of the product.
        mean = torch.matmul(weights[:, :, None], grad_logits[..., None])[..., 0]
        grad_logits.sub_(mean).mul_(weights)
        grad_query[heads, rows] = torch.bmm(grad_logits, k).mul_(scale).to(query.dtype)
        grad_key[heads].baddbmm_(grad_logits.transpose(1, 2), q, alpha=scale)
        by_place = grad_logits.unflatten(2, (rel_h.shape[2], rel_w.shape[2]))
        grad_rel_h[heads, rows] = by_place.sum(dim=3).to(rel_h.dtype)
        grad_rel_w[heads, rows] = by_place.sum(dim=2).to(rel_w.dtype)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_rel_h, grad_rel_w


def _chunks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Some heads and some of their queries at a time, so that there are not too many logits at once."""
    limit = LOGITS_PER_CHUNK_ON_CPU if query.device.type == "cpu" else LOGITS_PER_CHUNK
    (total_heads, queries, _), keys = query.shape, key.shape[1]
    heads = max(1, limit // (queries * keys))
    rows = queries if heads > 1 else max(1, min(queries, limit // keys))
    for first in range(0, total_heads, heads):
        for start in range(0, queries, rows):
            yield slice(first, first + heads), slice(start, start + rows)


def _logits(query: Tensor, key: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """The logits (M, Q, K) of a chunk in the precision of `key`, in an array of their own."""
    dtype = key.dtype
    bias = (rel_h.to(dtype)[..., :, None] + rel_w.to(dtype)[..., None, :]).flatten(2)
    return bias.baddbmm_(query.to(dtype), key.transpose(1, 2), alpha=query.shape[2] ** -0.5)


def _differentiable_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor
) -> tuple[Tensor, ...]:
    """The gradients as a graph of their own, with all logits at once."""
    dtype, scale = torch.promote_types(query.dtype, torch.float32), query.shape[2] ** -0.5
    q, k, v, g = (part.to(dtype) for part in (query, key, value, grad))
    bias = (rel_h.to(dtype)[..., :, None] + rel_w.to(dtype)[..., None, :]).flatten(2)
    weights = (bias + scale * q @ k.transpose(1, 2)).softmax(dim=2)
    grad_weights = g @ v.transpose(1, 2)
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(dim=2, keepdim=True))
    by_place = grad_logits.unflatten(2, (rel_h.shape[2], rel_w.shape[2]))
    gradients = (
        scale * grad_logits @ k,
        scale * grad_logits.transpose(1, 2) @ q,
        weights.transpose(1, 2) @ g,
        by_place.sum(dim=3),
        by_place.sum(dim=2),
    )
    inputs = (query, key, value, rel_h, rel_w)
    return tuple(gradient.to(part.dtype) for gradient, part in zip(gradients, inputs, strict=True))


def is_trained(*tensors: Tensor | None) -> bool:
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
        is_trained(input, weight)
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
        input, weight, bias = inputs
        ctx.save_for_backward(input, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = torch.ops.aten.gelu_backward(_linear(grad, weight.T, None), input)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(F.gelu(input), weight, grad)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=(0, 1, 2))
        return grad_input, grad_weight, grad_bias


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
