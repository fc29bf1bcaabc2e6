"""The encode command where something is wrong: it is told before the work, and nothing that was made is lost."""

import os
import re
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_corpora import SAMPLE_PDF, picture, png, tiff

from image_encoder_vit.commands import encode as script
from image_encoder_vit.storage.safetensors_writer import SafetensorsWriter


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(png(seed))
    return folder


def run(*arguments: object) -> int:
    return script.main(list(map(str, arguments)))


def test_outputs_are_checked_before_the_work(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "load_model", lambda *_: pytest.fail("the work has begun"))
    output = tmp_path / "out.safetensors"
    for arguments, message in [
        (["--output", tmp_path], "is a folder: name a file"),
        (["--output", images / "0.png" / "out"], "Cannot write"),
        (["--output", "/proc/out.safetensors"], "Cannot write '/proc/out.safetensors'"),
        (["--output", tmp_path / ("n" * 300)], "Cannot write .*File name too long"),
        (["--output", output, "--plot", tmp_path / "plot.unknown"], "--plot .*plot.unknown': unknown kind of picture"),
        (["--output", output, "--plot", tmp_path], "unknown kind of picture"),
        (["--output", tmp_path / "a.png", "--plot", tmp_path / "a.png"], "are the same file"),
    ]:
        assert run(images, *arguments) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert error.startswith("error: ")
        assert re.search(message, error), error
    assert run(images / "0.png", "--output", images / "0.png", "--overwrite") == 2
    assert "is an image to encode and an output" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    assert run(tmp_path / "absent.png", "--output", output) == 1
    assert "absent.png: skipped: No image file at" in capsys.readouterr().err


def test_names_pages_and_own_outputs(
    images: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "pages.tif").write_bytes(tiff(4, 5))
    (images / "pages.pdf").write_bytes(SAMPLE_PDF.read_bytes())
    with open(os.fsencode(images) + b"/caf\xe9.png", "wb") as file:
        file.write(png(6))
    output, plot = images / "features.safetensors", images / "plot.png"
    for _ in range(2):  # The second time its own picture lies among the images.
        command = (images, "--checkpoint", model_folder, "--output", output, "--plot", plot)
        assert run(*command, "--overwrite") == 0
        features = load_file(output)
        names = ["0.png", "1.png", "2.png", "caf\\xe9.png", *(f"pages.pdf#{n}" for n in range(3))]
        names += ["pages.tif#0", "pages.tif#1"]
        assert sorted(features) == [f"{images}/{name}" for name in names]
    assert "Traceback" not in capsys.readouterr().err
    with Image.open(plot) as drawn:
        assert drawn.height > 9 * 96
    with safe_open(output, "pt") as file:
        assert file.metadata()["pillow"]


def test_interrupted_it_keeps_what_it_has(
    images: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, original = tmp_path / "out.safetensors", script.Job.encode_image

    def interrupted(self: script.Job, name: str, page: Image.Image) -> object:
        if name.endswith("2.png"):
            signal.raise_signal(signal.SIGINT)
        return original(self, name, page)

    monkeypatch.setattr(script.Job, "encode_image", interrupted)
    command = (images, "--checkpoint", model_folder, "--output", output, "--plot", tmp_path / "plot.png", "--overwrite")
    assert run(*command) == 130
    told = capsys.readouterr()
    assert "error: interrupted: 1 of 3 image(s) were not tried." in told.err
    assert "Wrote the features of 2 image(s)" in told.out
    assert len(load_file(output)) == 2
    monkeypatch.setattr(script.Job, "encode_image", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(*command) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted; nothing was encoded yet"
    assert len(load_file(output)) == 2


def test_a_full_disk_keeps_what_was_written(
    images: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SafetensorsWriter.add

    def add(self: SafetensorsWriter, name: str, *tensor: object) -> None:
        if name.endswith("2.png"):
            raise OSError(28, "No space left on device")
        original(self, name, *tensor)

    monkeypatch.setattr(SafetensorsWriter, "add", add)
    assert run(images, "--checkpoint", model_folder, "--output", tmp_path / "out") == 2
    assert "No space left on device: 1 of 3 image(s) were not tried" in capsys.readouterr().err
    assert len(load_file(tmp_path / "out")) == 2


def test_no_page_is_held(images: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[weakref.ref[Image.Image]] = []
    alive: list[int] = []
    original = script.Job.encode_image

    def watched(self: script.Job, name: str, page: Image.Image) -> object:
        alive.append(sum(reference() is not None for reference in pages))
        pages.append(weakref.ref(page))
        return original(self, name, page)

    monkeypatch.setattr(script.Job, "encode_image", watched)
    for seed in range(10):
        picture(seed, (400, 300)).save(images / f"large{seed}.png")
    command = (images, "--checkpoint", model_folder, "--output", tmp_path / "out", "--plot", tmp_path / "plot.png")
    assert run(*command) == 0
    assert len(alive) == 13
    assert max(alive) <= 1


def test_a_file_written_as_tensors_come_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), 'a "quoted" name': torch.ones(4).bfloat16(), "none": torch.ones(0)}
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    with SafetensorsWriter(tmp_path / "ours", 1000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, names[tensor.dtype], tensor.shape, tensor.view(torch.uint8).numpy())
        writer.finish({"format": "pt", "images": "é"})
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").stat().st_size == 8 + 1000 + 24 + 8
    for name, tensor in load_file(tmp_path / "ours").items():
        assert torch.equal(tensor, tensors[name])
    with safe_open(tmp_path / "ours", "np") as file:
        assert file.metadata() == {"format": "pt", "images": "é"}
    with SafetensorsWriter(tmp_path / "small", 8) as writer:
        writer.add("a", "F32", (1,), np.zeros(1, np.float32))
        with pytest.raises(ValueError, match=r"The header needs \d+ bytes, 8 were kept"):
            writer.finish({})
