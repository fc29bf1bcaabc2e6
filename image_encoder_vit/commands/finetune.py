"""
Fine-tunes the encoder with a classification head on a folder of images, one subfolder for each class.

One process, or several: `accelerate launch -m image_encoder_vit.commands.finetune ...`.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Sampler

from .. import ImageEncoderViTConfig, ImageEncoderViTImageProcessorPil, ImageEncoderViTModel
from ..storage.output_folder import check_free, discard, publish, unfinished_folder, unfinished_path
from ..training.fine_tuning import (
    ImageEncoderViTClassifier,
    ImageFolder,
    batch_indices,
    save_classifier,
    with_lora,
)
from .frame import run_command
from .loading import load_model
from .options import add_option, command_parser

WARMUP_SHARE = 0.05
MAX_GRADIENT_NORM = 1.0
STATES = "states"  # In the unfinished folder: what --resume needs.
RECORD = "record.json"

RANDOM_WEIGHTS_NOTICE = (
    "No --checkpoint given: training a full-size encoder from RANDOM weights, which takes far more images than "
    "fine-tuning does; see the README for real weights."
)


def main(argv: Sequence[str] | None = None) -> int:
    after_interrupt = "with --save-every-steps, the same command and --resume goes on from the last state"
    return run_command(finetune, parse_arguments(argv), after_interrupt=after_interrupt)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("finetune", __doc__)
    parser.add_argument("images", type=Path, metavar="FOLDER", help="images, one subfolder for each class")
    add_option(parser, "--checkpoint", help="where the encoder is; without it, random weights are trained")
    add_option(parser, "--output", metavar="FOLDER", help="where the tuned encoder goes")
    parser.add_argument("--epochs", type=positive(float), default=3, help="passes over the images (default: 3)")
    parser.add_argument("--batch-size", type=positive(int), default=4, help="images a step and process (default: 4)")
    parser.add_argument("--learning-rate", type=positive(float), default=1e-4, help="at its peak (default: 1e-4)")
    parser.add_argument(
        "--image-size", type=positive(int), metavar="PX", help="side of the canvas; default: as trained"
    )
    parser.add_argument("--lora", type=positive(int), metavar="RANK", help="train adapters of this rank, then merge")
    parser.add_argument("--freeze-encoder", action="store_true", help="train the head only")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--workers", type=not_negative, default=0, help="processes that decode images (default: 0)")
    parser.add_argument("--save-every-steps", type=positive(int), metavar="STEPS", help="keep the state for --resume")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run has saved its state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is an accelerator")
    arguments = parser.parse_args(argv)
    if arguments.lora and arguments.freeze_encoder:
        parser.error("--lora trains adapters inside the encoder: leave out --freeze-encoder")
    return arguments


def positive(kind: type) -> Any:
    """A type for argparse: a finite number above 0."""

    def parse(text: str) -> Any:
        number = kind(text)
        if not 0 < number < math.inf:
            raise ValueError
        return number

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def not_negative(text: str) -> int:
    """A type for argparse: an integer of 0 or more."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def finetune(arguments: argparse.Namespace) -> int:
    """
    Trains and writes the output folder, which appears complete or not at all.

    Raises:
        OSError, ValueError, ImportError: With a message for the user.
    """
    check_free(arguments.output)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision, cpu=arguments.cpu)
    processor = load_processor(arguments)
    images = ImageFolder(arguments.images, processor)
    settings = settings_of(arguments, images, accelerator.num_processes)
    with output_in_work(arguments.output, accelerator) as folder:
        states = folder / STATES
        state = check_states(states, settings, arguments.resume)
        accelerator.wait_for_everyone()  # All have looked before one writes.
        if accelerator.is_main_process and arguments.checkpoint is None:
            print(RANDOM_WEIGHTS_NOTICE)
        set_seed(arguments.seed)
        training = Training(accelerator, build(arguments, len(images.classes)), images, settings)
        if state is not None:
            training.load(state)
            accelerator.print(f"Resumed after step {training.step} of {training.total_steps}")
        training.run(states, arguments)
        weights = accelerator.get_state_dict(training.model)
        if accelerator.is_main_process:
            classifier = build(arguments, len(images.classes))
            classifier.load_state_dict(weights)
            tuned = folder / "tuned"
            discard(tuned)  # of a process that was killed here
            tuned.mkdir()
            save_classifier(classifier, images.classes, processor, tuned)
            publish(tuned, arguments.output)
            discard(folder)
            print(f"Wrote the encoder, its processor and the head to {arguments.output}")
        accelerator.wait_for_everyone()
    return 0


@contextmanager
def output_in_work(output: Path, accelerator: Accelerator) -> Iterator[Path]:
    """
    The unfinished folder of the output, locked by the main process. After an error it stays only if there is a state
    to resume from.
    """
    if not accelerator.is_main_process:
        yield unfinished_path(output)
        return
    with unfinished_folder(output) as folder:
        try:
            yield folder
        finally:
            if not any((folder / STATES).glob("step-*")):
                discard(folder)


def load_processor(arguments: argparse.Namespace) -> Any:
    size = {"size": arguments.image_size} if arguments.image_size else {}
    if arguments.checkpoint is None:
        return ImageEncoderViTImageProcessorPil(**size)
    return ImageEncoderViTImageProcessorPil.from_pretrained(arguments.checkpoint, **size)


def build(arguments: argparse.Namespace, num_classes: int) -> ImageEncoderViTClassifier:
    """
    The classifier that is trained, in float32: weights of the checkpoint or random ones, the rest by `arguments`.

    Raises:
        OSError, ValueError: If the checkpoint cannot be loaded as an encoder.
        ImportError: If LoRA is asked for and PEFT is not installed.
    """
    if arguments.checkpoint is None:
        encoder: Any = ImageEncoderViTModel(ImageEncoderViTConfig())
    else:
        encoder = load_model(arguments.checkpoint, torch.float32)
    if arguments.gradient_checkpointing:
        # Renamed in later releases of transformers. Without re-entry it works where the first layer is frozen too.
        enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    encoder.requires_grad_(not arguments.freeze_encoder)
    if arguments.lora:
        encoder = with_lora(encoder, arguments.lora)
    return ImageEncoderViTClassifier(encoder, num_classes).train()


def settings_of(arguments: argparse.Namespace, images: ImageFolder, processes: int) -> dict[str, Any]:
    """What must be the same for a resumed run to end as one that was never interrupted."""
    names = ("checkpoint", "epochs", "batch_size", "learning_rate", "image_size", "lora", "freeze_encoder")
    settings = {name: getattr(arguments, name) for name in (*names, "mixed_precision", "seed")}
    files = [str(path.relative_to(arguments.images)) for path, _ in images.entries]
    return settings | {"processes": processes, "files": files}


def check_states(states: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """
    The newest state to resume from; None to start anew.

    Raises:
        ValueError: If --resume has nothing to resume, or other settings; or a state would be lost without it.
    """
    found = sorted(states.glob("step-*"))
    if not resume:
        if found:
            raise ValueError(
                f"An interrupted run has left {str(found[-1])!r}: add --resume, or remove {str(states)!r}."
            )
        return None
    if not found:
        raise ValueError(f"--resume: no state in {str(states)!r}. Start without it, and with --save-every-steps.")
    before = json.loads((found[-1] / RECORD).read_text(encoding="utf-8"))["settings"]
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed:
        seen = ", ".join(name if name == "files" else f"{name}={settings[name]!r}" for name in changed)
        raise ValueError(f"--resume: {seen} differs from the interrupted run, which {str(found[-1])!r} is of.")
    return found[-1]


def learning_rate_share(step: int, total_steps: int) -> float:
    """The learning rate of a step, from 0, as a share of its peak: a linear rise, then half a cosine down to 0."""
    warmup = max(1, round(WARMUP_SHARE * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup))) / 2


class StepBatches(Sampler[list[int]]):
    """The images of this process, step by step: its share of each batch that all processes have together."""

    def __init__(self, training: "Training") -> None:
        self.training = training

    def __iter__(self) -> Iterator[list[int]]:
        training, accelerator = self.training, self.training.accelerator
        size = training.settings["batch_size"]
        for step in range(training.step, training.total_steps):
            batch = batch_indices(step, training.joint_batch_size, len(training.images), training.settings["seed"])
            yield batch[accelerator.process_index * size :][:size]


@dataclass
class Training:
    """A training under way: the model, its optimizer, and how many steps they have made."""

    accelerator: Accelerator
    model: Any
    images: ImageFolder
    settings: dict[str, Any]
    step: int = 0
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.accelerator.prepare_model(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.settings["learning_rate"], weight_decay=0.05)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)

    @property
    def joint_batch_size(self) -> int:
        return int(self.settings["batch_size"] * self.settings["processes"])

    @property
    def total_steps(self) -> int:
        return math.ceil(self.settings["epochs"] * len(self.images) / self.joint_batch_size)

    def run(self, states: Path, arguments: argparse.Namespace) -> None:
        """Trains to the end, saving the state every so many steps."""
        # A forked worker would hold the lock on the unfinished folder for seconds after this process is killed.
        context = "spawn" if arguments.workers else None
        loader = DataLoader(
            self.images,
            batch_sampler=StepBatches(self),
            num_workers=arguments.workers,
            multiprocessing_context=context,
        )
        for batch in loader:
            loss = self.train_step({name: value.to(self.accelerator.device) for name, value in batch.items()})
            self.accelerator.print(f"step {self.step} of {self.total_steps}: loss {loss:.4f}", flush=True)
            every = arguments.save_every_steps
            if every and self.step % every == 0 and self.step < self.total_steps:
                self.save(states)

    def train_step(self, batch: dict[str, Any]) -> float:
        """
        One step on the images of this process; returns the loss, a mean over all processes.

        Raises:
            ValueError: If the loss is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["learning_rate"] * learning_rate_share(self.step, self.total_steps)
        with self.accelerator.autocast():
            loss = self.model(**batch)["loss"]
        mean = float(self.accelerator.reduce(loss.detach().float(), reduction="mean"))
        if not math.isfinite(mean):
            raise ValueError(f"The loss is {mean} at step {self.step + 1}: try a smaller --learning-rate.")
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return mean

    def save(self, states: Path) -> None:
        """Writes the state under a name that appears when it is complete, and removes older ones."""
        folder = states / f"step-{self.step:08d}"
        partial = states / "partial"
        if self.accelerator.is_main_process:
            discard(partial)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            record = {"step": self.step, "settings": self.settings}
            (partial / RECORD).write_text(json.dumps(record), encoding="utf-8")
            publish(partial, folder)
            for older in states.glob("step-*"):
                if older != folder:
                    discard(older)

    def load(self, folder: Path) -> None:
        """Goes back to a saved state."""
        self.accelerator.load_state(os.fspath(folder))
        self.step = json.loads((folder / RECORD).read_text(encoding="utf-8"))["step"]


if __name__ == "__main__":
    raise SystemExit(main())
