"""Corpora as strangers have them, and extractions that are killed, cut and damaged: no page is lost, none is wrong."""

import bz2
import gzip
import io
import json
import lzma
import os
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from test_corpora import SAMPLE_PDF, as_in_started_processes, pages_of, picture, png, tiff, wait_until, write_tar

from image_encoder_vit.commands import extract as script
from image_encoder_vit.corpora import store as store_module
from image_encoder_vit.corpora.page_files import describe, open_pdf
from image_encoder_vit.corpora.pages import Page, PageReader, ReadOptions, find_pages, passed_over
from image_encoder_vit.corpora.store import FeatureStore, merge, write_unit
from image_encoder_vit.image_reading import tiff_pages

__all__ = ["as_in_started_processes"]  # A fixture.

TESTS = Path(__file__).parent


def outcomes(*inputs: object, **options: Any) -> dict[str, Any]:
    """What becomes of every page by its id without the folder: its pixels, or the reason why there are none."""
    reader = PageReader(ReadOptions(**options))
    found: dict[str, Any] = {}
    for page in pages_of(*inputs, **options):
        try:
            found[Path(page.id).name] = np.asarray(reader.read(page).image)
        except Exception as error:
            found[Path(page.id).name] = describe(error)
    return found


def is_picture(value: Any, seed: int) -> bool:
    return not isinstance(value, str) and np.array_equal(value, np.asarray(picture(seed)))


# Pages


def test_a_tiff_s_pages_are_read_beside_one_that_is_not(tmp_path: Path) -> None:
    data = bytearray(tiff(1, 2, 3, 4, 5))
    for broken in (0, 1, 4):
        damaged = data.copy()
        start = tiff_pages(data)[0][broken]
        (count,) = struct.unpack_from("<H", damaged, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            if struct.unpack_from("<H", damaged, entry)[0] == 258:  # Bits of a sample: none that PIL knows.
                damaged[entry + 2 : entry + 12] = struct.pack("<HIHH", 3, 1, 64, 0)
        (tmp_path / "pages.tiff").write_bytes(damaged)
        write_tar(tmp_path / "pages.tar", [("a.tiff", bytes(damaged))])
        for name in ("pages.tiff", "pages.tar"):
            pages = list(outcomes(tmp_path / name).values())
            assert len(pages) == 5
            assert [is_picture(page, seed) for seed, page in enumerate(pages, 1)] == [n != broken for n in range(5)]
            assert isinstance(pages[broken], str)


def test_what_is_left_of_a_tiff_that_is_cut_off_is_read(tmp_path: Path) -> None:
    data = tiff(1, 2, 3, 4, 5)
    starts, is_whole = tiff_pages(data)
    assert is_whole
    (tmp_path / "cut.tiff").write_bytes(data[: starts[4] - 1000])  # Amid the fourth page's pixels.
    pages = outcomes(tmp_path / "cut.tiff")
    assert list(pages) == [f"cut.tiff#{page}" for page in range(5)]
    assert [is_picture(page, seed) for seed, page in enumerate(pages.values(), 1)] == [True, True, True, False, False]
    assert "truncated" in pages["cut.tiff#3"]
    assert "list of pages breaks off" in pages["cut.tiff#4"]
    # A list of pages that comes back to its beginning has an end.
    loop = bytearray(data)
    last = starts[-1] + 2 + 12 * struct.unpack_from("<H", data, starts[-1])[0]
    loop[last : last + 4] = struct.pack("<I", starts[0])
    assert tiff_pages(loop) == (starts, True)


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b"\r\n", b"From: someone\n" * 40, b"x" * 5000], ids=len)
def test_a_pdf_behind_other_bytes_is_read(before: bytes, tmp_path: Path) -> None:
    pdf = before + SAMPLE_PDF.read_bytes()
    (tmp_path / "mail.pdf").write_bytes(pdf)
    write_tar(tmp_path / "mail.tar", [("mail.pdf", pdf)])
    expected = list(outcomes(SAMPLE_PDF).values())
    for name in ("mail.pdf", "mail.tar"):
        for actual, page in zip(outcomes(tmp_path / name).values(), expected, strict=True):
            assert np.array_equal(actual, page)


def test_files_are_what_they_hold_whatever_their_suffix(tmp_path: Path) -> None:
    (tmp_path / "pages.png").write_bytes(tiff(1, 2))
    (tmp_path / "pages.jpg").write_bytes(SAMPLE_PDF.read_bytes())
    (tmp_path / "page.tiff").write_bytes(png(3))
    (tmp_path / "page.jfif").write_bytes(png(4))
    pages = outcomes(tmp_path)
    assert list(pages) == [
        *("page.jfif#0", "page.tiff#0", "pages.jpg#0", "pages.jpg#1", "pages.jpg#2", "pages.png#0", "pages.png#1")
    ]
    assert is_picture(pages["page.jfif#0"], 4)
    assert is_picture(pages["pages.png#1"], 2)
    assert not any(isinstance(page, str) for page in pages.values())


def test_reasons_do_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    pdf = SAMPLE_PDF.read_bytes()
    (tmp_path / "a-locked.pdf").write_bytes(pdf.replace(b"trailer", b"trailer\n<</Encrypt 99 0 R>>\n"))
    (tmp_path / "b-damaged.pdf").write_bytes(b"%PDF-1.7 but no more")
    (tmp_path / "c-no-pages.pdf").write_bytes(
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Count 0/Kids[]>>endobj\n"
        b"trailer<</Root 1 0 R>>\n%%EOF"
    )
    together = outcomes(tmp_path)
    for name, reason in together.items():
        for other in sorted(tmp_path.iterdir()):
            outcomes(other)
            assert outcomes(tmp_path / name.partition("#")[0]) == {name: reason} or name.startswith("a-")
    assert "PdfiumError" in together["b-damaged.pdf#0"]
    assert "0x" not in "".join(reason for reason in together.values() if isinstance(reason, str))
    with pytest.raises(ValueError, match="it is encrypted"):
        open_pdf(b"%PDF-1.7 /Encrypt")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_tars_in_every_wrapping(suffix: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "inner.tar", [("in/3.png", png(3)), ("4.tif", tiff(4, 5))])
    members = [("./1.png", png(1)), ("._1.png", b"AppleDouble"), ("__MACOSX/._2.jpg", b"AppleDouble")]
    members += [("a/.hidden/2.png", png(2)), ("2.txt", b"label"), ("inner.tar", (tmp_path / "inner.tar").read_bytes())]
    members += [("inner.tgz", gzip.compress(b"x")), ("rows.parquet", b"PAR1"), ("6.png", png(6))]
    write_tar(tmp_path / "plain", members)
    wrap = {".gz": gzip.compress, ".tgz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    data = (tmp_path / "plain").read_bytes()
    path = tmp_path / f"pages{suffix}"
    path.write_bytes(wrap.get(path.suffix, bytes)(data))
    pages = outcomes(path)
    seeds = {"1.png#0": 1, "3.png#0": 3, f"{path.name}::inner.tar::4.tif#0": 4, "6.png#0": 6}
    for name, value in pages.items():
        for ending, seed in seeds.items():
            if name.endswith(ending):
                assert is_picture(value, seed), name
    assert len(pages) == 1 + 3 + 2 + 1
    assert [value for value in pages.values() if isinstance(value, str)] == [
        *("a compressed tar inside of a tar: take it out", "a Parquet file inside of a tar: take it out")
    ]


def test_headers_of_tars_do_not_fill_the_memory(tmp_path: Path) -> None:
    bomb = tarfile.TarInfo("bomb.tif")
    bomb.size = 1 << 40
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, 1 << 40
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "a.png"
    before = resident_mb()
    for header in (bomb, long_name, extended, link):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            good = tarfile.TarInfo("good.png")
            good.size = len(png(1))
            tar.addfile(good, io.BytesIO(png(1)))
        data = (tmp_path / "x.tar").read_bytes()[: 512 + -(-len(png(1)) // 512) * 512]
        for wrap in (bytes, gzip.compress):
            (tmp_path / "x.tar").write_bytes(wrap(data + header.tobuf(tarfile.GNU_FORMAT) + bytes(2000)))
            good_page, *others = outcomes(tmp_path / "x.tar").values()
            assert is_picture(good_page, 1)
            assert others
            assert all(isinstance(reason, str) for reason in others)
    assert resident_mb() - before < 200


def resident_mb() -> float:
    return psutil.Process().memory_info().rss / 1e6


def test_rows_hold_lists_pdfs_and_several_pages(tmp_path: Path) -> None:
    def cell(data: bytes) -> dict[str, Any]:
        return {"bytes": data, "path": None}

    lists = [[cell(png(1)), cell(tiff(2, 3))], [], [cell(b"no image"), cell(png(4))]]
    parquet.write_table(pa.table({"images": lists, "label": [0, 1, 2]}), tmp_path / "lists.parquet")
    pages = outcomes(tmp_path / "lists.parquet")
    assert list(pages) == [
        *(f"lists.parquet::0#{page}" for page in range(3)),
        *("lists.parquet::1#0", "lists.parquet::2#0", "lists.parquet::2#1"),
    ]
    assert [is_picture(value, seed) for value, seed in zip(pages.values(), (1, 2, 3, 0, 0, 4), strict=True)] == [
        *(True, True, True, False, False, True)
    ]
    assert pages["lists.parquet::1#0"] == "the row has no image"
    singles = [cell(png(1)), cell(SAMPLE_PDF.read_bytes()), cell(tiff(5, 6)), cell(None)]
    for name, column in (("cells", "image"), ("bytes", "scan")):
        values = singles if name == "cells" else [value["bytes"] for value in singles]
        parquet.write_table(pa.table({column: values}), tmp_path / f"{name}.parquet", row_group_size=2)
        pages = outcomes(tmp_path / f"{name}.parquet")
        ids = ["#0", "::1#0", "::1#1", "::1#2", "::2#0", "::2#1", "#3"]
        assert list(pages) == [f"{name}.parquet{page}" for page in ids]
        assert is_picture(pages[f"{name}.parquet::2#1"], 6)
        assert np.array_equal(pages[f"{name}.parquet::1#2"], outcomes(SAMPLE_PDF)["pages.pdf#2"])
    features = datasets.Features({"pages": datasets.Sequence(datasets.Image())})
    datasets.Dataset.from_dict({"pages": lists[:2]}, features=features).save_to_disk(tmp_path / "saved")
    pages = outcomes(tmp_path / "saved")
    assert list(pages) == [*(f"saved:train::0#{page}" for page in range(3)), "saved:train::1#0"]
    assert is_picture(pages["saved:train::0#2"], 3)


def test_cells_name_files_below_their_folder_only(tmp_path: Path) -> None:
    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "data" / "more" / "1.png").write_bytes(png(1))
    (tmp_path / "secret.png").write_bytes(png(2))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    named = ["more/1.png", "../secret.png", str(tmp_path / "secret.png"), "/dev/zero", "link.png", "more", "gone.png"]
    rows = [{"bytes": None, "path": name} for name in named]
    parquet.write_table(pa.table({"image": rows}), tmp_path / "data" / "rows.parquet")
    pages = list(outcomes(tmp_path / "data" / "rows.parquet").values())
    assert is_picture(pages[0], 1)
    assert all("outside of its dataset's folder" in page for page in pages[1:5])
    assert all("not there, or is no regular one" in page for page in pages[5:])
    pages = list(outcomes(tmp_path / "data" / "rows.parquet", any_path=True).values())
    assert [is_picture(page, 2) for page in pages[1:5]] == [True, True, False, True]


# What was named and what was not


def test_what_was_not_named_never_stops_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "locked").mkdir(parents=True)
    (folder / "1.png").write_bytes(png(1))
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "around").symlink_to(folder)
    (folder / "labels.csv").write_text("a,b")
    (folder / "README").write_text("text")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "2.png").write_bytes(png(2))
    (folder / "linked").symlink_to(tmp_path / "linked")
    parquet.write_table(pa.table({"text": ["a"]}), folder / "text.parquet")
    parquet.write_table(pa.table({"front": [png(1)], "back": [png(2)]}), folder / "two.parquet")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder / "saved")
    (folder / "half.parquet").write_bytes(b"PAR1 and no more")
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(png(3))
    pages = outcomes(folder)
    reasons = {name: value for name, value in pages.items() if isinstance(value, str)}
    assert set(pages) - set(reasons) == {"1.png#0", "2.png#0", "caf\\xe9.png#0"}
    assert reasons.pop("gone.png#0") == "a link to nothing"
    assert reasons.pop("pipe.png#0") == "no regular file"
    assert "cannot be read as Parquet" in reasons.pop("half.parquet#0")
    assert "0 columns that may hold images" in reasons.pop("text.parquet#0")
    assert "2 columns that may hold images" in reasons.pop("two.parquet#0")
    assert "0 columns that may hold images" in reasons.pop("saved#0")
    assert reasons == {}
    assert passed_over([str(folder)]) == {".csv": 1, "": 1}
    assert [page.problem for page in find_pages([str(folder / "pipe.png")], ReadOptions())] == ["no regular file"]
    for name in ("text.parquet", "saved"):
        with pytest.raises(ValueError, match="0 columns that may hold images"):
            pages_of(folder / name)
    stored = next(page for page in pages_of(folder) if "xe9" in page.source).storable()
    assert stored.problem == "the name is not UTF-8: rename it"
    stored.path.encode()


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "1.png").write_bytes(png(1))
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    reasons = outcomes(tmp_path)
    assert reasons["locked#0"] == "the folder cannot be read: Permission denied"
    assert is_picture(reasons["1.png#0"], 1)


# Runs


def command(corpus: object, model_folder: str, output: Path, *options: object) -> list[str]:
    given = [corpus, "--checkpoint", model_folder, "--output", output, "--device", "cpu", "--workers", 0]
    return list(map(str, [*given, "--pages-per-shard", 2, *options]))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(png(seed))
    (folder / "bad.png").write_bytes(png(4)[:60])
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_at_every_place_it_goes_on_to_the_same_bytes(corpus: Path, model_folder: str, tmp_path: Path) -> None:
    program = [sys.executable, TESTS / "extraction_kills.py", corpus, model_folder, tmp_path]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, program)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    # Three calls for each file: its fsync, its renaming, the folder's fsync.
    assert told["places"] >= 3 * 8
    assert len([name for name in told["files"] if name.startswith("shards/")]) == 2
    assert told["wrong"] == []


def test_what_is_missing_or_cut_is_made_again_and_verify_finds_the_rest(
    corpus: Path, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = corpus / "features"  # Inside of its own input: left out.
    run = command(corpus, model_folder, output)
    assert script.main(run) == 0
    told = capsys.readouterr()
    assert "3 page(s) in " in told.out
    assert f"rejected: {corpus.as_posix()}/bad.png#0: OSError: image file is truncated" in told.err
    expected = files_of(output)
    first, second = sorted((output / "shards").iterdir())
    table = parquet.read_table(output / "index.parquet").to_pylist()
    assert {row["shard_bytes"] for row in table} == {first.stat().st_size, second.stat().st_size}
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    store = FeatureStore(output)
    for page_id, shard in zip(list(store)[::2], (first, second), strict=True):
        with pytest.raises(OSError, match=rf"The shard '.*{shard.name}' is missing or damaged: .*--verify"):
            store[page_id]
    assert script.main(["--verify", "--output", str(output)]) == 1
    told = capsys.readouterr().err
    assert f"{first} cannot be read: No such file" in told
    assert f"{second} has {len(expected[f'shards/{second.name}']) - 1} of" in told
    assert script.main(run) == 0
    assert files_of(output) == expected
    flipped = bytearray(second.read_bytes())
    flipped[-1] ^= 1
    second.write_bytes(flipped)
    assert script.main(["--verify", "--output", str(output)]) == 1
    assert "other bytes than were written" in capsys.readouterr().err
    second.unlink()
    assert script.main(run) == 0
    capsys.readouterr()
    assert script.main(["--verify", "--output", str(output)]) == 0
    assert "3 page(s) in 2 shard(s): all as they were written" in capsys.readouterr().out
    assert files_of(output) == expected


def test_a_run_of_nothing_but_rejects_is_an_error(
    corpus: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(command(corpus / "bad.png", model_folder, tmp_path / "out")) == 1
    assert "error: no page could be encoded" in capsys.readouterr().err
    assert script.main(["--output", str(tmp_path / "none"), "--verify"]) == 2
    assert "holds no features" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--output", str(tmp_path / "none")])


def test_large_scans_are_read_where_they_are_allowed(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (1500, 1000), 200).save(tmp_path / "scan.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    assert script.main(command(tmp_path / "scan.png", model_folder, tmp_path / "out")) == 1
    (reject,) = store_module.rejects(tmp_path / "out")
    assert "exceeds limit of 1000000 pixels" in reject["reason"]
    assert script.main(command(tmp_path / "scan.png", model_folder, tmp_path / "all", "--max-megapixels", 1.5)) == 0
    assert len(FeatureStore(tmp_path / "all")) == 1


def test_interrupted_it_says_one_line(corpus: Path, model_folder: str, tmp_path: Path) -> None:
    for seed in range(400):
        (corpus / f"more{seed}.png").write_bytes(png(0))
    output = tmp_path / "features"
    given = command(corpus, model_folder, output, "--workers", 1, "--pages-per-shard", 1)
    process = subprocess.Popen(
        [sys.executable, "-m", "image_encoder_vit", "extract", *given],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: list(output.glob(".work/units/*.parquet")), "the first unit", limit_s=200)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=100)
    lines = [line for line in told.replace("\r", "\n").splitlines() if line.strip() and "page/s]" not in line]
    assert lines[-1] == "error: interrupted; the same command goes on from here"
    assert [line for line in lines if "page" not in line and "rejected" not in line] == lines[-1:]
    assert process.returncode == 130


def test_threads_share_a_store_with_few_open_shards(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    for unit in range(40):
        name = {"id": f"{unit}#0", "source": str(unit), "page": 0, "original_size": (1, 1), "grid": (1, 1), "row": 0}
        row = name | {"valid_region": (0, 0, 1, 1), "sha256": "", "reason": None}
        write_unit(tmp_path, unit, {0: torch.full((2, 1, 1), float(unit))}, [row])
    merge(tmp_path, 40)
    store = FeatureStore(tmp_path)
    most, wrong = [0], []

    def read(start: int) -> None:
        for step in range(400):
            unit = (start + step * 7) % 40
            if store[f"{unit}#0"].flatten().tolist() != [unit, unit]:
                wrong.append(unit)
            most[0] = max(most[0], len(store._open))

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert most[0] <= store_module.MAX_OPEN_SHARDS


def test_pages_of_long_files_take_no_longer_than_others(tmp_path: Path) -> None:
    small = Image.new("1", (8, 8))
    small.save(tmp_path / "long.tiff", save_all=True, append_images=[small] * 999)
    start = time.perf_counter()
    pages = pages_of(tmp_path / "long.tiff")
    assert len(pages) == 1000
    counted_s = time.perf_counter() - start
    reader = PageReader(ReadOptions())
    reader.read(pages[0])
    times = []
    for page in (pages[1], pages[-1]):
        start = time.perf_counter()
        for _ in range(20):
            reader.read(page)
        times.append(time.perf_counter() - start)
    assert times[1] < 10 * times[0] + 0.5
    assert counted_s < 5
    assert isinstance(pages[0], Page)
