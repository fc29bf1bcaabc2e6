"""scripts/finetune.py as a module, so that tests need not start a process for each run."""

from pathlib import Path
from typing import Any

import pytest

from image_encoder_vit.commands import finetune

SCRIPT = Path(__file__).parent.parent / "scripts" / "finetune.py"


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends training as Ctrl-C does, in the step after this one."""
    original = finetune.Training.train_step

    def train_step(self: Any, batch: dict[str, Any]) -> float:
        if self.step == step:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(finetune.Training, "train_step", train_step)
