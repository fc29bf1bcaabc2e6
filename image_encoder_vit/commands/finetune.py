"""
Fine-tunes the encoder with a classification head on images with labels: a folder with one subfolder of images for each
class, or any data set that `datasets` loads.

One process, or several: `accelerate launch -m image_encoder_vit.commands.finetune ...`.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import HfArgumentParser, TrainingArguments

from ..modeling_image_encoder_vit import ImageEncoderViTForImageClassification
from ..storage.output_folder import check_free, discard, publish, unfinished_folder, unfinished_path
from ..training.fine_tuning import FineTuner, accuracy_and_macro_f1, freeze, with_lora
from ..training.labelled_images import Splits, load_splits
from ..training.states import StateKeeper, StopAtNonFiniteLoss, newest_state
from .frame import run_command
from .loading import RANDOM, load_model, load_processor
from .options import PROGRAM

STATES = "states"  # In the unfinished folder: what --resume needs.
SETTINGS_FILE = "settings.json"
LABELS_FILE = "id2label.json"  # Of an adapter; a whole model has them in its config.json.
RESULTS_FILE = "eval_results.json"
# What may differ in a run that goes on.
CHANGEABLE = {"output", "resume", "workers", "device", "save_every_steps"}

RANDOM_WEIGHTS_NOTICE = (
    "No --checkpoint given: training a full-size encoder from RANDOM weights, which takes far more images than "
    "fine-tuning does; see the README for real weights."
)


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A field of `Options` with its help."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class Options:
    """What is trained, how, and where it goes."""

    output: str = field(metadata={"help": "folder of the tuned model"})
    checkpoint: str | None = option(
        None, "model folder, Hub id, or 'sample' for the small encoder of the package; without it, random weights"
    )
    train_split: str = option("train", "split to train on")
    eval_split: str | None = option(
        None,
        "split to evaluate on, or a share such as 0.2 to hold out for it, or 'none'; by default validation or test",
    )
    image_column: str = option("image", "column of the images")
    label_column: str = option("label", "column of their classes")
    revision: str | None = option(None, "branch, tag or commit of a Hub repository", metavar="NAME")
    image_size: int | None = option(None, "side of the canvas in px; as trained by default", metavar="PX")
    epochs: float = option(3.0, "passes over the images")
    batch_size: int = option(4, "images a step and process")
    images_at_once: int = option(1, "as many of them are in memory at a time; more need more memory")
    learning_rate: float = option(1e-4, "at its peak, after a twentieth of the steps")
    layer_decay: float = option(1.0, "each layer learns so much slower than the next; SAM's fine-tuners take 0.8")
    weight_decay: float = option(0.05, "of all weights but biases, norms and positions")
    lora: int | None = option(None, "train adapters of this rank, and the head", metavar="RANK")
    keep_adapter: bool = option(False, "with --lora: write the adapter by itself instead of merging it")
    freeze_encoder: bool = option(False, "train the head only")
    freeze_blocks: int | None = option(None, "keep patches, positions and the first blocks as they are", metavar="N")
    gradient_checkpointing: bool = option(False, "less memory, a third more time")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the computation; weights stay float32")
    device: Literal["auto", "cpu"] = option("auto", "cpu, or the accelerator where there is one")
    workers: int = option(0, "processes that decode images")
    save_every_steps: int | None = option(None, "keep the state for --resume; by default after each epoch", metavar="N")
    resume: bool = option(False, "go on where an interrupted run has saved its state")
    seed: int = option(0, "of the head, the order of the images and what is held out")
    trainer: list[str] = field(
        default_factory=list,
        metadata={"help": "other arguments of transformers' TrainingArguments, as max_grad_norm=0.5"},
    )

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "images_at_once", "learning_rate", "layer_decay", "image_size", "lora")
        for name in (*positive, "save_every_steps", "freeze_blocks"):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {number}.")
        if self.workers < 0:
            raise ValueError(f"--workers must be 0 or more, got {self.workers}.")
        if self.batch_size % self.images_at_once:
            raise ValueError(
                f"--batch-size must be a multiple of --images-at-once, got {self.batch_size} and {self.images_at_once}."
            )
        if self.lora and (self.freeze_encoder or self.freeze_blocks):
            raise ValueError("--lora trains adapters inside the encoder, whose weights stay: leave out --freeze-...")
        if self.freeze_encoder and self.freeze_blocks:
            raise ValueError("--freeze-encoder freezes all blocks: leave out --freeze-blocks.")
        if self.keep_adapter and not self.lora:
            raise ValueError("--keep-adapter needs --lora RANK.")


def main(argv: Sequence[str] | None = None) -> int:
    after_interrupt = "the same command with --resume goes on from the last state, if one was saved"
    return run_command(finetune, parse_arguments(argv), after_interrupt=after_interrupt)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """`images`, the data set, and `options`."""
    parser: Any = HfArgumentParser(
        [Options],
        prog=f"{PROGRAM} finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", metavar="FOLDER", help="images, one subfolder for each class; or a data set")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options, rest = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    return argparse.Namespace(images=rest.images, options=options)


def finetune(arguments: argparse.Namespace) -> int:
    """
    Trains and writes the output folder, which appears complete or not at all.

    Raises:
        OSError, ValueError, ImportError: With a message for the user.
    """
    options = arguments.options
    output = Path(options.output)
    check_free(output)
    states = unfinished_path(output) / STATES
    trainer_arguments = training_arguments(options, states)
    size = {"size": options.image_size} if options.image_size else {}
    processor = load_processor(options.checkpoint or RANDOM, options.revision, **size)
    splits = load_splits(
        arguments.images,
        processor,
        train_split=options.train_split,
        eval_split=options.eval_split,
        image_column=options.image_column,
        label_column=options.label_column,
        seed=options.seed,
    )
    settings = settings_of(options, splits)
    with output_in_work(output) as folder:
        state = state_to_resume(states, settings, options.resume)
        PartialState().wait_for_everyone()  # All have looked before one writes.
        if PartialState().is_main_process:
            states.mkdir(exist_ok=True)
            (states / SETTINGS_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")
            if options.checkpoint is None:
                print(RANDOM_WEIGHTS_NOTICE)
            if state is not None:
                print(f"Resuming from the state after step {state.name.rpartition('-')[2]}")
        trainer = trainer_of(options, trainer_arguments, splits)
        with progress_ended():
            trainer.train(resume_from_checkpoint=None if state is None else str(state))
        results = {}
        if splits.evaluation is not None:
            figures = trainer.evaluate()
            results = {name: figures[f"eval_{name}"] for name in ("accuracy", "macro_f1", "loss")}
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if PartialState().is_main_process:
            tuned = folder / "tuned"
            discard(tuned)  # of a process that was killed here
            tuned.mkdir()
            save(trainer.accelerator.unwrap_model(trainer.model_wrapped), weights, options, tuned)
            processor.save_pretrained(tuned)
            if results:
                (tuned / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            publish(tuned, output)
            discard(folder)
            if splits.evaluation is not None:
                shown = f"accuracy {results['accuracy']:.3f}, macro F1 {results['macro_f1']:.3f}"
                print(f"{shown} on {len(splits.evaluation)} images that were not trained on")
            print(f"Wrote the {'adapter' if options.keep_adapter else 'tuned model'} and its processor to {output}")
        PartialState().wait_for_everyone()
    return 0


def training_arguments(options: Options, states: Path) -> TrainingArguments:
    """
    `Trainer`'s arguments: what the options say, and those given by --trainer before all.

    Raises:
        ValueError: If --trainer has anything but NAME=VALUE of known names, or the CPU is to train in float16.
    """
    # Said to transformers in any case: otherwise it refuses bfloat16.
    use_cpu = options.device == "cpu" or (options.device == "auto" and not torch.accelerator.is_available())
    if use_cpu and options.dtype == "float16":
        raise ValueError("--dtype float16 trains on an accelerator only: take bfloat16 or float32 on the CPU.")
    ours: dict[str, Any] = {
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.images_at_once,
        "per_device_eval_batch_size": options.images_at_once,
        "gradient_accumulation_steps": options.batch_size // options.images_at_once,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "bf16": options.dtype == "bfloat16",
        "fp16": options.dtype == "float16",
        "use_cpu": use_cpu,
        "seed": options.seed,
        "dataloader_num_workers": options.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_strategy": "epoch",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": False,
        "report_to": "none",
    }
    if options.workers:
        # A forked worker would hold the lock on the unfinished folder for seconds after this process is killed.
        ours["dataloader_multiprocessing_context"] = "spawn"
    if options.save_every_steps:
        ours |= {"save_strategy": "steps", "save_steps": options.save_every_steps}
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    theirs = dict(given.partition("=")[::2] for given in options.trainer)
    strangers = [given for given in options.trainer if given.partition("=")[0] not in known or "=" not in given]
    if strangers or "output_dir" in theirs:
        raise ValueError(f"--trainer takes NAME=VALUE of transformers' TrainingArguments, got {options.trainer}.")
    parser: Any = HfArgumentParser([TrainingArguments], prog="--trainer", usage="--trainer NAME=VALUE ...")
    given = [f"--{name}={value}" for name, value in {**ours, **theirs, "output_dir": str(states)}.items()]
    (arguments,) = parser.parse_args_into_dataclasses(given, look_for_args_file=False)
    return arguments


@contextmanager
def output_in_work(output: Path) -> Iterator[Path]:
    """
    The unfinished folder of the output, locked by the main process. After an error it stays only if there is a state
    to resume from.
    """
    if not PartialState().is_main_process:
        yield unfinished_path(output)
        return
    with unfinished_folder(output) as folder:
        try:
            yield folder
        finally:
            if newest_state(folder / STATES) is None:
                discard(folder)


@contextmanager
def progress_ended() -> Iterator[None]:
    """
    Ends the line of the progress bar after an error, which is then told on a line of its own; one from a process that
    decodes images without its traceback.
    """
    try:
        yield
    except BaseException as error:
        print(file=sys.stderr)
        lines = str(error).strip().splitlines()
        if lines and lines[0].startswith("Caught "):
            raise ValueError(lines[-1].partition(": ")[2]) from None
        raise


def trainer_of(options: Options, arguments: TrainingArguments, splits: Splits) -> FineTuner:
    """The trainer of the model that the options describe."""
    set_seed(options.seed)
    model = build(options, splits.classes)
    return FineTuner(
        model=model,
        args=arguments,
        train_dataset=splits.train,
        eval_dataset=splits.evaluation,
        compute_metrics=accuracy_and_macro_f1,
        callbacks=[StateKeeper(), StopAtNonFiniteLoss()],
        layer_decay=options.layer_decay,
    )


def build(options: Options, classes: list[str]) -> Any:
    """
    The classifier that is trained, in float32: the encoder of the checkpoint or a random one under a new head.

    Raises:
        OSError, ValueError: If the checkpoint cannot be loaded as an encoder.
        ImportError: If LoRA is asked for and PEFT is not installed.
    """
    encoder = load_model(options.checkpoint or RANDOM, torch.float32, options.revision)
    config = encoder.config
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    model: Any = ImageEncoderViTForImageClassification(config)
    model.encoder = encoder.encoder
    if options.gradient_checkpointing:
        # Renamed in later releases of transformers. Without re-entry it works where the first layer is frozen too.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if options.freeze_encoder or options.freeze_blocks:
        freeze(model.encoder, options.freeze_blocks)
    return with_lora(model, options.lora) if options.lora else model


def save(model: Any, weights: dict[str, torch.Tensor], options: Options, folder: Path) -> None:
    """
    Writes the tuned model, or its adapter beside the names of the classes, for which PEFT has no place.

    Raises:
        ValueError: If a weight is not finite.
    """
    bad = sorted(name for name, weight in weights.items() if not torch.isfinite(weight).all())
    if bad:
        raise ValueError(f"{len(bad)} tuned weights are not finite, {bad[0]} first: try a smaller --learning-rate.")
    if options.lora and not options.keep_adapter:
        model.load_state_dict(weights)
        model = model.merge_and_unload()
        weights = model.state_dict()
    model.save_pretrained(folder, state_dict=weights)
    if options.keep_adapter:
        (folder / "README.md").unlink()  # PEFT's card: a form to fill in, which tells where the checkpoint lay.
        names = {str(number): name for number, name in model.config.id2label.items()}
        (folder / LABELS_FILE).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


def settings_of(options: Options, splits: Splits) -> dict[str, Any]:
    """What must be the same for a resumed run to end as one that was never interrupted."""
    settings = {name: value for name, value in dataclasses.asdict(options).items() if name not in CHANGEABLE}
    return settings | {"processes": PartialState().num_processes, "images": splits.digest()}


def state_to_resume(states: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """
    The newest state to resume from; None to start anew.

    Raises:
        ValueError: If --resume has nothing to resume, or other settings; or a state would be lost without it.
    """
    newest = newest_state(states)
    if not resume:
        if newest is not None:
            raise ValueError(f"An interrupted run has left {str(newest)!r}: add --resume, or remove {str(states)!r}.")
        return None
    if newest is None:
        raise ValueError(f"--resume: no state in {str(states)!r}. Start without it; --save-every-steps saves earlier.")
    before = json.loads((states / SETTINGS_FILE).read_text(encoding="utf-8"))
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed:
        seen = ", ".join(name if name == "images" else f"{name}={settings[name]!r}" for name in changed)
        raise ValueError(f"--resume: {seen} differs from the interrupted run, which {str(newest)!r} is of.")
    return newest


if __name__ == "__main__":
    sys.exit(main())
