"""Views of drawn pages as the encoder might meet them: scaled, cropped, turned, spoiled; and batches of them."""

import io
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset

from .drawn_pages import CLASSES, LABEL_PX, OUTSIDE, PAPER, DrawnPage, draw_page

PADDING_COLOR = (127, 127, 127)  # The image processor's.
CELL_PX = 16
LABELS_IN_CELL = (CELL_PX // LABEL_PX) ** 2
Array = np.ndarray[Any, Any]


class View(NamedTuple):
    """
    A square view, uint8 (side, side, 3), and of each of its cells of 16 px how many of the 16 squares are of each
    class, uint8 (side / 16, side / 16, classes).
    """

    pixels: Array
    shares: Array


class PackedPage(NamedTuple):
    """A drawn page in little memory: the picture as JPEG, the classes as PNG."""

    image: bytes
    labels: bytes

    def unpacked(self) -> DrawnPage:
        return DrawnPage(Image.open(io.BytesIO(self.image)), np.asarray(Image.open(io.BytesIO(self.labels))))


def pack(page: DrawnPage) -> PackedPage:
    image, labels = io.BytesIO(), io.BytesIO()
    page.image.save(image, "JPEG", quality=95, subsampling=0)
    Image.fromarray(page.labels).save(labels, "PNG")
    return PackedPage(image.getvalue(), labels.getvalue())


def draw_packed(number: int, seed: int, only_built_in_font: bool) -> PackedPage:
    return pack(draw_page((seed, number), only_built_in_font))


def draw_pages(count: int, seed: int, processes: int, only_built_in_font: bool = False) -> list[PackedPage]:
    """Pages 0 to `count` - 1 of a seed, whatever the number of processes."""
    draw = partial(draw_packed, seed=seed, only_built_in_font=only_built_in_font)
    if processes < 2:
        return [draw(number) for number in range(count)]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(draw, range(count), chunksize=16))


def whole_view(page: DrawnPage, rng: np.random.Generator, side_px: int) -> View:
    """Nearly the whole page, or at least 70 % of its area, fitted into the square as the image processor does."""
    width, height = page.image.size
    share = math.sqrt(rng.uniform(0.7, 1)) if rng.random() < 0.6 else 1.0
    box_width, box_height = width * share, height * share
    left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    scale = side_px / max(box_width, box_height)
    return seen(page, rng, (left, top, left + box_width, top + box_height), scale, side_px)


def crop_view(page: DrawnPage, rng: np.random.Generator, side_px: int, scales: tuple[float, float]) -> View:
    """A part of the page at a scale between the two; where the page ends within the square, padding follows."""
    width, height = page.image.size
    scale = math.exp(rng.uniform(math.log(scales[0]), math.log(scales[1])))
    reach = side_px / scale
    box_width, box_height = min(reach, width), min(reach, height)
    left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    return seen(page, rng, (left, top, left + box_width, top + box_height), scale, side_px)


def seen(
    page: DrawnPage, rng: np.random.Generator, box: tuple[float, float, float, float], scale: float, side_px: int
) -> View:
    """The box of the page at this scale, turned and spoiled by chance, in the middle of a padded square."""
    size = tuple(max(8, min(side_px, round((box[i + 2] - box[i]) * scale))) for i in (0, 1))
    content = page.image.resize(size, Image.Resampling.BICUBIC, box, reducing_gap=2)  # type: ignore[arg-type]
    label_box = tuple(v / LABEL_PX for v in box)
    limits = (*reversed(page.labels.shape), *reversed(page.labels.shape))
    label_box = tuple(min(v, limit) for v, limit in zip(label_box, limits, strict=True))
    # Twice as fine as the classes that are counted: few whole squares of the page fall on whole squares of the view.
    fine = tuple(max(1, v * 2 // LABEL_PX) for v in size)
    labels = Image.fromarray(page.labels).resize(fine, Image.Resampling.NEAREST, label_box)  # type: ignore[arg-type]
    if rng.random() < 0.4:
        angle = float(np.clip(rng.normal(0, 2), -5, 5))
        content = content.rotate(angle, Image.Resampling.BILINEAR, fillcolor=content.getpixel((1, 1)))
        labels = labels.rotate(angle, Image.Resampling.NEAREST, fillcolor=PAPER)
    canvas = Image.new("RGB", (side_px, side_px), PADDING_COLOR)
    left, top = (side_px - size[0]) // 2, (side_px - size[1]) // 2
    canvas.paste(spoiled(content, rng), (left, top))
    classes = Image.new("L", (side_px * 2 // LABEL_PX,) * 2, OUTSIDE)
    classes.paste(labels, (left * 2 // LABEL_PX, top * 2 // LABEL_PX))
    return View(np.asarray(canvas), class_shares(np.asarray(classes)[::2, ::2]))


def class_shares(labels: Array) -> Array:
    """Of each cell of 4 x 4 labels (4 h, 4 w) how many are of each class: (h, w, classes), uint8."""
    side = CELL_PX // LABEL_PX
    rows, columns = labels.shape[0] // side, labels.shape[1] // side
    cells = labels[: rows * side, : columns * side].reshape(rows, side, columns, side)
    return np.stack([(cells == kind).sum(axis=(1, 3)) for kind in range(len(CLASSES))], axis=-1).astype(np.uint8)


def spoiled(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture as a printer, a scanner, a camera and a JPEG file leave it; a quarter of the time as it is."""
    if rng.random() < 0.25:
        return picture
    if rng.random() < 0.25:  # a coarser original
        factor = rng.uniform(0.5, 0.95)
        small = tuple(max(8, int(v * factor)) for v in picture.size)
        picture = picture.resize(small, Image.Resampling.BILINEAR).resize(picture.size, Image.Resampling.BILINEAR)  # type: ignore[arg-type]
    if rng.random() < 0.15:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.1))))
    values = np.asarray(picture, np.float32) / 255
    if rng.random() < 0.35:
        values = np.clip(values, 0, 1) ** rng.uniform(0.6, 1.6)
    if rng.random() < 0.3:
        values = values * rng.uniform(0.8, 1.05, 3).astype(np.float32)
    if rng.random() < 0.25:  # the shadow of a fold or of a lamp
        ramp_x = np.linspace(-1, 1, values.shape[1], dtype=np.float32) * rng.uniform(-0.2, 0.2)
        ramp_y = np.linspace(-1, 1, values.shape[0], dtype=np.float32) * rng.uniform(-0.2, 0.2)
        values = values * (0.9 + ramp_x[None, :, None] + ramp_y[:, None, None])
    if rng.random() < 0.08:
        values = np.repeat(values.mean(axis=2, keepdims=True), 3, axis=2)
    if rng.random() < 0.03:
        values = 1 - values
    if rng.random() < 0.4:
        values = values + rng.normal(0, rng.uniform(0.005, 0.05), values.shape).astype(np.float32)
    picture = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))
    if rng.random() < 0.5:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(20, 85)))
        picture = Image.open(file).convert("RGB")
    return picture


class BatchShape(NamedTuple):
    """Of a batch: side of the views in px, pages seen whole twice, pages of which parts are seen, range of scales."""

    side_px: int
    pairs: int
    crops: int
    scales: tuple[float, float]


class ViewBatches(Dataset[dict[str, Tensor]]):
    """
    One batch a step, the same for a seed and a step whoever makes it: `pixels` (B, side, side, 3), uint8, `shares`
    (B, side / 16, side / 16, classes), uint8, and `pages` (B,), the page of each view. The first `2 * pairs` views are
    of whole pages, two of each page one after the other.
    """

    def __init__(self, pages: Sequence[PackedPage], shapes: Sequence[BatchShape], seed: int) -> None:
        self.pages, self.shapes, self.seed = pages, shapes, seed

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        shape = self.shapes[step]
        rng = np.random.default_rng((self.seed, step))
        numbers = rng.permutation(len(self.pages))[: shape.pairs + shape.crops]
        views, seen_pages = [], []
        for index, number in enumerate(numbers):
            page = self.pages[number].unpacked()
            page.image.load()
            if index < shape.pairs:
                views += [whole_view(page, rng, shape.side_px) for _ in range(2)]
                seen_pages += [number, number]
            else:
                views.append(crop_view(page, rng, shape.side_px, shape.scales))
                seen_pages.append(number)
        return {
            "pixels": torch.from_numpy(np.stack([view.pixels for view in views])),
            "shares": torch.from_numpy(np.stack([view.shares for view in views])),
            "pages": torch.tensor(seen_pages),
        }
