"""Feature maps as pictures, and what there is to see in them: similarities and attention of a cell."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..attention import at_least_float32, relative_positions
from ..image_geometry import ImagePlace, Region, Size
from ..weights.layout_head import LayoutHead

Cell = tuple[int, int]  # row, column

# Dark to light over blue, red and yellow, and evenly so for the eye.
HEAT_COLORS = [(13, 8, 60), (84, 15, 109), (158, 42, 99), (219, 80, 59), (249, 149, 24), (252, 235, 120)]
MARK_COLOR = (0, 190, 255)
INK, GREY_INK, WARNING_COLOR = (40, 40, 48), (105, 105, 115), (190, 20, 40)
# Of the layout classes by name; others take the remaining ones in turn. None leaves the page as it is.
CLASS_COLORS: dict[str, tuple[int, int, int] | None] = {
    "paper": None,
    "outside": None,
    "text": (52, 101, 212),
    "heading": (230, 130, 20),
    "table": (24, 150, 82),
    "figure": (150, 72, 200),
    "photo": (212, 48, 60),
    "formula": (0, 165, 190),
}
MIN_INNER_CELLS = 4


class EncodedPage(NamedTuple):
    """A page, RGB, feature maps (C, h, w) after stages by name, and its place on a canvas of so many px."""

    name: str
    image: Image.Image
    stages: dict[str, Tensor]
    valid_region: Region
    canvas_px: Size

    def stride(self, stage: str) -> int:
        return round(self.canvas_px[1] / self.stages[stage].shape[2])

    def valid(self, stage: str) -> Tensor:
        """The cells (C, h, w) that touch the page."""
        rows, columns = valid_cells(self.valid_region, self.stride(stage))
        return self.stages[stage][:, rows, columns].detach().float().cpu()


class PcaBasis(NamedTuple):
    """
    The three directions (C, 3) in which cells differ most around their `mean` (C,), and the values `low` and `high`
    (3,) along them that become 0 and 255.
    """

    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor

    def colors(self, features: Tensor) -> Tensor:
        """The feature map (C, h, w) as colours (3, h, w), uint8."""
        cells = features.detach().to("cpu", torch.float64).flatten(1).T
        spread = (self.high - self.low).clamp(min=torch.finfo(torch.float64).tiny)
        colors = (((cells - self.mean) @ self.directions - self.low) / spread).clamp(0, 1) * 255
        return colors.round().to(torch.uint8).T.reshape(3, *features.shape[1:])


def pca_basis(cells: Tensor) -> PcaBasis:
    """
    The basis of cells (n, C). Each component is stretched so that all but its lowest and highest 2 % lie within 0 to
    255.

    The sign of each component, which PCA leaves open, is chosen so that its largest value is positive: the same
    features always give the same colours.
    """
    cells = cells.detach().to("cpu", torch.float64)
    mean = cells.mean(dim=0)
    centred = cells - mean
    _, _, found = torch.linalg.svd(centred, full_matrices=False)
    directions = torch.zeros(cells.shape[1], 3, dtype=torch.float64)
    count = min(3, len(found))
    directions[:, :count] = found[:count].T
    components = centred @ directions
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))[0]
    signs = torch.where(largest < 0, -1.0, 1.0).to(torch.float64)
    low, high = (components * signs).quantile(torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    return PcaBasis(mean, directions * signs, low, high)


def pca_to_rgb(features: Tensor) -> Tensor:
    """A feature map (C, h, w) in the colours (3, h, w), uint8, of its own three principal components."""
    return pca_basis(features.flatten(1).T).colors(features)


def inner_cells(features: Tensor, valid_region: Region, stride: int) -> Tensor:
    """
    The cells (n, C) of a feature map (C, h, w) that lie wholly on the page: those at its edge mix it with the padding,
    and would take colours for themselves. On a page of few cells all that touch it.
    """
    rows, columns = valid_cells(valid_region, stride)
    top, left, height, width = valid_region
    inner_rows = slice(-(-top // stride), (top + height) // stride)
    inner_columns = slice(-(-left // stride), (left + width) // stride)
    if min(inner_rows.stop - inner_rows.start, inner_columns.stop - inner_columns.start) >= MIN_INNER_CELLS:
        rows, columns = inner_rows, inner_columns
    return features[:, rows, columns].flatten(1).T


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


def common_basis(pages: Sequence[EncodedPage], stage: str) -> PcaBasis:
    """The PCA basis of a stage over all pages, so that a colour means the same on each."""
    cells = [inner_cells(page.stages[stage], page.valid_region, page.stride(stage)) for page in pages]
    return pca_basis(torch.cat(cells))


def pca_over_page(features: Tensor, valid_region: Region, stride: int, basis: PcaBasis | None = None) -> Image.Image:
    """
    The feature map (C, h, w) in PCA colours, without padding, in the size of `valid_region`: those of `basis`, or of
    the cells wholly on the page.
    """
    basis = basis or pca_basis(inner_cells(features, valid_region, stride))
    rows, columns = valid_cells(valid_region, stride)
    colors = basis.colors(features[:, rows, columns]).permute(1, 2, 0).numpy()
    return cells_over_page(Image.fromarray(colors), valid_region, stride)


def layout_over_page(
    page: Image.Image, features: Tensor, valid_region: Region, stride: int, head: LayoutHead
) -> Image.Image:
    """The page in grey with the layout class of each cell of a map (C, h, w) as a colour, in the size of the region."""
    rows, columns = valid_cells(valid_region, stride)
    classes = head.classify(features)[rows, columns].cpu().numpy()
    palette = np.array([color or (255, 255, 255) for color in class_colors(head.classes)], np.uint8)
    shown = np.array([0 if color is None else 150 for color in class_colors(head.classes)], np.uint8)
    cells = cells_over_page(Image.fromarray(palette[classes]), valid_region, stride)
    opacity = cells_over_page(Image.fromarray(shown[classes]), valid_region, stride)
    below = page.convert("L").resize(cells.size, Image.Resampling.BICUBIC).convert("RGB")
    return Image.composite(cells, below, opacity)


def class_colors(classes: Sequence[str]) -> list[tuple[int, int, int] | None]:
    """A colour for each class; None for those that leave the page as it is."""
    spare = [color for color in CLASS_COLORS.values() if color is not None]
    return [CLASS_COLORS.get(name, spare[number % len(spare)]) for number, name in enumerate(classes)]


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
    heat = cells_over_page(Image.fromarray(heat_colors(share)), valid_region, stride)
    below = page.convert("L").resize(heat.size, Image.Resampling.BICUBIC).convert("RGB")
    return Image.blend(below, heat, 0.62)


def mark_cell(picture: Image.Image, cell: Cell, valid_region: Region, stride: int) -> None:
    """Draws a frame around a cell into a picture in the size of `valid_region`."""
    top, left = cell[0] * stride - valid_region[0], cell[1] * stride - valid_region[1]
    ImageDraw.Draw(picture).rectangle((left - 3, top - 3, left + stride + 2, top + stride + 2), None, MARK_COLOR, 3)


class Heading(NamedTuple):
    """What a sheet says above its pictures: a title, what a colour means, and a warning in large letters."""

    title: str
    explanation: str = ""
    warning: str = ""


class Legend(NamedTuple):
    """What a sheet says below its pictures: classes with their colours, or a bar from a low to a high value."""

    classes: tuple[str, ...] = ()
    bar: tuple[str, str] | None = None


PCA_EXPLANATION = "PCA: places with alike features have alike colours (three main components as red, green, blue)."
LAYOUT_EXPLANATION = "Layout: what the sample's layout head takes each cell of 16 px for."


def overview(
    pages: Sequence[EncodedPage], stages: Sequence[str], head: LayoutHead | None, heading: Heading, panel_width_px: int
) -> Image.Image:
    """
    A row for each page: the page, its layout classes where there is a head, and `stages` in PCA colours, which mean the
    same on all pages.
    """
    bases = {stage: common_basis(pages, stage) for stage in stages}
    panels: list[tuple[str, Image.Image]] = []
    for page in pages:
        panels.append((page.name, shrunk(page)))
        if head is not None:
            panels.append(layout_panel(page, head))
        panels += [pca_panel(page, stage, bases[stage]) for stage in stages]
    explanation = f"{PCA_EXPLANATION} {LAYOUT_EXPLANATION}" if head else PCA_EXPLANATION
    heading = heading._replace(explanation=f"{explanation} {heading.explanation}")
    columns = len(panels) // len(pages)
    return sheet(panels, columns, panel_width_px, heading, Legend(head.classes) if head else None)


def shrunk(page: EncodedPage) -> Image.Image:
    """The page in the size in which the encoder saw it."""
    return page.image.resize((page.valid_region[3], page.valid_region[2]), Image.Resampling.LANCZOS)


def layout_panel(page: EncodedPage, head: LayoutHead) -> tuple[str, Image.Image]:
    stride = page.stride(head.stage)
    picture = layout_over_page(page.image, page.stages[head.stage], page.valid_region, stride, head)
    return "layout classes", picture


def pca_panel(page: EncodedPage, stage: str, basis: PcaBasis | None = None) -> tuple[str, Image.Image]:
    channels, height, width = page.stages[stage].shape
    picture = pca_over_page(page.stages[stage], page.valid_region, page.stride(stage), basis)
    return f"{stage}: {height} x {width} cells, {channels} ch.", picture


GAP_PX, CAPTION_PX = 14, 26
TITLE_SIZE_PX, TEXT_SIZE_PX, WARNING_SIZE_PX = 24, 16, 40
BAR_PX = 260


def sheet(
    panels: list[tuple[str, Image.Image]],
    columns: int,
    panel_width_px: int,
    heading: Heading | None = None,
    legend: Legend | None = None,
) -> Image.Image:
    """
    Pictures with a caption above each, side by side in rows of `columns`, all `panel_width_px` wide and a row as high
    as its highest; the heading above, the legend below.
    """
    font = ImageFont.load_default(TEXT_SIZE_PX)
    pictures = [
        picture.resize(
            (panel_width_px, max(1, round(panel_width_px * picture.height / picture.width))), Image.Resampling.LANCZOS
        )
        for _, picture in panels
    ]
    columns = min(columns, len(panels))
    width = columns * (panel_width_px + GAP_PX) + GAP_PX
    above = [] if heading is None else heading_lines(heading, width - 2 * GAP_PX)
    below = [] if legend is None else [legend]
    rows = [range(start, min(start + columns, len(panels))) for start in range(0, len(panels), columns)]
    row_heights = [max(pictures[index].height for index in row) + CAPTION_PX + GAP_PX for row in rows]
    head_px = GAP_PX + sum(size + size // 3 for _, size, _ in above) + (GAP_PX if above else 0)
    legend_px = (TEXT_SIZE_PX + 2 * GAP_PX) * len(below)
    whole = Image.new("RGB", (width, head_px + sum(row_heights) + legend_px), "white")
    draw = ImageDraw.Draw(whole)
    top = GAP_PX
    for text, size, color in above:
        draw.text((GAP_PX, top), text, color, ImageFont.load_default(size))
        top += size + size // 3
    top = head_px
    for row, row_height in zip(rows, row_heights, strict=True):
        for position, index in enumerate(row):
            left = GAP_PX + position * (panel_width_px + GAP_PX)
            draw.text((left, top), fitting(panels[index][0], font, panel_width_px), INK, font)
            whole.paste(pictures[index], (left, top + CAPTION_PX))
            frame = (
                left,
                top + CAPTION_PX,
                left + pictures[index].width - 1,
                top + CAPTION_PX + pictures[index].height - 1,
            )
            draw.rectangle(frame, None, (220, 220, 224))
        top += row_height
    for part in below:
        draw_legend(whole, draw, part, top + GAP_PX // 2)
    return whole


def heading_lines(heading: Heading, width_px: int) -> list[tuple[str, int, tuple[int, int, int]]]:
    """The lines of a heading: text, size in px, colour."""
    lines = [(line, TITLE_SIZE_PX, INK) for line in wrapped(heading.title, TITLE_SIZE_PX, width_px)]
    lines += [(line, WARNING_SIZE_PX, WARNING_COLOR) for line in wrapped(heading.warning, WARNING_SIZE_PX, width_px)]
    return lines + [(line, TEXT_SIZE_PX, GREY_INK) for line in wrapped(heading.explanation, TEXT_SIZE_PX, width_px)]


def wrapped(text: str, size_px: int, width_px: int) -> list[str]:
    """The text in lines that are no wider than this where its words allow it."""
    font = ImageFont.load_default(size_px)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width_px:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def fitting(text: str, font: Any, width_px: int) -> str:
    """The text, or its beginning if it is wider than this."""
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "...") > width_px:
        text = text[:-1]
    return text + "..."


def draw_legend(picture: Image.Image, draw: ImageDraw.ImageDraw, legend: Legend, top: int) -> None:
    """Draws it in one line from `top` on, as far as the picture is wide."""
    font = ImageFont.load_default(TEXT_SIZE_PX)
    left = float(GAP_PX)
    side = TEXT_SIZE_PX
    for name, color in zip(legend.classes, class_colors(legend.classes), strict=True):
        if color is None:
            continue
        draw.rectangle((left, top + 2, left + side, top + 2 + side), color)
        draw.text((left + side + 6, top), name, INK, font)
        left += side + 6 + font.getlength(name) + 18
    if legend.bar is not None:
        low, high = legend.bar
        draw.text((left, top), low, INK, font)
        left += font.getlength(low) + 8
        width = int(min(BAR_PX, max(8, picture.width - left - font.getlength(high) - 24)))
        shades = heat_colors(np.linspace(0, 1, width)[None].repeat(side, axis=0))
        picture.paste(Image.fromarray(shades), (int(left), top + 2))
        draw.text((left + width + 8, top), high, INK, font)


def heat_colors(shares: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Values of 0 to 1 (h, w) as colours from dark to light (h, w, 3), uint8."""
    stops = np.linspace(0, 1, len(HEAT_COLORS))
    colors = np.stack([np.interp(shares, stops, channel) for channel in np.array(HEAT_COLORS).T], axis=-1)
    return colors.round().astype(np.uint8)
