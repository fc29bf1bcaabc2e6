"""
The encoder once more, slow and obvious: loops over pixels, windows, heads, queries and keys, in float64. And the rest
of the DeepEncoder likewise: CLIP's tower, the projector and the layout of the tokens.

Written from the papers (Segment Anything, MViTv2, ViTDet, CLIP, DeepSeek-OCR), independent of the package's code. One
image at a time, channels last: (H, W, C).
"""

import math

import torch
from torch import Tensor

EPS = 1e-6
CLIP_EPS = 1e-5


def patch_embed(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(3, height, width) px to (H, W, C): one dot product a patch and channel."""
    size = weight.shape[2]
    rows, columns = image.shape[1] // size, image.shape[2] // size
    grid = torch.zeros(rows, columns, weight.shape[0], dtype=image.dtype)
    for row in range(rows):
        for column in range(columns):
            patch = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            grid[row, column] = (weight * patch).sum(dim=(1, 2, 3)) + bias
    return grid


def cubic(distance: float) -> float:
    """Keys' cubic kernel with a = -0.5, the one that antialiased resizing uses."""
    a, x = -0.5, abs(distance)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def resize_axis(values: Tensor, length: int) -> Tensor:
    """Antialiased bicubic resize of dimension 0, half-pixel centres."""
    before = values.shape[0]
    if before == length:
        return values
    scale = before / length
    stretch = max(scale, 1.0)
    resized = torch.zeros(length, *values.shape[1:], dtype=values.dtype)
    for target in range(length):
        center = (target + 0.5) * scale
        weights = [cubic((source + 0.5 - center) / stretch) for source in range(before)]
        total = sum(weights)
        for source, weight in enumerate(weights):
            resized[target] += weight / total * values[source]
    return resized


def add_positions(grid: Tensor, pos_embed: Tensor) -> Tensor:
    table = resize_axis(pos_embed[0], grid.shape[0])
    return grid + resize_axis(table.transpose(0, 1), grid.shape[1]).transpose(0, 1)


def offset_vector(table: Tensor, length: int, offset: int) -> Tensor:
    """The relative position vector of `offset` = q - k in a table resized linearly to 2 * length - 1 entries."""
    entries = 2 * length - 1
    at = (offset + length - 1 + 0.5) * table.shape[0] / entries - 0.5
    at = min(max(at, 0.0), table.shape[0] - 1.0)
    low = math.floor(at)
    high = min(low + 1, table.shape[0] - 1)
    return table[low] + (at - low) * (table[high] - table[low])


def layer_norm(values: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """Over the last dimension."""
    centered = values - values.mean(dim=-1, keepdim=True)
    variance = (centered**2).mean(dim=-1, keepdim=True)
    return centered / torch.sqrt(variance + eps) * weight + bias


def attention(grid: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    """Over one window, or the whole grid: every query with every key."""
    height, width, channels = grid.shape
    dim = channels // heads
    qkv = grid @ weights["qkv.weight"].T + weights.get("qkv.bias", torch.zeros(3 * channels, dtype=grid.dtype))
    query, key, value = qkv.reshape(height, width, 3, heads, dim).unbind(2)
    attended = torch.zeros(height, width, heads, dim, dtype=grid.dtype)
    places = [(row, column) for row in range(height) for column in range(width)]
    for head in range(heads):
        for row, column in places:
            q = query[row, column, head]
            logits = []
            for key_row, key_column in places:
                logit = (q @ key[key_row, key_column, head]) / math.sqrt(dim)
                if "rel_pos_h" in weights:
                    logit = logit + q @ offset_vector(weights["rel_pos_h"], height, row - key_row)
                    logit = logit + q @ offset_vector(weights["rel_pos_w"], width, column - key_column)
                logits.append(logit)
            probabilities = torch.softmax(torch.stack(logits), dim=0)
            attended[row, column, head] = probabilities @ value[:, :, head].reshape(-1, dim)
    return attended.reshape(height, width, channels) @ weights["proj.weight"].T + weights["proj.bias"]


def windowed_attention(grid: Tensor, weights: dict[str, Tensor], heads: int, window: int) -> Tensor:
    """Attention window by window; a window that sticks out is filled up with zeros, which take part."""
    height, width, channels = grid.shape
    output = torch.zeros_like(grid)
    for top in range(0, height, window):
        for left in range(0, width, window):
            cut = grid[top : top + window, left : left + window]
            padded = torch.zeros(window, window, channels, dtype=grid.dtype)
            padded[: cut.shape[0], : cut.shape[1]] = cut
            attended = attention(padded, weights, heads)
            output[top : top + window, left : left + window] = attended[: cut.shape[0], : cut.shape[1]]
    return output


def gelu(values: Tensor) -> Tensor:
    return values * 0.5 * (1 + torch.erf(values / math.sqrt(2)))


def block(grid: Tensor, weights: dict[str, Tensor], heads: int, window: int) -> Tensor:
    """One transformer block; `window` 0 attends over the whole grid."""
    attn = {name.removeprefix("attn."): value for name, value in weights.items() if name.startswith("attn.")}
    normed = layer_norm(grid, weights["norm1.weight"], weights["norm1.bias"])
    grid = grid + (windowed_attention(normed, attn, heads, window) if window else attention(normed, attn, heads))
    normed = layer_norm(grid, weights["norm2.weight"], weights["norm2.bias"])
    hidden = gelu(normed @ weights["mlp.lin1.weight"].T + weights["mlp.lin1.bias"])
    return grid + hidden @ weights["mlp.lin2.weight"].T + weights["mlp.lin2.bias"]


def convolve(grid: Tensor, weight: Tensor, stride: int) -> Tensor:
    """3 x 3 convolution of (H, W, C) with zero padding of 1, tap by tap."""
    height, width, channels = grid.shape
    padded = torch.zeros(height + 2, width + 2, channels, dtype=grid.dtype)
    padded[1:-1, 1:-1] = grid
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    output = torch.zeros(rows, columns, weight.shape[0], dtype=grid.dtype)
    for row in range(rows):
        for column in range(columns):
            for y in range(3):
                for x in range(3):
                    output[row, column] += weight[:, :, y, x] @ padded[row * stride + y, column * stride + x]
    return output


def neck(grid: Tensor, weights: dict[str, Tensor]) -> Tensor:
    grid = grid @ weights["neck.0.weight"][:, :, 0, 0].T
    grid = layer_norm(grid, weights["neck.1.weight"], weights["neck.1.bias"])
    grid = convolve(grid, weights["neck.2.weight"], stride=1)
    return layer_norm(grid, weights["neck.3.weight"], weights["neck.3.bias"])


def encode(
    image: Tensor, weights: dict[str, Tensor], *, heads: int, window: int, global_attn_indexes: list[int]
) -> dict[str, Tensor]:
    """Every stage's output (H, W, C) by name, for one image (3, height, width) px and the published weight names."""
    stages = {"patch_embed": patch_embed(image, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"])}
    grid = stages["patch_embed"]
    if "pos_embed" in weights:
        grid = add_positions(grid, weights["pos_embed"])
    stages["positions"] = grid
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for index in range(depth):
        prefix = f"blocks.{index}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        grid = block(grid, own, heads, 0 if index in global_attn_indexes else window)
        stages[f"blocks.{index}"] = grid
    grid = neck(grid, weights)
    stages["neck"] = grid
    for name in ("net_2", "net_3"):
        if f"{name}.weight" in weights:
            grid = convolve(grid, weights[f"{name}.weight"], stride=2)
            stages[name] = grid
    return stages


def clip_positions(table: Tensor, height: int, width: int) -> Tensor:
    """The positions (1 + height * width, C) of the class token and, row by row, of a grid, from CLIP's table."""
    side = math.isqrt(table.shape[0] - 1)
    grid = table[1:].reshape(side, side, -1)
    by_row = resize_axis(grid, height)
    resized = resize_axis(by_row.transpose(0, 1), width).transpose(0, 1)
    return torch.cat([table[:1], resized.reshape(height * width, -1)])


def clip_attention(tokens: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    """Every token (Q, C) with every other, head by head."""
    count, channels = tokens.shape
    dim = channels // heads
    query, key, value = (
        (tokens @ weight.T + bias).reshape(count, heads, dim)
        for weight, bias in zip(weights["qkv_proj.weight"].chunk(3), weights["qkv_proj.bias"].chunk(3), strict=True)
    )
    attended = torch.zeros(count, heads, dim, dtype=tokens.dtype)
    for head in range(heads):
        for at in range(count):
            logits = torch.stack([query[at, head] @ key[other, head] / math.sqrt(dim) for other in range(count)])
            attended[at, head] = torch.softmax(logits, dim=0) @ value[:, head]
    return attended.reshape(count, channels) @ weights["out_proj.weight"].T + weights["out_proj.bias"]


def clip_block(tokens: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    attn = {name.removeprefix("self_attn."): value for name, value in weights.items() if name.startswith("self_attn.")}
    normed = layer_norm(tokens, weights["layer_norm1.weight"], weights["layer_norm1.bias"], CLIP_EPS)
    tokens = tokens + clip_attention(normed, attn, heads)
    normed = layer_norm(tokens, weights["layer_norm2.weight"], weights["layer_norm2.bias"], CLIP_EPS)
    hidden = normed @ weights["mlp.fc1.weight"].T + weights["mlp.fc1.bias"]
    hidden = hidden / (1 + torch.exp(-1.702 * hidden))
    return tokens + hidden @ weights["mlp.fc2.weight"].T + weights["mlp.fc2.bias"]


def clip(features: Tensor, weights: dict[str, Tensor], heads: int) -> list[Tensor]:
    """CLIP's tower on SAM's last map (h, w, C): the tokens (1 + h * w, C) after the first norm and after each block."""
    height, width, channels = features.shape
    tokens = torch.cat([weights["embeddings.class_embedding"][None], features.reshape(height * width, channels)])
    tokens = tokens + clip_positions(weights["embeddings.position_embedding.weight"], height, width)
    states = [layer_norm(tokens, weights["pre_layrnorm.weight"], weights["pre_layrnorm.bias"], CLIP_EPS)]
    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("transformer.layers."))
    for index in range(depth):
        prefix = f"transformer.layers.{index}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        states.append(clip_block(states[-1], own, heads))
    return states


def project(features: Tensor, clip_tokens: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Cells (h, w, D) from SAM's map (h, w, C) and CLIP's tokens, class token first: CLIP's channels before SAM's."""
    height, width, channels = features.shape
    both = torch.cat([clip_tokens[1:].reshape(height, width, channels), features], dim=2)
    return both @ weights["projector.layers.weight"].T + weights["projector.layers.bias"]


def token_sequence(view: Tensor, tiles: list[list[Tensor]], newline: Tensor, separator: Tensor) -> Tensor:
    """
    What the decoder reads: the cells (h, w, D) of the tiles, which lie in rows of tiles, line by line across all tiles
    of a row; those of the whole view line by line; a newline after each line and the separator at the end.
    """
    tokens = []
    for row_of_tiles in tiles:
        for line in range(row_of_tiles[0].shape[0]):
            for tile in row_of_tiles:
                tokens += list(tile[line])
            tokens.append(newline)
    for line in view:
        tokens += [*line, newline]
    return torch.stack([*tokens, separator])
