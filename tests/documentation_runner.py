"""
Runs the blocks of documentation pages as a reader would, from top to bottom: Python in one namespace for each page, and
the package's own commands of shell blocks. All in this process, since each new one would import torch again.

Prints one line of JSON for each page: its name, how many blocks and commands ran, and the error, "" for none.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from builders import small_model
from deep import small_deep_encoder
from PIL import Image

from image_encoder_vit import ImageEncoderViTImageProcessorPil
from image_encoder_vit.commands import main as command

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(python|bash)\n(.*?)```", re.DOTALL)
PROGRAM = "image-encoder-vit"
# What needs the Hub, or measures for minutes. Lines with a word in capitals show a form, not a command.
NOT_RUN = re.compile(r"^(pull (?!\S*path/to|weights/|\./)|push (?!.*(--dry-run|--export-to))|benchmark\b)")
FORM = re.compile(r"(^|[\s=])[A-Z][A-Z_]{2,}(\.\.\.)?(?=$|\s)")


def prepare(folder: Path, *, with_features: bool) -> None:
    """A reader's folder: samples, small models where pages name trained ones, scans, images in classes, features."""
    shutil.copytree(ROOT / "samples", folder / "samples")
    for name in ("path/to/encoder", "weights/deepseek-ocr"):
        small_model().save_pretrained(folder / name)
        ImageEncoderViTImageProcessorPil().save_pretrained(folder / name)
    small_deep_encoder().save_pretrained(folder / "deep-encoder")
    ImageEncoderViTImageProcessorPil().save_pretrained(folder / "deep-encoder")
    (folder / "scans").mkdir()
    shutil.copy(ROOT / "samples" / "pages.pdf", folder / "scans" / "report.pdf")
    page = Image.open(ROOT / "samples" / "page.png").convert("RGB").resize((310, 438))
    page.save(folder / "photo_of_a_page.jpg")
    for kind in ("form", "letter"):
        (folder / "images" / kind).mkdir(parents=True)
        for number in range(2):
            page.rotate(5 * number).save(folder / "images" / kind / f"{number}.png")
    if with_features:
        options = ["--checkpoint", "path/to/encoder", "--output", "path/to/features", "--device", "cpu"]
        run_command(["extract", "samples", *options], folder)


def run_command(arguments: list[str], folder: Path) -> None:
    """
    Runs one of the package's commands in a folder.

    Raises:
        ValueError: If it fails, with what it told.
    """
    told = io.StringIO()
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            status = command(arguments)
    finally:
        os.chdir(before)
    if status:
        raise ValueError(f"{PROGRAM} {shlex.join(arguments)}: status {status}\n{told.getvalue()}")


def commands_of(block: str) -> list[list[str]]:
    """The arguments of the package's own commands in a shell block, as far as they can run here."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        _, program, arguments = line.partition(f"{PROGRAM} ")
        if program and not _.strip() and not NOT_RUN.match(arguments) and not FORM.search(arguments):
            found.append(shlex.split(arguments, comments=True))
    return found


def run_page(page: Path, folder: Path) -> tuple[int, int]:
    """Runs a page's blocks in a folder; how many Python blocks and commands that were."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    blocks = commands = 0
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, f"{page.name}, block {blocks + 1}", "exec"), namespace)
            blocks += 1
        else:
            for arguments in commands_of(block):
                run_command(arguments, folder)
                commands += 1
    return blocks, commands


def main(scratch: Path, pages: list[Path]) -> None:
    prepared = scratch / "prepared"
    prepared.mkdir()
    prepare(prepared, with_features=any("path/to/features" in page.read_text(encoding="utf-8") for page in pages))
    for page in pages:
        folder = scratch / page.stem
        shutil.copytree(prepared, folder)
        os.chdir(folder)
        error, counts = "", (0, 0)
        try:
            counts = run_page(page, folder)
        except BaseException:
            error = traceback.format_exc()
        os.chdir(scratch)
        outcome = {"page": page.name, "blocks": counts[0], "commands": counts[1], "error": error}
        sys.stdout.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name).resolve() for name in sys.argv[2:]])
