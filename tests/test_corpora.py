"""Corpora: what scripts/extract_features.py finds, how it survives being killed, and what it writes."""

import hashlib
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from pyarrow import parquet
from transformers import AutoModel

from image_encoder_vit import ImageEncoderViTImageProcessorPil
from image_encoder_vit.commands import extract as script
from image_encoder_vit.corpora import extraction
from image_encoder_vit.corpora.extraction import PreparedPage, batches_by_shape
from image_encoder_vit.corpora.pages import Page, PageReader, ReadOptions, find_pages
from image_encoder_vit.corpora.store import FeatureStore, differences
from image_encoder_vit.storage.output_folder import folder_lock

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "extract_features.py"
SAMPLE_PDF = ROOT / "samples" / "pages.pdf"
KILLS = ["rank", "launcher"]


@pytest.fixture(autouse=True)
def as_in_started_processes() -> Iterator[None]:
    """One thread, as in the processes that the launcher starts: the last bits depend on it. Accelerate starts anew."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def picture(seed: int, size: tuple[int, int] = (90, 120)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def tiff(*seeds: int) -> bytes:
    file = io.BytesIO()
    first, *others = map(picture, seeds)
    first.save(file, "TIFF", save_all=True, append_images=others)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every kind of file, and a few damaged ones."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "more").mkdir()
    for seed in range(24):
        size = (900 + 80 * (seed % 3), 1200)  # Large enough that the run takes a moment.
        picture(seed, size).save(folder / "more" / f"{seed:02}.{'jpg' if seed % 2 else 'png'}")
    (folder / "pages.pdf").write_bytes(SAMPLE_PDF.read_bytes())
    (folder / "three.tiff").write_bytes(tiff(30, 31, 32))
    write_tar(
        folder / "shard.tar",
        [("a.png", png(40)), ("a.json", b"{}"), ("b.tif", tiff(41, 42)), ("c.pdf", SAMPLE_PDF.read_bytes())],
    )
    rows = [{"image": {"bytes": png(50 + row), "path": None}, "label": row} for row in range(5)]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=2)
    (folder / "notes.txt").write_text("left out")
    (folder / ".hidden.png").write_bytes(png(60))
    # Damaged:
    (folder / "cut.png").write_bytes(png(61)[:-200])
    (folder / "cut.tar").write_bytes((folder / "shard.tar").read_bytes()[:1500])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "no.pdf").write_bytes(b"%PDF-1.7 but no more")
    return folder


REJECTED = ["cut.png", "cut.tar::a.png", "cut.tar::", "empty.jpg", "no.pdf"]


def arguments(corpus: Path, model_folder: str, output: Path, *options: object) -> list[str]:
    given = [corpus, "--checkpoint", model_folder, "--output", output, "--pages-per-shard", 3, "--batch-size", 2]
    return list(map(str, [*given, "--device", "cpu", "--workers", 1, *options]))


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features by one process that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert script.main(arguments(corpus, model_folder, folder / "features", "--report", folder / "report")) == 0
    finally:
        torch.set_num_threads(threads)
    return folder / "features"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its name; the manifest tells how it was made, and is compared by the script itself."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# What is found


def pages_of(*inputs: object, **options: Any) -> list[Page]:
    return list(find_pages(list(map(str, inputs)), ReadOptions(**options)))


def test_every_kind_of_file_is_found_in_one_order(corpus: Path) -> None:
    pages = pages_of(corpus)
    ids = [page.id.removeprefix(f"{corpus.as_posix()}/") for page in pages]
    assert len(set(ids)) == len(ids) == 24 + 3 + 3 + (1 + 2 + 3) + 5 + 5
    assert [name for name in ids if not name.startswith("more/")] == [
        *("cut.png#0", "cut.tar::a.png#0", "cut.tar::#0", "empty.jpg#0"),
        *("no.pdf#0", "pages.pdf#0", "pages.pdf#1", "pages.pdf#2"),
        *(f"rows.parquet#{row}" for row in range(5)),
        *("shard.tar::a.png#0", "shard.tar::b.tif#0", "shard.tar::b.tif#1"),
        *(f"shard.tar::c.pdf#{page}" for page in range(3)),
        *("three.tiff#0", "three.tiff#1", "three.tiff#2"),
    ]
    assert pages_of(corpus / "three.tiff", corpus / "*.tiff") == pages_of(f"{corpus}/**/*.tiff")
    assert pages_of(corpus / "more" / "03.jpg", corpus / "more")[1].source.endswith("more/00.png")


def test_pages_are_read_as_they_were_written(corpus: Path) -> None:
    reader = PageReader(ReadOptions())
    expected = {"three.tiff": (30, 31, 32), "rows.parquet": range(50, 55), "shard.tar::a.png": (40,)}
    expected["shard.tar::b.tif"] = (41, 42)
    read = {page.id: page for page in pages_of(corpus)}
    for name, seeds in expected.items():
        for number, seed in enumerate(seeds):
            image, sha256 = reader.read(read[f"{corpus.as_posix()}/{name}#{number}"])
            assert np.array_equal(np.asarray(image), np.asarray(picture(seed))), (name, number)
            if "tif" not in name:
                assert sha256 == hashlib.sha256(png(seed)).hexdigest()
    # In any order: what stays open is that of the page asked for.
    for number in (1, 0, 2):
        image, _ = reader.read(read[f"{corpus.as_posix()}/three.tiff#{number}"])
        assert np.array_equal(np.asarray(image), np.asarray(picture(30 + number)))


def test_pdf_pages_are_rendered_at_the_resolution_asked_for() -> None:
    pages = pages_of(SAMPLE_PDF)
    sizes = {dpi: [PageReader(ReadOptions(dpi=dpi)).read(page).image.size for page in pages] for dpi in (72, 144)}
    assert sizes[72] == [(596, 842), (596, 842), (842, 596)]
    assert all(abs(2 * small - large) <= 1 for small, large in zip(*map(np.ravel, sizes.values()), strict=True))
    image, sha256 = PageReader(ReadOptions()).read(pages[0])
    assert sha256 == hashlib.sha256(SAMPLE_PDF.read_bytes()).hexdigest()
    assert np.asarray(image).min() < 60
    assert np.asarray(image).max() > 240
    with pytest.raises(ValueError, match="lower --dpi"):
        PageReader(ReadOptions(dpi=3000)).read(pages[0])


def test_datasets_saved_or_loaded(tmp_path: Path) -> None:
    rows = {"page": [{"bytes": png(seed), "path": None} for seed in (1, 2)], "text": ["a", "b"]}
    features = datasets.Features({"page": datasets.Image(), "text": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "saved")
    (tmp_path / "for-the-hub" / "data").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "for-the-hub" / "data" / "train-00000-of-00001.parquet")
    reader = PageReader(ReadOptions())
    for name in (str(tmp_path / "saved"), f"dataset:{tmp_path / 'for-the-hub'}"):
        pages = pages_of(name)
        assert [page.id for page in pages] == [f"{name}:train#{row}" for row in range(2)]
        for page, seed in zip(pages, (1, 2), strict=True):
            image, sha256 = reader.read(page)
            assert np.array_equal(np.asarray(image), np.asarray(picture(seed)))
            assert sha256 == hashlib.sha256(png(seed)).hexdigest()
    only = pages_of(tmp_path / "saved", split="test")
    image, _ = PageReader(ReadOptions(split="test")).read(only[0])
    assert len(only) == 1
    assert np.array_equal(np.asarray(image), np.asarray(picture(2)))
    with pytest.raises(ValueError, match="split 'validation'"):
        pages_of(tmp_path / "saved", split="validation")
    with pytest.raises(ValueError, match="no image column 'text'"):
        pages_of(tmp_path / "saved", image_column="text")


def test_one_name_twice_in_a_tar_makes_two_ids(tmp_path: Path) -> None:
    write_tar(tmp_path / "twice.tar", [("a.png", png(1)), ("a.png", png(2))])
    pages = pages_of(tmp_path / "twice.tar")
    assert [page.source.partition("::")[2] for page in pages] == ["a.png", "a.png@2"]
    images = [np.asarray(PageReader(ReadOptions()).read(page).image) for page in pages]
    assert np.array_equal(images[0], np.asarray(picture(1)))
    assert np.array_equal(images[1], np.asarray(picture(2)))


def test_inputs_that_are_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("missing.png", "*.png"):
        with pytest.raises(ValueError, match=r"No file, folder or match of a pattern"):
            pages_of(tmp_path / name)
    with pytest.raises(ValueError, match=r"No page in folder .*empty"):
        pages_of(tmp_path / "empty")
    table = pa.table({"front": [png(1)], "back": [png(2)]})
    parquet.write_table(table, tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"2 columns that may hold images, \['front', 'back'\].*--image-column"):
        pages_of(tmp_path / "two.parquet")
    page = pages_of(tmp_path / "two.parquet", image_column="back")[0]
    image, _ = PageReader(ReadOptions(image_column="back")).read(page)
    assert np.array_equal(np.asarray(image), np.asarray(picture(2)))


# Batches


def prepared(position: int, *shape: int) -> PreparedPage:
    page = Page("source", position, "file", "source", 0, 0, "", "")
    return PreparedPage(position, page, {"pixel_values": torch.zeros(1, *shape)}, (1, 1), (0, 0, 1, 1), "", None)


def test_batches_hold_one_shape_and_few_pages_wait() -> None:
    pages = [prepared(index, 3, 16 * (index % 2 + 1), 16) for index in range(7)]
    pages.append(pages[0]._replace(position=7, reason="damaged", inputs={}))
    batches = [[page.position for page in batch] for batch in batches_by_shape(pages, 2)]
    assert batches == [[0, 2], [1, 3], [4, 6], [5]]
    # Every page of a shape of its own: no more than four batches wait.
    waiting = 0
    for batch in batches_by_shape((prepared(index, 3, 16 * index, 16) for index in range(1, 50)), 2):
        waiting = max(waiting, 49 - batch[0].position) if batch[0].position > 41 else waiting
        assert len(batch) == 1
    assert waiting <= 8


# A whole run


def test_features_are_the_model_s(undisturbed: Path, corpus: Path, model_folder: str) -> None:
    store = FeatureStore(undisturbed)
    ids = [page.id for page in pages_of(corpus)]
    rejected = [f"{corpus.as_posix()}/{name}#0" for name in REJECTED]
    assert list(store) == [name for name in ids if name not in rejected]
    assert len(store) == len(ids) - 5
    model = AutoModel.from_pretrained(model_folder)
    processor = ImageEncoderViTImageProcessorPil.from_pretrained(model_folder)
    reader = PageReader(ReadOptions())
    for page in pages_of(corpus):
        if page.id in rejected:
            continue
        image, sha256 = reader.read(page)
        inputs = processor(image, return_tensors="pt")
        with torch.inference_mode():
            expected = model(inputs["pixel_values"]).last_hidden_state[0]
        assert store[page.id].dtype == torch.bfloat16
        torch.testing.assert_close(store[page.id].float(), expected, rtol=2**-7, atol=1e-5)
        row = store.row(page.id)
        assert row["sha256"] == sha256
        assert (row["source"], row["page"]) == (page.source, page.page)
        assert row["original_size"] == inputs["original_sizes"][0].tolist() == [image.height, image.width]
        assert row["valid_region"] == inputs["valid_regions"][0].tolist()
        assert row["grid"] == list(expected.shape[1:])
    assert "nothing#0" not in store
    with pytest.raises(KeyError, match="No features of 'nothing#0'"):
        store["nothing#0"]
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again[ids[-1]], store[ids[-1]])


def test_bad_files_go_to_the_rejects_with_their_reason(undisturbed: Path, corpus: Path) -> None:
    rejects = {
        Path(row["source"]).name: row["reason"]
        for row in parquet.read_table(undisturbed / "rejects.parquet").to_pylist()
    }
    assert list(rejects) == REJECTED
    assert "truncated" in rejects["cut.png"]
    assert rejects["cut.tar::"] == "the tar cannot be read to its end: unexpected end of data"
    assert rejects["empty.jpg"] == "the file is empty"
    assert "PdfiumError" in rejects["no.pdf"]


def test_datasets_and_pyarrow_read_the_index(undisturbed: Path, tmp_path: Path) -> None:
    table = parquet.read_table(undisturbed / "index.parquet")
    assert table.num_rows == len(set(table["id"].to_pylist())) == 41
    loaded = datasets.load_dataset(
        "parquet", data_files=str(undisturbed / "index.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert loaded.num_rows == 41
    assert loaded[0]["grid"] == [2, 2]
    assert loaded.column_names == table.column_names
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["inputs"]["pages"] == 46
    assert manifest["settings"]["feature_dtype"] == "bfloat16"
    assert len(manifest["model"]["weights_sha256"]) == 64


def started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Two processes by Accelerate's launcher."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--monitor_interval",
        "0.2",
    ]
    launcher += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen([*launcher, str(SCRIPT), *command], env=environment, stdout=file, stderr=file)


def processes_by_kind(launcher: int) -> dict[str, list[psutil.Process]]:
    """The launcher, the processes it has started, and their workers."""
    first = psutil.Process(launcher)
    ranks = [child for child in first.children() if SCRIPT.name in " ".join(child.cmdline())]
    workers = [child for rank in ranks for child in rank.children() if "spawn_main" in " ".join(child.cmdline())]
    return {"launcher": [first], "rank": ranks, "worker": workers}


def wait_until(condition: Any, what: str, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} took more than {limit_s} s"
        time.sleep(0.02)


def finished_units(output: Path) -> int:
    return len(list((output / ".work" / "units").glob("unit-*.parquet")))


def kill_worker_after_a_batch(patch: pytest.MonkeyPatch) -> None:
    """Kills a worker of this process while the model computes."""
    original = extraction.Run.features_of

    def features_of(self: Any, batch: list[PreparedPage]) -> list[extraction.PageFeatures]:
        workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        workers[0].kill()
        return original(self, batch)

    patch.setattr(extraction.Run, "features_of", features_of)


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    undisturbed: Path, corpus: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, log = tmp_path / "features", tmp_path / "log"
    command = arguments(corpus, model_folder, output)
    chance = random.Random(0)
    with pytest.MonkeyPatch.context() as patch:
        kill_worker_after_a_batch(patch)
        assert script.main(command) == 2
    told = capsys.readouterr().err
    assert "DataLoader worker" in told
    assert "The same command goes on from here" in told
    assert finished_units(output) < 16
    for kind in KILLS:
        before = finished_units(output)
        process = started(command, log)
        try:
            wait_until(
                lambda process=process, before=before: finished_units(output) > before or process.poll() is not None,
                "the first unit",
            )
            assert process.poll() is None, log.read_text()[-3000:]
            everyone = processes_by_kind(process.pid)
            chance.choice(everyone[kind]).send_signal(signal.SIGKILL)
            assert process.wait(timeout=60) != 0
            family = [member for members in everyone.values() for member in members]
            _, alive = psutil.wait_procs(family, timeout=30)
            assert not alive, (kind, alive, log.read_text()[-3000:])
        finally:
            process.kill()
    process = started(command, log)
    assert process.wait(timeout=90) == 0, log.read_text()[-3000:]
    mine, theirs = contents(output), contents(undisturbed)
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if mine[name] != theirs[name]] == []


def test_a_finished_run_is_left_as_it_is_and_another_is_refused(
    undisturbed: Path, corpus: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(undisturbed)
    assert script.main(arguments(corpus, model_folder, undisturbed, "--fail-on-rejects")) == 1
    assert "41 page(s)" in capsys.readouterr().out
    assert script.main(arguments(corpus, model_folder, undisturbed, "--dpi", 100)) == 2
    assert "settings.dpi was 144.0, is 100.0" in capsys.readouterr().err
    assert script.main(arguments(corpus / "more", model_folder, undisturbed)) == 2
    assert "inputs.pages was 46, is 24" in capsys.readouterr().err
    with folder_lock(undisturbed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "LOCK_WAIT_S", 0)
        assert script.main(arguments(corpus, model_folder, undisturbed)) == 2
    assert "Another process is working on" in capsys.readouterr().err
    assert contents(undisturbed).keys() == before.keys()
    assert script.main(arguments(corpus, model_folder, undisturbed)) == 0
    assert contents(undisturbed) == before


def test_refused_runs_leave_nothing_behind(
    corpus: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(arguments(tmp_path / "missing", model_folder, tmp_path / "out")) == 2
    assert "missing" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    assert script.main(arguments(corpus, model_folder, tmp_path / "other")) == 2
    assert "holds something else, 'thesis.tex'" in capsys.readouterr().err
    assert script.main(arguments(corpus, str(tmp_path / "no-model"), tmp_path / "out")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    with pytest.raises(FileNotFoundError, match="holds no features"):
        FeatureStore(tmp_path / "other")


def test_memory_stays_flat(undisturbed: Path) -> None:
    report = json.loads((undisturbed.parent / "report").read_text())
    memory = report["memory_mb"]
    assert len(memory) == 16
    assert report["pages"] == 46
    assert max(memory[5:]) - memory[4] < 60, memory


def test_what_differs_is_named() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None}) == ["a.c was 2, is 3"]
