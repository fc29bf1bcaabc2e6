"""
One vector for each page of a feature store, in a file beside its index: what a search over many pages reads first.

The mean over the cells alone is a weak description of a page, since what makes a page itself is in how its cells
differ. A page's vector therefore holds mean and deviation of every channel over the cells, whitened over the store
(what all pages have in common weighs little), cut to its largest components and scaled to length 1.

Cells count by the area of the page that they show: at its border some show only a sliver.

Letters in shapes: N pages, n cells of a page, C channels, D = 2 C pooled values, K components.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..feature_maps import FeatureMap, image_feature_maps
from ..image_geometry import ImagePlace
from ..storage.atomic_file import atomic_file
from ..storage.safetensors_format import build_header
from .store import INDEX_FILE, FeatureStore

POOLED_FILE = "pooled.safetensors"
MAX_COMPONENTS = 256
# Of the whitening: how far the pages' covariance is drawn to one that is equal in all directions. Directions in which
# they hardly differ would else count as much as the others, and of few pages most directions are such.
SHRINKAGE = 0.1
PAGES_PER_BLOCK = 1024
READ_BYTES = 1 << 20

Track = Callable[[Iterable[str]], Iterable[str]]


def feature_map(store: FeatureStore, page_id: str) -> FeatureMap:
    """A page's features without the padding, with the borders of its cells in px of the original image."""
    row = store.row(page_id)
    return image_feature_maps(
        store[page_id],
        None,
        stride=stride_px(store),
        place=ImagePlace(tuple(row["original_size"]), tuple(row["valid_region"])),
        tile_grid=(0, 0),
        tile_size=0,
    ).global_map


def stride_px(store: FeatureStore) -> int:
    """
    The side in px that a cell of the store's maps has for the encoder.

    Raises:
        ValueError: If the store does not say.
    """
    stride = store.manifest.get("model", {}).get("stride")
    if not isinstance(stride, int):
        raise ValueError(f"The manifest of {str(store.folder)!r} names no stride of the model: extract it again.")
    return stride


class Cells(NamedTuple):
    """Cells of a page, row by row: features (n, C) in float32, and weights (n,), their shares of the area shown."""

    features: Tensor
    weights: Tensor

    def mean(self) -> Tensor:
        """The mean cell (C,)."""
        return self.weights @ self.features

    def pooled(self) -> Tensor:
        """Mean and deviation (D,) of every channel."""
        mean = self.mean()
        return torch.cat([mean, (self.weights @ (self.features - mean).square()).sqrt()])


def cells_of(page: FeatureMap) -> Cells:
    """All cells of a map."""
    heights, widths = (torch.tensor(edges).diff() for edges in (page.row_edges, page.column_edges))
    areas = torch.outer(heights, widths).flatten()
    return Cells(page.features.flatten(1).T.float(), areas / areas.sum())


class PooledVectors:
    """
    The vectors of all pages, on the disk, and how those of others are made like them.

    `cell_mean` and `cell_scale` (C,) are the mean and deviation of all cells of the store.
    """

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, "pt")
        self._vectors = self._file.get_slice("vectors")
        self.mean: Tensor = self._file.get_tensor("mean")  # (D,)
        self.projection: Tensor = self._file.get_tensor("projection")  # (D, K)
        self.cell_mean: Tensor = self._file.get_tensor("cell_mean")
        self.cell_scale: Tensor = self._file.get_tensor("cell_scale")
        self.index_sha256 = bytes(self._file.get_tensor("index_sha256").tolist()).hex()

    def __len__(self) -> int:
        return int(self._vectors.get_shape()[0])

    @property
    def components(self) -> int:
        """How many numbers a vector has."""
        return int(self.projection.shape[1])

    def blocks(self) -> Iterator[Tensor]:
        """The vectors of all pages in the order of the index, (up to PAGES_PER_BLOCK, K) float32 at a time."""
        for start in range(0, len(self), PAGES_PER_BLOCK):
            yield self._vectors[start : start + PAGES_PER_BLOCK].float()

    def vector(self, cells: Cells) -> Tensor:
        """The vector (K,) of a page, or a part of one, with these cells."""
        return _normalized((cells.pooled() - self.mean) @ self.projection)

    def similarities(self, cells: Cells) -> Tensor:
        """Cosine similarities (N,) of all pages' vectors to that of these cells."""
        vector = self.vector(cells)
        return torch.cat([block @ vector for block in self.blocks()])


def pooled_vectors(store: FeatureStore, track: Track = iter) -> PooledVectors:
    """
    The vectors of the store's pages. They are made, and written beside the index, where they are not there yet or are
    of another index than the present one; `track` then wraps the ids, to show the progress. Of the pages' features no
    more than one is in memory.

    Raises:
        OSError: If they have to be written and cannot.
        ValueError: If the store holds no page, or does not name the stride.
    """
    path, digest = store.folder / POOLED_FILE, index_sha256(store)
    if path.is_file():
        vectors = PooledVectors(path)
        if vectors.index_sha256 == digest:
            return vectors
    if not len(store):
        raise ValueError(f"{str(store.folder)!r} holds the features of no page.")
    with tempfile.TemporaryFile(dir=store.folder) as pooled, atomic_file(path) as partial:
        statistics = _pool_pages(store, track, pooled)
        with partial.open("wb") as file:
            _write(file, statistics, pooled, len(store), digest)
    return PooledVectors(path)


def index_sha256(store: FeatureStore) -> str:
    """What tells one state of a store from another."""
    digest = hashlib.sha256()
    with (store.folder / INDEX_FILE).open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


class _Moments:
    """Sums from which mean and covariance come, in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor, squares: Callable[[Tensor], Tensor]) -> None:
        rows = rows.double()
        self.count += len(rows)
        self.total = self.total + rows.sum(dim=0)
        self.squares = self.squares + squares(rows)


class _Statistics(NamedTuple):
    mean: Tensor
    projection: Tensor
    cell_mean: Tensor
    cell_scale: Tensor


def _pool_pages(store: FeatureStore, track: Track, pooled: BinaryIO) -> _Statistics:
    """Writes the pooled values (N, D) of all pages to `pooled`, as float32."""
    pages, cells = _Moments(), _Moments()
    block: list[Tensor] = []

    def end_block() -> None:
        values = torch.stack(block)
        pages.add(values, lambda rows: rows.T @ rows)
        pooled.write(values.numpy().tobytes())
        block.clear()

    for page_id in track(store):
        page = cells_of(feature_map(store, page_id))
        cells.add(page.features, lambda rows: rows.square().sum(dim=0))
        block.append(page.pooled())
        if len(block) == PAGES_PER_BLOCK:
            end_block()
    if block:
        end_block()
    mean, cell_mean = pages.total / pages.count, cells.total / cells.count
    variance = (cells.squares / cells.count - cell_mean.square()).clamp(min=0)
    projection = whitening(pages.squares / pages.count - torch.outer(mean, mean))
    return _Statistics(mean.float(), projection, cell_mean.float(), _scale(variance).float())


def whitening(covariance: Tensor) -> Tensor:
    """
    The projection (D, K) after which values of this covariance (D, D) differ equally in all directions, as far as
    `SHRINKAGE` lets them; the directions in which they differ most come first.
    """
    scale = _scale(covariance.diagonal().clamp(min=0))
    correlation = covariance / torch.outer(scale, scale)
    variances, directions = torch.linalg.eigh(correlation)
    variances, directions = variances.flip(0)[:MAX_COMPONENTS], directions.flip(1)[:, :MAX_COMPONENTS]
    shrunk = (1 - SHRINKAGE) * variances.clamp(min=0) + SHRINKAGE
    return (directions * shrunk.rsqrt() / scale[:, None]).float()


def _scale(variance: Tensor) -> Tensor:
    """Deviations to divide by: 1 for values that never change."""
    deviation = variance.sqrt()
    return torch.where(deviation > 1e-6 * deviation.max(), deviation, 1.0)


def _normalized(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def _write(file: BinaryIO, statistics: _Statistics, pooled: BinaryIO, num_pages: int, digest: str) -> None:
    """Writes the file of `PooledVectors` from the pooled values, a block of pages at a time."""
    dimensions, components = statistics.projection.shape
    others = statistics._asdict() | {"index_sha256": torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)}
    described = {name: ("U8" if name == "index_sha256" else "F32", tensor.shape) for name, tensor in others.items()}
    header, names = build_header({**described, "vectors": ("F16", (num_pages, components))})
    file.write(header)
    for name in names:
        if name != "vectors":
            file.write(others[name].contiguous().numpy().tobytes())
            continue
        pooled.seek(0)
        while data := pooled.read(PAGES_PER_BLOCK * dimensions * 4):
            values = torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, dimensions)
            vectors = _normalized((values - statistics.mean) @ statistics.projection)
            file.write(vectors.half().numpy().tobytes())
