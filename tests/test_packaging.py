"""What is built: the wheel, and the distributions of `make dist`."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SAMPLE_FILES = {
    "README.md",
    "config.json",
    "layout_head.safetensors",
    "measures.json",
    "model.safetensors",
    "preprocessor_config.json",
}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_package_and_its_licence(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "image_encoder_vit").rglob("*") if path.is_file()}
    sources = {name for name in sources if "__pycache__" not in name and not name.endswith(".so")}
    assert "image_encoder_vit/py.typed" in sources
    built = {"image_encoder_vit/_cpu_kernel.so"}  # where there is a compiler for it
    assert {name for name in names if name.startswith("image_encoder_vit/")} - built == sources
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert {name.split("/")[0] for name in names} == {"image_encoder_vit", names[-1].split("/")[0]}


def test_the_sample_encoder_is_small_and_brings_no_code(wheel: zipfile.ZipFile) -> None:
    sizes = {
        Path(entry.filename).name: entry.file_size
        for entry in wheel.infolist()
        if entry.filename.startswith("image_encoder_vit/sample/")
    }
    assert sizes.keys() == SAMPLE_FILES
    assert sum(sizes.values()) <= 4_000_000


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
