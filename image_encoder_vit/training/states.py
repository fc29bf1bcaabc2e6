"""
The states of a training under way that it can resume from: `Trainer`'s checkpoints, of which only whole ones count,
whenever the process is killed.
"""

import math
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..storage.atomic_file import atomic_file, sync
from ..storage.output_folder import discard

WHOLE = "whole"  # An empty file, written into a state when every process has written its part.


def newest_state(folder: Path) -> Path | None:
    """The last whole state below a folder, None if there is none."""
    states = [path for path in folder.glob("checkpoint-*") if (path / WHOLE).is_file()]
    return max(states, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class StateKeeper(TrainerCallback):
    """
    Marks each state when it is whole and on the disk, and only then removes those before it. `Trainer`'s own
    `save_total_limit` removes the last one while another process may still be writing the next.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Called by `Trainer` in every process, when it has written its part."""
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return control
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in sorted(folder.rglob("*")):
            sync(path)
        with atomic_file(folder / WHOLE) as partial:
            partial.touch()
        kept = {folder.name, Path(state.best_model_checkpoint or "").name}
        for other in folder.parent.glob("checkpoint-*"):
            if other.name not in kept:
                (other / WHOLE).unlink(missing_ok=True)
                discard(other)
        return control


class StopAtNonFiniteLoss(TrainerCallback):
    """Ends a training that cannot recover, instead of spending hours on it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Called by `Trainer` with the mean loss of the last steps.

        Raises:
            ValueError: If it is infinite or not a number.
        """
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(float(loss)):
            raise ValueError(f"The loss is {loss} at step {state.global_step}: try a smaller --learning-rate.")
