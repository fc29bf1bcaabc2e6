"""scripts/finetune.py as a module, so that tests need not start a process for each run."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "finetune.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune"] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


finetune = _load()


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends training as Ctrl-C does, in the step after this one."""
    original = finetune.Training.train_step

    def train_step(self: Any, batch: dict[str, Any]) -> float:
        if self.step == step:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(finetune.Training, "train_step", train_step)
