"""Feature maps as pictures, and what there is to see in them: similarities and attention of a cell."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..attention import at_least_float32, relative_positions
from ..image_geometry import ImagePlace, Region, Size

Cell = tuple[int, int]  # row, column

# Dark to light over blue, red and yellow, and evenly so for the eye.
HEAT_COLORS = [(13, 8, 60), (84, 15, 109), (158, 42, 99), (219, 80, 59), (249, 149, 24), (252, 235, 120)]
MARK_COLOR = (0, 190, 255)
INK = (40, 40, 48)


def pca_to_rgb(features: Tensor) -> Tensor:
    """
    Reduces a feature map (C, h, w) to its three principal components as colours: (3, h, w), uint8. Each component is
    stretched so that all but its lowest and highest 2 % lie within 0..255.

    The sign of each component, which PCA leaves open, is chosen so that its largest value is positive: the same
    features always give the same colours.
    """
    channels, height, width = features.shape
    cells = features.detach().to("cpu", torch.float64).reshape(channels, -1).T  # (h * w, C)
    cells = cells - cells.mean(dim=0)
    left, scale, _ = torch.linalg.svd(cells, full_matrices=False)
    components = torch.zeros(cells.shape[0], 3, dtype=torch.float64)
    count = min(3, scale.shape[0])
    components[:, :count] = left[:, :count] * scale[:count]
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)
    low, high = components.quantile(torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    spread = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    colors = ((components - low) / spread).clamp(0, 1) * 255
    return colors.round().to(torch.uint8).T.reshape(3, height, width)


def valid_cells(valid_region: Region, stride: int) -> tuple[slice, slice]:
    """The rows and columns of cells, `stride` px each, that `valid_region` touches, in px of the canvas."""
    return ImagePlace(valid_region[2:], valid_region).cells(stride)


def cells_over_page(cells: Image.Image, valid_region: Region, stride: int) -> Image.Image:
    """The picture of all valid cells, a pixel each, in the size of `valid_region`: every cell where it lies."""
    top, left, height, width = valid_region
    rows, columns = valid_cells(valid_region, stride)
    cells = cells.resize((cells.width * stride, cells.height * stride), Image.Resampling.NEAREST)
    # Whole cells cover a little more than the page where it ends inside one: cut that off, to keep cells in place.
    offset_top, offset_left = top - rows.start * stride, left - columns.start * stride
    return cells.crop((offset_left, offset_top, offset_left + width, offset_top + height))


def pca_over_page(features: Tensor, valid_region: Region, stride: int) -> Image.Image:
    """The feature map (C, h, w) in PCA colours, without padding, in the size of `valid_region`."""
    rows, columns = valid_cells(valid_region, stride)
    colors = pca_to_rgb(features[:, rows, columns]).permute(1, 2, 0).numpy()
    return cells_over_page(Image.fromarray(colors), valid_region, stride)


def page_beside_features(page: Image.Image, features: Tensor, valid_region: Region, stride: int) -> Image.Image:
    """
    A picture of the page at the left and its feature map (C, h, w) in PCA colours at the right, equally large.

    The feature map is cropped to the cells that `valid_region` touches, in px of the canvas; `stride` is the side of
    a cell in px.
    """
    _, _, height, width = valid_region
    gap_px = max(8, width // 50)
    picture = Image.new("RGB", (2 * width + gap_px, height), (255, 255, 255))
    picture.paste(page.resize((width, height), Image.Resampling.BICUBIC), (0, 0))
    picture.paste(pca_over_page(features, valid_region, stride), (width + gap_px, 0))
    return picture


def cell_at(point: tuple[float, float], original_size: Size, valid_region: Region, stride: int) -> Cell:
    """
    The cell that shows the point (y, x), in px of the original image.

    Raises:
        ValueError: If the point lies outside of the image.
    """
    return ImagePlace(original_size, valid_region).cell_at(*point, stride)


def similarity_to_cell(features: Tensor, cell: Cell, valid_region: Region, stride: int) -> Tensor:
    """
    Cosine similarities (h, w), -1 to 1, of all cells of a feature map (C, h, w) to one, float32.

    The mean over the cells of the page is taken off first: what all cells have in common would make all alike.
    """
    rows, columns = valid_cells(valid_region, stride)
    features = features.float()
    features = features - features[:, rows, columns].mean(dim=(1, 2), keepdim=True)
    return F.cosine_similarity(features, features[:, cell[0], cell[1], None, None], dim=0)


@torch.no_grad()
def attention_of_cell(block: Any, hidden: Tensor, cell: Cell) -> Tensor:
    """
    The attention weights (heads, H, W) of one query, `cell`, in a block whose input is `hidden` (1, H, W, C): over the
    whole grid, in a windowed block 0 outside of the query's window. Only this row of the weights is computed.

    In a window that sticks out of the grid some weight is on padding, and the rest sums to less than 1.
    """
    attention, window = block.attn, block.window_size
    height, width = hidden.shape[1:3]
    top, left = (cell[0] // window * window, cell[1] // window * window) if window else (0, 0)
    rows, columns = (window, window) if window else (height, width)
    tokens = block.norm1(hidden[:, top : top + rows, left : left + columns])
    inside = tokens.shape[1:3]
    tokens = F.pad(tokens, (0, 0, 0, columns - inside[1], 0, rows - inside[0]))  # padding is zeros after the norm
    by_head = attention.qkv(tokens)[0].reshape(rows, columns, 3, attention.num_heads, -1)
    row, column = cell[0] - top, cell[1] - left
    query = at_least_float32(by_head[row, column, 0])  # (heads, D)
    key = at_least_float32(by_head[:, :, 1])  # (rows, columns, heads, D)
    logits = torch.einsum("nd,hwnd->nhw", query * query.shape[-1] ** -0.5, key)
    if attention.use_rel_pos:
        by_row = at_least_float32(relative_positions(attention.rel_pos_h, rows)[row])
        by_column = at_least_float32(relative_positions(attention.rel_pos_w, columns)[column])
        logits = logits + (query @ by_row.T)[:, :, None] + (query @ by_column.T)[:, None, :]
    weights = logits.flatten(1).softmax(dim=1).view_as(logits)
    whole = weights.new_zeros(weights.shape[0], height, width)
    whole[:, top : top + inside[0], left : left + inside[1]] = weights[:, : inside[0], : inside[1]]
    return whole


def heat_over_page(
    page: Image.Image, values: Tensor, valid_region: Region, stride: int, low: float, high: float
) -> Image.Image:
    """
    The page with a map of values (h, w) laid over it, dark at `low` and light at `high`, in the size of
    `valid_region`. The page stays legible: it sets the light, the values the colour.
    """
    rows, columns = valid_cells(valid_region, stride)
    share = ((values[rows, columns].float().cpu() - low) / max(high - low, 1e-12)).clamp(0, 1).numpy()
    stops = np.linspace(0, 1, len(HEAT_COLORS))
    colors = np.stack([np.interp(share, stops, channel) for channel in np.array(HEAT_COLORS).T], axis=-1)
    heat = cells_over_page(Image.fromarray(colors.round().astype(np.uint8)), valid_region, stride)
    below = page.convert("L").resize(heat.size, Image.Resampling.BICUBIC).convert("RGB")
    return Image.blend(below, heat, 0.62)


def mark_cell(picture: Image.Image, cell: Cell, valid_region: Region, stride: int) -> None:
    """Draws a frame around a cell into a picture in the size of `valid_region`."""
    top, left = cell[0] * stride - valid_region[0], cell[1] * stride - valid_region[1]
    ImageDraw.Draw(picture).rectangle((left - 3, top - 3, left + stride + 2, top + stride + 2), None, MARK_COLOR, 3)


def sheet(panels: list[tuple[str, Image.Image]], columns: int, panel_width_px: int) -> Image.Image:
    """Pictures of one size with a caption above each, side by side in rows of `columns`."""
    gap_px, caption_px = 14, 26
    font = ImageFont.load_default(16)
    first = panels[0][1]
    size = (panel_width_px, max(1, round(panel_width_px * first.height / first.width)))
    step = (size[0] + gap_px, size[1] + gap_px + caption_px)
    lines = -(-len(panels) // columns)
    picture = Image.new("RGB", (min(columns, len(panels)) * step[0] + gap_px, lines * step[1] + gap_px), "white")
    draw = ImageDraw.Draw(picture)
    for index, (caption, panel) in enumerate(panels):
        left, top = gap_px + index % columns * step[0], gap_px + index // columns * step[1]
        draw.text((left, top), caption, INK, font)
        picture.paste(panel.resize(size, Image.Resampling.LANCZOS), (left, top + caption_px))
    return picture
