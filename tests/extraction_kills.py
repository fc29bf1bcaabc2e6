"""
Extracts a corpus again and again, each time killed at another fsync or rename, and goes on: a
program for test_extraction_faults.py, in a process of its own since it forks.

Prints a JSON object: how many places there are to be killed at, and those after which the files were not the same.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from image_encoder_vit.commands import extract

FUNCTIONS = ("fsync", "rename", "replace")


def extract_in_child(command: list[str], killed_at: int | None) -> tuple[int, int]:
    """The exit status of an extraction that is killed before call `killed_at` of these functions; and their calls."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0
        fsync = os.fsync

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                if calls == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                # A killed process leaves what it wrote, brought to the disk or not: no need to wait for the disk.
                return None if original is fsync else original(*arguments, **options)

            return call

        for name in FUNCTIONS:
            setattr(os, name, counted(getattr(os, name)))
        status = 3
        try:
            with open(os.devnull, "w") as sys.stdout:
                sys.stderr = sys.stdout
                status = extract.main(command)
            os.write(writer, str(calls).encode())
        finally:
            os._exit(status)
    os.close(writer)
    calls_made = int(os.read(reader, 100) or 0)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), calls_made


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> None:
    corpus, checkpoint, work = sys.argv[1:]
    torch.set_num_threads(1)

    def command(output: Path) -> list[str]:
        given = [
            corpus,
            "--checkpoint",
            checkpoint,
            "--output",
            output,
            "--device",
            "cpu",
            "--workers",
            0,
            "--pages-per-shard",
            2,
        ]
        return list(map(str, given))

    undisturbed = Path(work, "undisturbed")
    status, places = extract_in_child(command(undisturbed), None)
    assert status == 0, status
    expected = files_of(undisturbed)
    wrong = []
    for place in range(places):
        output = Path(work, "killed")
        killed, _ = extract_in_child(command(output), place)
        status, _ = extract_in_child(command(output), None)
        if killed != -signal.SIGKILL or status != 0 or files_of(output) != expected:
            wrong.append([place, killed, status, sorted(files_of(output))])
        shutil.rmtree(output)
    sys.stdout.write(json.dumps({"places": places, "wrong": wrong, "files": sorted(expected)}))


if __name__ == "__main__":
    main()
