"""The house: what travels is the top floor, imports go one way, each room says what is public."""

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import DEEP_ENCODER_CODE, REMOTE_CODE

import image_encoder_vit

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "image_encoder_vit"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
# A room may use those that stand on a lower floor, and itself. The modules beside the weights stand on the lowest.
WITH_EXAMPLE = {
    "ImageEncoderViT",
    "ImageEncoderViTBackbone",
    "ImageEncoderViTConfig",
    "ImageEncoderViTForImageClassification",
    "ImageEncoderViTImageProcessorPil",
    "ImageEncoderViTModel",
}
FLOORS = [{"support", "storage"}, {"weights"}, {"corpora", "runtimes", "training", "sample"}, {"commands"}]


def imports_of(path: Path) -> Iterator[str]:
    """The rooms, or "" for the top floor, that a module imports relatively."""
    room = path.parent.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            absolute = [*room[: len(room) + 1 - node.level], *(node.module or "").split(".")]
            yield absolute[0] if absolute[0] in ROOMS else ""


def test_what_travels_is_the_top_floor() -> None:
    travelling = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert travelling == REMOTE_CODE | DEEP_ENCODER_CODE


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_what_stands_below_them(room: str) -> None:
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    allowed = {"", room}.union(*FLOORS[:floor])
    if room == "storage":
        allowed = {"storage", "support"}  # It knows no encoder.
    if room == "support":
        allowed = {"support"}
    for path in (PACKAGE / room).glob("*.py"):
        assert set(imports_of(path)) <= allowed, path


def test_the_top_floor_imports_no_room() -> None:
    for name in DEEP_ENCODER_CODE:
        assert set(imports_of(PACKAGE / name)) <= {""}, name


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in ("commands", "sample")])
def test_a_room_says_what_is_public(room: str) -> None:
    module = importlib.import_module(f"image_encoder_vit.{room}")
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None
        assert name in (PACKAGE / room / "__init__.py").read_text()
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = module.absent


def test_there_is_one_version() -> None:
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == (
        image_encoder_vit.__version__
    )
    assert f"({image_encoder_vit.__version__})" in (ROOT / "CHANGELOG.md").read_text()
    assert "version = " not in (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[0]


def test_nothing_names_a_script_that_a_user_of_the_package_lacks() -> None:
    """What is installed has no scripts/: messages, help and docstrings name the command."""
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"scripts/|pull_from_hub|extract_features\.py", path.read_text()), path


@pytest.mark.parametrize("name", [name for name in image_encoder_vit.__all__ if name[0].isupper()])
def test_public_classes_are_documented_by_an_example_that_is_true(name: str) -> None:
    public = getattr(image_encoder_vit, name)
    assert public.__doc__
    module = importlib.import_module(public.__module__)
    examples = doctest.DocTestFinder(recurse=False).find(public, name, globs=dict(vars(module)))
    assert name not in WITH_EXAMPLE or any(test.examples for test in examples)
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0
