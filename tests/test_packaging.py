"""What is built, and what the README promises of it."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from builders import small_model

from image_encoder_vit import ImageEncoderViTImageProcessorPil
from image_encoder_vit.corpora.store import check_manifest, merge, shard_name, write_unit

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_package_and_its_licence(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "image_encoder_vit").rglob("*.py")}
    sources |= {
        "image_encoder_vit/cpu_kernel.c",
        "image_encoder_vit/runtimes/prepare_page.mjs",
        "image_encoder_vit/weights/model_card.md.jinja",
    }
    built = {"image_encoder_vit/_cpu_kernel.so"}  # where there is a compiler for it
    assert {name for name in names if name.startswith("image_encoder_vit/")} - built == sources
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert {name.split("/")[0] for name in names} == {"image_encoder_vit", names[-1].split("/")[0]}


def test_the_built_wheel_works_by_itself(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import image_encoder_vit, transformers\n"
        f"assert image_encoder_vit.__file__.startswith({str(tmp_path)!r})\n"
        "config = transformers.AutoConfig.for_model('image_encoder_vit', patch_size=32)\n"
        "assert type(config) is image_encoder_vit.ImageEncoderViTConfig\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)


def test_readme_names_make_targets_and_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert {"encode", "test"} <= set(re.findall(r"\bmake ([a-z-]+)", readme)) <= targets
    for path in re.findall(r"`((?:scripts|image_encoder_vit|samples|tests)/[\w./-]+)`", readme):
        assert (ROOT / path).exists(), path


def write_features(folder: Path) -> None:
    """Features of one page, as `image-encoder-vit extract` writes them."""
    row = {"id": "page.png#0", "source": "page.png", "page": 0, "shard": shard_name(0), "row": 0}
    check_manifest(folder, {"format": 1})
    write_unit(folder, 0, {0: torch.zeros(20, 16, 16)}, [row])
    assert merge(folder, 1) == (1, 0)


def test_readme_s_python_runs(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    small_model().save_pretrained(tmp_path / "encoder")
    ImageEncoderViTImageProcessorPil().save_pretrained(tmp_path / "encoder")
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    write_features(tmp_path / "features")
    # One after the other in one interpreter, as a reader would; a small model stands in for real weights.
    code = "\n".join(blocks).replace("path/to/encoder", "encoder").replace("path/to/features", "features")
    code += "\nassert features.shape == (1, 20, 16, 16) and (bottom - top) * 1024 == 64 * 1754\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
