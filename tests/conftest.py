"""Fixtures that several tests share, and the order in which things are imported."""

import os
import sys

# Before any test imports huggingface_hub, which reads it once: the tests load from folders, never from the Hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator

import pytest
from builders import small_model
from fresh_python import FreshPython
from suite_outcomes import pytest_configure, pytest_runtest_makereport, pytest_terminal_summary  # noqa: F401  Hooks.

from image_encoder_vit import ImageEncoderViTImageProcessorPil, ImageEncoderViTModel


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What a test compiles is forgotten after it: torch bounds how often one function may be compiled in a process."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture
def model() -> ImageEncoderViTModel:
    return small_model()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small model and its processor (canvas 128 x 128 px), as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    ImageEncoderViTImageProcessorPil(size=128).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshPython]:
    """Runs code in interpreters that do not know this package: `run_python(code, *arguments, cache=folder)`."""
    python = FreshPython(tmp_path_factory.mktemp("python"))
    yield python
    python.close()
