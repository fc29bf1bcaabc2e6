"""README and docs: what they show runs, what they link to is there, and the first page stays one."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import documentation_runner
import pytest

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "docs" / "README.md"
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {INDEX})]
ALL = [*PAGES, INDEX, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
MAX_README_LINES = 170
RUNTIMES = "runtimes.md"
MISSING = re.compile(r"ModuleNotFoundError: No module named '(\w+)'|ImportError: (.* comes with the extra .*)")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How each page ran: all in one process, but OpenVINO and ONNX Runtime in one without pyarrow's allocator."""
    found = {}
    for pages in ([page for page in PAGES if page.name != RUNTIMES], [ROOT / "docs" / RUNTIMES]):
        command = [sys.executable, documentation_runner.__file__, str(tmp_path_factory.mktemp("docs"))]
        result = subprocess.run([*command, *map(str, pages)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found |= {outcome["page"]: outcome for outcome in map(json.loads, result.stdout.splitlines())}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_runs(page: Path, outcomes: dict[str, dict[str, Any]]) -> None:
    outcome = outcomes[page.name]
    if missing := MISSING.search(outcome["error"]):
        pytest.skip(f"needs {missing[1] or missing[2]}")
    assert not outcome["error"], outcome["error"]
    blocks = len(re.findall(r"^```python$", page.read_text(), re.MULTILINE))
    assert outcome["blocks"] == blocks


def test_commands_are_told_from_forms_and_from_what_needs_the_hub() -> None:
    block = (
        "pip install .\n"
        "image-encoder-vit encode page.png --output a.safetensors  # a comment\n"
        "image-encoder-vit extract scans \\\n    --output out\n"
        "image-encoder-vit encode IMAGE... --checkpoint FOLDER_OR_HUB_ID\n"
        "image-encoder-vit pull deepseek-ai/DeepSeek-OCR weights/deepseek-ocr\n"
        "image-encoder-vit push weights/tuned USER/NAME\n"
        "image-encoder-vit benchmark\n"
    )
    assert documentation_runner.commands_of(block) == [
        ["encode", "page.png", "--output", "a.safetensors"],
        ["extract", "scans", "--output", "out"],
    ]


def test_the_first_page_is_one() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= MAX_README_LINES
    assert "torch.inference_mode()" in re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for heading in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", text):
        name, _, anchor = heading.partition("#")
        if not re.match(r"[a-z]+:", name):
            assert anchor in anchors(page.parent / name if name else page), f"{page.name} links to {heading}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_make_targets_and_files_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {target for page in ALL for target in re.findall(r"\bmake ([a-z-]+)`", page.read_text())}
    assert {"encode", "test", "dist"} <= named <= targets
    for page in ALL:
        for path in re.findall(r"`((?:scripts|image_encoder_vit|samples|tests|docs)/[\w./-]+)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name} names {path}"
