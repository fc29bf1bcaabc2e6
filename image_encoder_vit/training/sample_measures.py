"""
What the sample encoder's features are worth on drawn pages that it was not trained on: the layout class of a cell by
its nearest neighbour, and a page found again after it was spoiled.

Letters in shapes: n cells, C channels.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .drawn_pages import CLASSES, LABEL_PX, OUTSIDE, DrawnPage
from .page_views import class_shares, spoiled

CLEAR_SHARE = 0.6  # A cell counts where one class has at least this share of it.
HELD_OUT_SEED = 104729
CELLS_PER_CLASS = {16: 500, 64: 300}  # by stride in px

Features = Callable[[Any], dict[int, Tensor]]
"""From what the image processor gives for one page, its feature maps (C, h, w) by stride in px."""


class LabelledCells(NamedTuple):
    """Cells of one stride: features (n, C), class (n,) and page (n,) of each."""

    features: Tensor
    classes: Tensor
    pages: Tensor


def encoder_features(model: Any) -> Features:
    """The maps after the neck and after the last convolution."""
    encoder = model.encoder

    def features(inputs: Any) -> dict[int, Tensor]:
        last = encoder.downsample_names[-1]
        maps = encoder(inputs["pixel_values"], stages=["neck", last])
        return {16: maps[0][0].float(), encoder.stride: maps[1][0].float()}

    return features


def color_features(inputs: Any) -> dict[int, Tensor]:
    """Mean and deviation of each colour over the pixels of a cell: what no encoder is needed for."""
    pixels = inputs["pixel_values"].float()
    maps = {}
    for stride in (16, 64):
        mean = F.avg_pool2d(pixels, stride)
        variance = F.avg_pool2d(pixels.square(), stride) - mean.square()
        maps[stride] = torch.cat([mean, variance.clamp(min=0).sqrt()], dim=1)[0]
    return maps


@torch.inference_mode()
def labelled_cells(
    pages: Iterable[DrawnPage], processor: Any, features: Features, seed: int
) -> dict[int, LabelledCells]:
    """The cells of pages of which one class is clear, by stride in px; every other page is spoiled before."""
    found: dict[int, list[LabelledCells]] = {}
    for number, page in enumerate(pages):
        image = spoiled(page.image, np.random.default_rng((seed, number))) if number % 2 else page.image
        inputs = processor(image, return_tensors="pt")
        shares = canvas_shares(page, inputs)
        for stride, features_of_page in features(inputs).items():
            means = F.avg_pool2d(shares, stride // 16)
            share, kind = means.max(dim=0)
            clear = share >= CLEAR_SHARE
            cells = features_of_page[:, clear].T
            where = torch.full((len(cells),), number)
            found.setdefault(stride, []).append(LabelledCells(cells, kind[clear], where))
    return {
        stride: LabelledCells(*(torch.cat(parts) for parts in zip(*many, strict=True)))
        for stride, many in found.items()
    }


def canvas_shares(page: DrawnPage, inputs: Any) -> Tensor:
    """The share of each class in the cells of 16 px of the processor's canvas: (classes, h, w)."""
    top, left, height, width = inputs["valid_regions"][0].tolist()
    canvas_height, canvas_width = inputs["pixel_values"].shape[2:]
    rows = ((np.arange(canvas_height // LABEL_PX) + 0.5) * LABEL_PX - top) * page.image.height / height
    columns = ((np.arange(canvas_width // LABEL_PX) + 0.5) * LABEL_PX - left) * page.image.width / width
    inside = ((rows >= 0) & (rows < page.image.height))[:, None] & ((columns >= 0) & (columns < page.image.width))[None]
    row_numbers = np.clip(rows // LABEL_PX, 0, page.labels.shape[0] - 1).astype(int)
    column_numbers = np.clip(columns // LABEL_PX, 0, page.labels.shape[1] - 1).astype(int)
    labels = np.where(inside, page.labels[row_numbers[:, None], column_numbers[None]], OUTSIDE)
    return torch.from_numpy(class_shares(labels)).permute(2, 0, 1).float() / 16


def standardized(cells: LabelledCells) -> LabelledCells:
    features = cells.features
    return cells._replace(features=(features - features.mean(dim=0)) / features.std(dim=0).clamp(min=1e-6))


def nearest_neighbour_accuracy(cells: LabelledCells, per_class: int, seed: int) -> dict[str, float]:
    """
    How often a cell's class is that of the cell nearest to it by cosine, of pages apart: for each class, and their
    "mean". Up to `per_class` cells of each class of the first half of the pages are asked, as many of the second half
    answer. Classes with less than 20 cells on a side are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    middle = int(cells.pages.max()) // 2
    sides = []
    for side in (cells.pages <= middle, cells.pages > middle):
        chosen = []
        for kind in range(len(CLASSES)):
            of_kind = torch.nonzero(side & (cells.classes == kind))[:, 0]
            chosen.append(of_kind[torch.randperm(len(of_kind), generator=generator)[:per_class]])
        sides.append(chosen)
    kinds = [kind for kind in range(len(CLASSES)) if min(len(sides[0][kind]), len(sides[1][kind])) >= 20]
    known = torch.cat([sides[1][kind] for kind in kinds])
    answers = F.normalize(cells.features[known], dim=1)
    accuracy = {}
    for kind in kinds:
        asked = F.normalize(cells.features[sides[0][kind]], dim=1)
        nearest = known[(asked @ answers.T).argmax(dim=1)]
        accuracy[CLASSES[kind]] = float((cells.classes[nearest] == kind).float().mean())
    return accuracy | {"mean": sum(accuracy.values()) / len(accuracy)}


def spoiled_query(page: Image.Image, seed: int) -> Image.Image:
    """The page turned by 3 degrees, cropped to 80 % of its area, scaled by 0.6, with noise, as JPEG at quality 30."""
    rng = np.random.default_rng(seed)
    turned = page.rotate(3 if rng.random() < 0.5 else -3, Image.Resampling.BICUBIC, fillcolor=page.getpixel((1, 1)))
    share = 0.8**0.5
    left, top = (rng.uniform(0, side * (1 - share)) for side in page.size)
    box = (left, top, left + page.width * share, top + page.height * share)
    small = turned.resize(
        (round(page.width * share * 0.6), round(page.height * share * 0.6)), Image.Resampling.BICUBIC, box
    )
    noisy = np.asarray(small, np.float32) + rng.normal(0, 8, (small.height, small.width, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def cell_measures(pages: Sequence[DrawnPage], processor: Any, model: Any, random_model: Any) -> dict[str, Any]:
    """
    `nearest_neighbour_accuracy` by stride, of the encoder, of one of its shape with random weights and of the cells'
    colours; the latter two standardised, which is what does them the most good.
    """
    measures: dict[str, Any] = {}
    described = {
        "sample": encoder_features(model),
        "random": encoder_features(random_model),
        "colors": color_features,
    }
    for name, features in described.items():
        by_stride = labelled_cells(pages, processor, features, HELD_OUT_SEED)
        for stride, cells in by_stride.items():
            cells = cells if name == "sample" else standardized(cells)
            accuracy = nearest_neighbour_accuracy(cells, CELLS_PER_CLASS[stride], HELD_OUT_SEED)
            rounded = {kind: round(value, 4) for kind, value in accuracy.items()}
            measures.setdefault(name, {})[str(stride)] = rounded
    return measures
