"""Search in a feature store: what is found by each mode, where on the page, and what lies on the disk for it."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from image_encoder_vit import FeatureMap
from image_encoder_vit.commands import extract
from image_encoder_vit.commands import search as command
from image_encoder_vit.commands.searching import FRAME_COLOR
from image_encoder_vit.corpora.pooled_vectors import POOLED_FILE, cells_of, pooled_vectors, whitening
from image_encoder_vit.corpora.search import Hit, Query, query_of_page, search
from image_encoder_vit.corpora.store import FeatureStore, check_manifest, merge, shard_name, write_unit

STRIDE = 16
CHANNELS = 6


def write_store(folder: Path, maps: list[Tensor], pages_per_shard: int = 4) -> FeatureStore:
    """A store of feature maps (C, h, w) of pages without padding, twice as large as the model saw them."""
    check_manifest(folder, {"model": {"stride": STRIDE}})
    units = [maps[start : start + pages_per_shard] for start in range(0, len(maps), pages_per_shard)]
    for unit, features in enumerate(units):
        rows = []
        for row, tensor in enumerate(features):
            height, width = (side * STRIDE for side in tensor.shape[1:])
            page = unit * pages_per_shard + row
            rows.append(
                {
                    "id": f"book.pdf#{page}",
                    "source": "book.pdf",
                    "page": page,
                    "original_size": [2 * height, 2 * width],
                    "valid_region": [0, 0, height, width],
                    "grid": list(tensor.shape[1:]),
                    "shard": shard_name(unit),
                    "row": row,
                }
            )
        write_unit(folder, unit, dict(enumerate(features)), rows)
    merge(folder, len(units))
    return FeatureStore(folder)


def random_maps(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(CHANNELS, 5 + page % 2, 4, generator=generator) + 2 for page in range(count)]


@pytest.fixture(scope="module")
def maps() -> list[Tensor]:
    """30 pages; the cells of page 7's rows 2 and 3, columns 1 and 2, are also on page 21, one row higher."""
    maps = random_maps(30)
    maps[21][:, 1:3, 1:3] = maps[7][:, 2:4, 1:3]
    return maps


@pytest.fixture(scope="module")
def store(maps: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return write_store(tmp_path_factory.mktemp("search") / "store", maps)


def as_map(features: Tensor) -> FeatureMap:
    """Features as the store's pages have them: without padding, of twice the size."""
    rows, columns = (tuple(2.0 * STRIDE * edge for edge in range(side + 1)) for side in features.shape[1:])
    return FeatureMap(features, rows, columns)


def numbers(hits: list[Hit]) -> list[int]:
    return [int(hit.page_id.partition("#")[2]) for hit in hits]


# What is found


def test_late_interaction_is_the_mean_over_query_cells_of_the_best_match(
    store: FeatureStore, maps: list[Tensor]
) -> None:
    every_cell = torch.cat([page.flatten(1) for page in maps], dim=1)
    mean, deviation = every_cell.mean(dim=1), every_cell.std(dim=1, correction=0)
    query = random_maps(1, seed=5)[0]

    def expected(page: Tensor) -> float:
        best = []
        for cell in query.flatten(1).T:
            others = [(other - mean) / deviation for other in page.flatten(1).T]
            best.append(max(torch.cosine_similarity((cell - mean) / deviation, o, dim=0).item() for o in others))
        return sum(best) / len(best)

    hits = search(store, Query(as_map(query)), mode="late", top=30)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for number, hit in zip(numbers(hits), hits, strict=True):
        assert hit.score == pytest.approx(expected(maps[number]), abs=1e-5)


def test_pooled_scores_are_cosines_of_whitened_means_and_deviations(store: FeatureStore, maps: list[Tensor]) -> None:
    pooled = torch.stack([cells_of(as_map(page)).pooled() for page in maps])
    assert torch.allclose(pooled[0, CHANNELS:], maps[0].flatten(1).std(dim=1, correction=0))
    projection = whitening(torch.cov(pooled.T, correction=0).double())
    query = random_maps(1, seed=5)[0]
    wanted = (cells_of(as_map(query)).pooled() - pooled.mean(dim=0)) @ projection
    expected = torch.cosine_similarity((pooled - pooled.mean(dim=0)) @ projection, wanted[None])
    hits = search(store, Query(as_map(query)), mode="pooled", top=30)
    for number, hit in zip(numbers(hits), hits, strict=True):
        assert hit.score == pytest.approx(expected[number].item(), abs=2e-3)  # The vectors are stored in 16 bits.
        height, width = maps[number].shape[1:]
        assert hit.box == (0, 0, 2 * STRIDE * height, 2 * STRIDE * width)


def test_cells_count_by_the_area_that_they_show() -> None:
    features = torch.randn(CHANNELS, 2, 3, generator=torch.Generator().manual_seed(0))
    slivers = cells_of(FeatureMap(features, (0.0, 3.0, 4.0), (0.0, 8.0, 16.0, 18.0)))
    areas = [24.0, 24, 6, 8, 8, 2]
    assert slivers.weights.tolist() == pytest.approx([area / 72 for area in areas])
    repeated = features.flatten(1).repeat_interleave(torch.tensor(areas).long() // 2, dim=1)
    expected = torch.cat([repeated.mean(dim=1), repeated.std(dim=1, correction=0)])
    torch.testing.assert_close(slivers.pooled(), expected)


def test_whitened_values_differ_equally_in_all_directions() -> None:
    values = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)).double()
    values = values @ torch.tensor([[100.0, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1e-3, 0], [0, 0, 0, 0]]).double()
    whitened = values @ whitening(torch.cov(values.T, correction=0)).double()
    spread = torch.linalg.eigvalsh(torch.cov(whitened.T, correction=0))
    assert spread[-3:].max() / spread[-3:].min() < 1.2
    assert spread[0] < 1e-6  # What never differs does not count.


@pytest.mark.parametrize("mode", ["reranked", "pooled", "late"])
@pytest.mark.parametrize("number", [0, 13, 29])
def test_a_page_finds_itself_unless_it_was_asked_for_by_its_id(
    store: FeatureStore, maps: list[Tensor], mode: str, number: int
) -> None:
    assert numbers(search(store, Query(as_map(maps[number])), mode=mode, top=1)) == [number]
    page_id = f"book.pdf#{number}"
    hits = search(store, query_of_page(store, page_id), mode=mode, top=100)
    assert sorted(numbers(hits)) == [page for page in range(30) if page != number]


@pytest.mark.parametrize("mode", ["late", "reranked"])
def test_a_region_is_found_where_it_lies(store: FeatureStore, mode: str) -> None:
    cell = 2 * STRIDE
    region = (2 * cell, 1 * cell, 4 * cell, 3 * cell)
    best = search(store, query_of_page(store, "book.pdf#7", region), mode=mode, top=3, shortlist=30)[0]
    assert best.page_id == "book.pdf#21"
    assert best.score == pytest.approx(1, abs=1e-5)
    assert best.box == (1 * cell, 1 * cell, 3 * cell, 3 * cell)


def test_the_best_cell_is_found_where_it_lies(store: FeatureStore) -> None:
    cell = 2 * STRIDE
    # Smaller than a cell: it stands for the cell that holds its middle.
    query = query_of_page(store, "book.pdf#7", (3.2 * cell, 2.1 * cell, 3.4 * cell, 2.5 * cell))
    assert query.cells.features.shape == (CHANNELS, 1, 1)
    best = search(store, query, mode="cell", top=1)[0]
    assert (best.page_id, best.box) == ("book.pdf#21", (2 * cell, 2 * cell, 3 * cell, 3 * cell))


def test_reranked_takes_its_pages_from_the_shortlist(store: FeatureStore, maps: list[Tensor]) -> None:
    query = Query(as_map(random_maps(1, seed=5)[0]))
    shortlist = numbers(search(store, query, mode="pooled", top=5))
    by_late = [page for page in numbers(search(store, query, mode="late", top=30)) if page in shortlist]
    assert numbers(search(store, query, top=5, shortlist=5)) == by_late


def test_an_index_elsewhere_can_give_the_shortlist(store: FeatureStore, maps: list[Tensor]) -> None:
    among = [f"book.pdf#{page}" for page in (3, 21, 8)]
    hits = search(store, query_of_page(store, "book.pdf#21"), mode="late", among=among)
    assert sorted(numbers(hits)) == [3, 8]
    with pytest.raises(ValueError, match="not 'pooled'"):
        search(store, Query(as_map(maps[0])), mode="pooled", among=among)


@pytest.mark.parametrize("number_of_pages", [1, 2])
def test_stores_of_few_pages_are_searched_too(number_of_pages: int, tmp_path: Path) -> None:
    maps = random_maps(number_of_pages)
    small = write_store(tmp_path / "store", maps)
    for mode in ("reranked", "pooled", "late", "cell"):
        hits = search(small, Query(as_map(maps[-1])), mode=mode)
        assert len(hits) == number_of_pages
        assert all(-1.001 <= hit.score <= 1.001 for hit in hits)
        others = search(small, query_of_page(small, "book.pdf#0"), mode=mode)
        assert numbers(others) == list(range(1, number_of_pages))


def test_bad_questions_are_refused(store: FeatureStore) -> None:
    query = query_of_page(store, "book.pdf#0")
    with pytest.raises(ValueError, match=r"no mode 'fast'.*reranked, pooled"):
        search(store, query, mode="fast")
    with pytest.raises(ValueError, match="At least one page"):
        search(store, query, top=0)
    with pytest.raises(ValueError, match=r"bottom 500, right 10 does not lie in the image of 160 x 128 px"):
        query_of_page(store, "book.pdf#0", (0, 0, 500, 10))
    with pytest.raises(KeyError, match="ids are like"):
        query_of_page(store, "book.pdf#30")


# What lies on the disk


def test_pooled_vectors_are_made_once_and_again_for_another_index(tmp_path: Path) -> None:
    maps = random_maps(9)
    folder = tmp_path / "store"
    read: list[str] = []

    def noted(page_ids: Iterable[str]) -> Iterator[str]:
        for page_id in page_ids:
            read.append(page_id)
            yield page_id

    first = pooled_vectors(write_store(folder, maps), noted)
    assert len(first) == len(read) == 9
    pooled_vectors(FeatureStore(folder), noted)
    assert len(read) == 9
    more = write_store(tmp_path / "more", maps[:5])
    (tmp_path / "more" / POOLED_FILE).write_bytes((folder / POOLED_FILE).read_bytes())
    assert len(pooled_vectors(more, noted)) == 5
    assert len(read) == 14


def test_an_interrupted_first_search_leaves_nothing(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", random_maps(9))
    before = sorted(path.name for path in store.folder.iterdir())

    def interrupted(page_ids: Iterable[str]) -> Iterator[str]:
        yield from list(page_ids)[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pooled_vectors(store, interrupted)
    assert sorted(path.name for path in store.folder.iterdir()) == before


@pytest.mark.parametrize("mode", ["pooled", "late"])
def test_memory_does_not_grow_with_the_store(mode: str, large_store: FeatureStore) -> None:
    (large_store.folder / POOLED_FILE).unlink(missing_ok=True)
    megabytes: list[float] = []

    def measured(page_ids: Iterable[str]) -> Iterator[str]:
        for page_id in page_ids:
            megabytes.append(psutil.Process().memory_info().rss / 1e6)
            yield page_id

    query = query_of_page(large_store, "book.pdf#0", (0, 0, 160, 160))
    search(large_store, query, mode=mode, track=measured)
    # Once as many shards are open as are kept open, 72 MB of features are to come.
    assert max(megabytes[72:]) - megabytes[71] < 36


@pytest.fixture(scope="module")
def large_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """216 pages of half a megabyte, in 54 shards."""
    features = torch.rand(128, 32, 32)
    return write_store(tmp_path_factory.mktemp("large") / "store", [features + page for page in range(216)])


# The command


def draw_page(path: Path, number: int) -> None:
    picture = Image.new("RGB", (200, 260), "white")
    draw = ImageDraw.Draw(picture)
    generator = torch.Generator().manual_seed(number)
    for left, top, side, red, green, blue in torch.randint(0, 200, (12, 6), generator=generator).tolist():
        draw.rectangle((left, top, left + side // 4, top + side // 4), fill=(red, green, blue))
    picture.save(path)


@pytest.fixture(scope="module")
def features(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of ten drawn pages, by the command; "pages" beside them holds the files."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "pages").mkdir()
    for number in range(10):
        draw_page(folder / "pages" / f"{number}.png", number)
    extract_arguments = [str(folder / "pages"), "--output", str(folder / "features"), "--checkpoint", model_folder]
    assert extract.main([*extract_arguments, "--device", "cpu", "--pages-per-shard", "4"]) == 0
    return folder / "features"


def test_an_image_finds_its_page(features: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = features.parent / "pages" / "4.png"
    capsys.readouterr()
    assert command.main([str(features), str(page), "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["1", "1.000", "0", "0", "260", "200", f"{page.as_posix()}#0"]


@pytest.mark.parametrize("by_id", [True, False])
def test_the_command_draws_and_prints_json(
    by_id: bool, features: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = features.parent / "pages" / "4.png"
    capsys.readouterr()
    query = f"{page.as_posix()}#0" if by_id else str(page)
    drawn = tmp_path / "hits.png"
    options = ["--region", "20,40,120,150", "--json", "--plot", str(drawn), "--top", "2"]
    assert command.main([str(features), query, *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["query"], answer["by"], len(answer["hits"])) == (query, "late", 2)
    if not by_id:
        assert answer["hits"][0]["id"] == f"{page.as_posix()}#0"
        assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    for hit in answer["hits"]:
        top, left, bottom, right = hit["box"]
        assert 0 <= top < bottom <= 260
        assert 0 <= left < right <= 200
    with Image.open(drawn) as picture:
        frame_pixels = sum(pixel == FRAME_COLOR for pixel in picture.convert("RGB").get_flattened_data())
    assert frame_pixels > 500
    assert [path.name for path in tmp_path.iterdir()] == ["hits.png"]


def test_the_command_refuses_in_one_line(
    features: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from builders import small_model

    page = str(features.parent / "pages" / "4.png")
    small_model(seed=3).save_pretrained(tmp_path / "other")
    capsys.readouterr()
    for arguments, message in (
        ([str(features), page, "--checkpoint", str(tmp_path / "other")], "holds other weights"),
        ([str(features), "nothing.png"], "Nor is it the id of a page"),
        ([str(features), page, "--page", "1"], "has 1 page(s), counted from 0"),
        ([str(features), page, "--region", "0,0,300,100"], "does not lie in the image of 260 x 200 px"),
        ([str(tmp_path), page], "holds no features"),
        ([str(features), page, "--plot", str(tmp_path / "hits.txt")], "unknown kind of picture"),
    ):
        assert command.main(arguments) == 2
        output = capsys.readouterr()
        assert message in output.err
        assert output.err.count("\n") == 1
        assert not output.out
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_model_that_has_moved_is_asked_for(
    features: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    moved = tmp_path / "features"
    moved.mkdir()
    for name in ("index.parquet", "manifest.json", "shards", ".work"):
        (moved / name).symlink_to(features / name)
    manifest = json.loads((features / "manifest.json").read_text())
    (moved / "manifest.json").unlink()
    manifest["model"]["checkpoint"] = "gone/away"
    (moved / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert command.main([str(moved), str(features.parent / "pages" / "4.png")]) == 2
    assert "'gone/away', cannot be loaded: give its place with --checkpoint" in capsys.readouterr().err


# The documentation


def test_the_documentation_s_python_runs(maps: list[Tensor], tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "search.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    has_faiss = importlib.util.find_spec("faiss") is not None
    code = "\n".join(block for block in blocks if has_faiss or "faiss" not in block)
    write_store(tmp_path / "features", [torch.cat([page, page], dim=2).repeat(1, 3, 3) for page in maps])
    code = code.replace("path/to/features", "features") + "print(*(hit.page_id for hit in hits))\n" * has_faiss
    # In a process of its own: FAISS brings an OpenMP of its own, and warns of its own bindings when it is imported.
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "book.pdf#0" not in result.stdout
    assert result.stdout.count("book.pdf#") >= (10 if has_faiss else 5)
    if not has_faiss:
        pytest.skip("the recipe for FAISS needs faiss-cpu of the extra search, which this environment lacks")
