"""
The pages of a feature store that are most like a page, an image, or a region of one.

Letters in shapes: n cells of the query, m cells of a page, C channels.
"""

import heapq
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..feature_maps import FeatureMap
from .pooled_vectors import Cells, PooledVectors, Track, cells_of, feature_map, pooled_vectors
from .search_modes import CELL, LATE, MODES, POOLED, RERANKED, SHORTLIST_PAGES, Box
from .store import FeatureStore


class Query(NamedTuple):
    """What is looked for: cells, a part or all of a page; the id of that page where the store has it."""

    cells: FeatureMap
    page_id: str | None = None


class Hit(NamedTuple):
    """A page found: its id, its score (-1 to 1, the higher the more alike), and the part of it that is most alike."""

    page_id: str
    score: float
    box: Box


def query_of_page(store: FeatureStore, page_id: str, region: Box | None = None) -> Query:
    """
    A page of the store, or the `region` of it, as a query; it will not find itself.

    Raises:
        KeyError: If the store has no such page.
        ValueError: If the region does not lie in the page.
    """
    return Query(_in_region(feature_map(store, page_id), region), page_id)


def query_of_map(page: FeatureMap, region: Box | None = None) -> Query:
    """
    The map of an image, or the `region` of it, as a query. It must come from the model that made the store.

    Raises:
        ValueError: If the region does not lie in the image.
    """
    return Query(_in_region(page, region))


def _in_region(page: FeatureMap, region: Box | None) -> FeatureMap:
    if region is None:
        return page
    top, left, bottom, right = region
    height, width = page.row_edges[-1], page.column_edges[-1]
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(
            f"The region top {top:g}, left {left:g}, bottom {bottom:g}, right {right:g} does not lie in the image of "
            f"{height:g} x {width:g} px (height x width)."
        )
    rows, columns = _cells_between(page.row_edges, top, bottom), _cells_between(page.column_edges, left, right)
    return FeatureMap(
        page.features[:, rows, columns],
        page.row_edges[rows.start : rows.stop + 1],
        page.column_edges[columns.start : columns.stop + 1],
    )


def _cells_between(edges: tuple[float, ...], start: float, end: float) -> slice:
    """The cells whose middle lies between two points; where there is none, the one that holds the middle of these."""
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    inside = [cell for cell, middle in enumerate(middles) if start <= middle < end]
    if not inside:
        inside = [sum(edge <= (start + end) / 2 for edge in edges[1:-1])]
    return slice(inside[0], inside[-1] + 1)


def search(
    store: FeatureStore,
    query: Query,
    *,
    mode: str = RERANKED,
    top: int = 10,
    shortlist: int = SHORTLIST_PAGES,
    among: Iterable[str] | None = None,
    track: Track = iter,
) -> list[Hit]:
    """
    The `top` pages most like the query, the best first. The page of the query itself is left out.

    Modes:
        "pooled": By the pages' vectors, which the first search writes beside the index; see `pooled_vectors`.
        "cell": By the one cell of a page that is most like the mean of the query's cells.
        "late": By late interaction: for every cell of the query the most similar cell of the page, and the mean of
            these similarities, by the area that the query's cells show.
        "reranked": The `shortlist` best by "pooled", put into order by "late".

    "cell" and "late" read the features of all pages, or of those `among` which to search, such as the shortlist of an
    index elsewhere; "reranked" reads those of its shortlist. Each holds one page at a time. `track` wraps the ids of
    the pages as they are read, to show the progress.

    Raises:
        OSError, ValueError: As `pooled_vectors`; ValueError for a mode that is none, one that does not take `among`,
            and numbers below 1.
        KeyError: For a page `among` them that the store does not have.
    """
    if mode not in MODES:
        raise ValueError(f"There is no mode {mode!r} of search. Known: {', '.join(MODES)}.")
    if top < 1 or shortlist < 1:
        raise ValueError(f"At least one page must be wanted, got top={top} and shortlist={shortlist}.")
    if among is not None and mode in (POOLED, RERANKED):
        raise ValueError(f"Pages to search among are given with the modes {CELL!r} and {LATE!r}, not {mode!r}.")
    vectors = pooled_vectors(store, track)
    if mode in (POOLED, RERANKED):
        best = _best_pooled(store, vectors, query, max(top, shortlist) if mode == RERANKED else top)
        if mode == POOLED:
            return best
        page_ids: Iterable[str] = [hit.page_id for hit in best]
    else:
        page_ids = track(store if among is None else among)
    hits = _compare_cells(store, vectors, query, page_ids, mode)
    return heapq.nsmallest(top, hits, key=lambda hit: -hit.score)


def _best_pooled(store: FeatureStore, vectors: PooledVectors, query: Query, count: int) -> list[Hit]:
    similarities = vectors.similarities(cells_of(query.cells))
    order = similarities.topk(min(count + 1, len(similarities))).indices.tolist()
    hits = []
    for row in sorted(order, key=lambda row: (-float(similarities[row]), row)):
        page_id = store.index["id"][row].as_py()
        height, width = store.row(page_id)["original_size"]
        hits.append(Hit(page_id, float(similarities[row]), (0.0, 0.0, float(height), float(width))))
    return [hit for hit in hits if hit.page_id != query.page_id][:count]


def _compare_cells(
    store: FeatureStore, vectors: PooledVectors, query: Query, page_ids: Iterable[str], mode: str
) -> Iterator[Hit]:
    cells = cells_of(query.cells)
    extent = (len(query.cells.row_edges) - 1, len(query.cells.column_edges) - 1)
    if mode == CELL:
        cells, extent = Cells(cells.mean()[None], torch.ones(1)), (1, 1)
    wanted = _directions(cells.features, vectors)
    for page_id in page_ids:
        if page_id == query.page_id:
            continue
        page = feature_map(store, page_id)
        similarities = wanted @ _directions(cells_of(page).features, vectors).T  # (n, m)
        score = float(cells.weights @ similarities.amax(dim=1))
        likeness = similarities.amax(dim=0).view(page.features.shape[1:])
        yield Hit(page_id, score, _best_box(page, likeness, extent))


def _directions(cells: Tensor, vectors: PooledVectors) -> Tensor:
    """Cells (n, C) as unit vectors whose products are their similarities: what all cells have in common taken off."""
    return F.normalize((cells - vectors.cell_mean) / vectors.cell_scale, dim=1)


def _best_box(page: FeatureMap, likeness: Tensor, extent: tuple[int, int]) -> Box:
    """The part of a page, of up to `extent` = (rows, columns), whose cells are most like any of the query's."""
    rows, columns = (min(wanted, there) for wanted, there in zip(extent, likeness.shape, strict=True))
    means = F.avg_pool2d(likeness[None, None], (rows, columns), stride=1)[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    top, left, _, _ = page.cell_to_pixels(row, column)
    _, _, bottom, right = page.cell_to_pixels(row + rows - 1, column + columns - 1)
    return top, left, bottom, right
