"""
Trains the small sample encoder that the package brings, from a seed, on pages that it draws itself.

Writes a model folder with the layout head, what was measured on other drawn pages, and the card. It takes an hour on
2 cores; docs/sample.md tells more.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..corpora.search import query_of_map, search
from ..corpora.store import FeatureStore
from ..image_processing_image_encoder_vit import ImageEncoderViTImageProcessorPil
from ..modeling_image_encoder_vit import ImageEncoderViTModel
from ..training.drawn_pages import DrawnPage
from ..training.page_views import draw_pages
from ..training.sample_encoder import PHASES, Phase, SampleTrainer, sample_config, training_steps
from ..training.sample_folder import write_sample
from ..training.sample_measures import HELD_OUT_SEED, cell_measures, spoiled_query
from . import extract
from .frame import progress_bar, run_command
from .options import add_option, check_output, command_parser

PAGES, HELD_OUT_PAGES, LABELLED_PAGES = 4000, 500, 200


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(train, parse_arguments(argv), after_interrupt="nothing was written")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("train-sample", __doc__)
    parser.prog = f"python -m {__package__}.train_sample"  # None of the program's commands: few want it.
    add_option(parser, "--output", metavar="FOLDER", help="where the model folder goes")
    add_option(parser, "--overwrite")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the pages, the views and the first weights (default: 0)"
    )
    parser.add_argument("--pages", type=int, default=PAGES, help=f"to draw (default: {PAGES})")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        default=[phase.steps for phase in PHASES],
        metavar=("SMALL", "LARGE"),
        help=f"with views of {PHASES[0].shape.side_px} px, then {PHASES[1].shape.side_px} px (default: %(default)s)",
    )
    parser.add_argument(
        "--held-out", type=int, default=HELD_OUT_PAGES, help=f"pages to measure on (default: {HELD_OUT_PAGES})"
    )
    parser.add_argument("--threads", type=int, default=2, help="that train; another process draws (default: 2)")
    return parser.parse_args(argv)


def train(arguments: argparse.Namespace) -> int:
    """
    Raises:
        OSError, ValueError: If the folder cannot be written, or a number makes no training.
    """
    check_output(arguments.output, arguments.overwrite)
    phases = [phase._replace(steps=steps) for phase, steps in zip(PHASES, arguments.steps, strict=True)]
    check_numbers(arguments.pages, arguments.held_out, phases)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    start = time.perf_counter()
    trainer = SampleTrainer(sample_config())
    pages = draw_pages(arguments.pages, arguments.seed, processes=2)
    print(f"Drew {len(pages)} pages in {time.perf_counter() - start:.0f} s")
    run_training(trainer, pages, phases, arguments.seed)
    minutes = (time.perf_counter() - start) / 60
    print(f"Trained in {minutes:.1f} minutes; measuring")
    held_out = [page.unpacked() for page in draw_pages(arguments.held_out, HELD_OUT_SEED, processes=2)]
    training = {"seed": arguments.seed, "pages": arguments.pages, "steps": arguments.steps}
    training |= {"minutes": round(minutes, 1), "threads": arguments.threads}
    write_measured(trainer, held_out, arguments.output, training)
    print(f"Wrote {arguments.output}")
    return 0


def check_numbers(pages: int, held_out: int, phases: Sequence[Phase]) -> None:
    needed = max(phase.shape.pairs + phase.shape.crops for phase in phases)
    if pages < needed:
        raise ValueError(f"--pages {pages}: a batch shows {needed} pages, draw at least as many.")
    if held_out < 2:
        raise ValueError(f"--held-out {held_out}: at least 2 pages are needed to tell one from another.")
    for phase in phases:
        if phase.steps < 1:
            raise ValueError(f"--steps {phases[0].steps} {phases[1].steps}: each phase needs at least one step.")


def run_training(trainer: SampleTrainer, pages: list[Any], phases: Sequence[Phase], seed: int) -> None:
    with progress_bar(sum(phase.steps for phase in phases), "step") as progress:
        for losses in training_steps(trainer, pages, tuple(phases), seed, workers=1):
            progress.update()
            progress.set_postfix({name: f"{value:.2f}" for name, value in losses.items()}, refresh=False)


def write_measured(
    trainer: SampleTrainer, held_out: Sequence[DrawnPage], folder: Path, training: dict[str, Any]
) -> None:
    """Writes the folder, measures what was written, and writes it again with the measures."""
    write_sample(trainer, folder, training, {})
    processor = ImageEncoderViTImageProcessorPil.from_pretrained(folder)
    model = ImageEncoderViTModel.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(HELD_OUT_SEED)
    random_model = ImageEncoderViTModel(sample_config()).eval()
    measures: dict[str, Any] = cell_measures(held_out[:LABELLED_PAGES], processor, model, random_model)
    with stored_features(folder, [page.image for page in held_out]) as store:
        measures["found_again"] = recall(store, held_out, model, processor)
    write_sample(trainer, folder, training, measures)


@contextmanager
def stored_features(checkpoint: Path, pages: Sequence[Image.Image]) -> Iterator[FeatureStore]:
    """The pages' features as `extract` stores them; the id of a page ends in its number."""
    with tempfile.TemporaryDirectory() as name:
        for number, page in enumerate(pages):
            page.save(Path(name, f"{number:04}.png"), compress_level=1)
        output = Path(name, "features")
        command = [name, "--checkpoint", str(checkpoint), "--output", str(output), "--device", "cpu"]
        with redirect_stdout(StringIO()):
            status = extract.main(command)
        if status:
            raise ValueError("The features of the held-out pages could not be extracted, see above.")
        yield FeatureStore(output)


@torch.inference_mode()
def recall(store: FeatureStore, pages: Sequence[DrawnPage], model: Any, processor: Any) -> dict[str, Any]:
    """How often a spoiled page is found first, and among the first five, by the default mode of a search."""
    ranks = []
    for number, page in enumerate(pages):
        inputs = processor(spoiled_query(page.image, number), return_tensors="pt")
        outputs = model(**inputs)
        found = processor.post_process_feature_maps(outputs, inputs, stride=model.encoder.stride)[0].global_map
        hits = search(store, query_of_map(found), top=5)
        numbers = [int(Path(hit.page_id.partition("#")[0]).stem) for hit in hits]
        ranks.append(numbers.index(number) + 1 if number in numbers else 6)
    return {
        "pages": len(pages),
        "recall@1": round(sum(rank == 1 for rank in ranks) / len(ranks), 4),
        "recall@5": round(sum(rank <= 5 for rank in ranks) / len(ranks), 4),
    }


if __name__ == "__main__":
    raise SystemExit(main())
