"""
scripts/finetune.py as a module, so that tests need not start a process for each run.

As a command: the same, but killed, as by `kill -9`, at the step before its arguments, or while the state after it is
being saved, if the step has an "s" in front.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from image_encoder_vit.commands import finetune
from image_encoder_vit.training import states

SCRIPT = Path(__file__).parent.parent / "scripts" / "finetune.py"


def at_step(step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Does something in the step after this one."""
    original = finetune.FineTuner.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            act()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(finetune.FineTuner, "training_step", training_step)


def at_save(step: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Does something when the state after this step has been written and is not yet marked as whole."""
    original = states.sync

    def sync(path: Path) -> None:
        if f"checkpoint-{step}/" in path.as_posix():
            act()
        original(path)

    monkeypatch.setattr(states, "sync", sync)


def interrupt() -> None:
    """Ends training as Ctrl-C does."""
    raise KeyboardInterrupt


def kill() -> None:
    """Ends this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    place, *arguments = sys.argv[1:]
    with pytest.MonkeyPatch.context() as patch:
        if place.startswith("s"):
            at_save(int(place[1:]), kill, patch)
        else:
            at_step(int(place), kill, patch)
        sys.exit(finetune.main(arguments))
