"""
transformers' own common test suites, which the wheel lacks and the source archive on PyPI holds, fetched for the pinned
version into a cache and imported from there with stand-ins for what the archive lacks in its turn.

As a command it only fetches.
"""

import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".suites_cache"
PACKAGE = "transformers_common_tests"
SUITES = ("backbone_common", "configuration_common", "image_processing_common", "modeling_common", "pipeline_mixin")
PINNED = next(
    line.partition("==")[2]
    for line in (ROOT / "constraints.txt").read_text().split()
    if line.startswith("transformers==")
)


class SuitesUnavailable(Exception):
    """The suites cannot be had here; the message says why."""


def fetch() -> Path:
    """
    The folder of the pinned version's suites, fetched through pip where the cache lacks it.

    Raises:
        SuitesUnavailable: If another version is installed, or pip cannot fetch the archive.
    """
    if transformers.__version__ != PINNED:
        raise SuitesUnavailable(
            f"The suites are run for the pinned transformers {PINNED}; {transformers.__version__} is installed."
        )
    folder = CACHE / f"transformers-{PINNED}"
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            _download(Path(scratch))
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                prefix = f"{folder.name}/tests/"
                members = [member for member in archive if member.isfile() and member.name.startswith(prefix)]
                archive.extractall(scratch, members=members, filter="data")
            # Whole or not at all, also when two processes fetch at once.
            if not folder.is_dir():
                shutil.move(Path(scratch) / folder.name, folder)
    return folder / "tests"


def _download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--no-build-isolation", "--dest", str(folder), f"transformers=={PINNED}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SuitesUnavailable(
            f"pip cannot fetch the source archive of transformers {PINNED}: {result.stderr.strip()}"
        )


def load() -> dict[str, types.ModuleType]:
    """
    The modules of the suites by name, such as "modeling_common".

    Raises:
        SuitesUnavailable: As `fetch` does.
    """
    folder = fetch()
    _add_module(PACKAGE, __path__=[str(folder)])
    # Suites of their own that ModelTesterMixin knows of: the export of transformers' exporters, and generate().
    for path, name in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        _add_module(f"{PACKAGE}.{path.partition('.')[0]}", __path__=[])
        _add_module(f"{PACKAGE}.{path}", **{name: type(name, (), {})})
    _add_module(f"{PACKAGE}.utils", __path__=[])
    _add_module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=CONFIG_COMMON_KWARGS)
    _add_module("fetch_hub_objects_for_ci", url_to_local_path=lambda url: str(ROOT / "samples" / "page.png"))
    summary = folder / "utils" / "tiny_model_summary.json"
    summary.parent.mkdir(exist_ok=True)
    summary.write_text("{}")
    with (
        # Would execute transformers' source a second time, over the installed one.
        patch("transformers.utils.direct_transformers_import", lambda *_, **__: transformers),
        # Asked for by the pipelines' tests of image features, although only other models' features need timm.
        patch("transformers.testing_utils.require_timm", lambda test: test),
        patch.object(sys, "path", list(sys.path)),
    ):
        names = (*SUITES, "training_mixin")
        return {name: importlib.import_module(f"{PACKAGE}.test_{name}") for name in names}


def _add_module(name: str, **content: object) -> None:
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


# What every configuration of transformers takes, each with a value that is not the default.
CONFIG_COMMON_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": torch.float16,
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "letter", 1: "form"},
    "label2id": {"letter": 0, "form": 1},
    "problem_type": "regression",
}

if __name__ == "__main__":
    try:
        fetch()
    except SuitesUnavailable as reason:
        sys.exit(str(reason))
