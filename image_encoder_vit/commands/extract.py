"""
Extracts the features of whole corpora: folders, PDFs, TIFF files, tars, Parquet files and datasets.

One process, or several on any number of machines that share the output folder: `accelerate launch --multi_gpu
--num_processes N -m image_encoder_vit.commands.extract ...`. After an interruption the same command goes on.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..support import message_of, visible
from .frame import ERROR, progress_bar, run_command
from .loading import check_tokens, load_model, load_processor, print_notice
from .options import DTYPES, add_option, command_parser

MAX_REJECTS_SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    work = verify if arguments.verify else run
    return run_command(work, arguments, after_interrupt="the same command goes on from here")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("extract", __doc__)
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="files, folders, glob patterns, dataset:HUB_ID_OR_FOLDER"
    )
    add_option(parser, "--output", metavar="DIR", help="where the features go")
    for name in ("--checkpoint", "--revision", "--dtype"):
        add_option(parser, name)
    add_option(
        parser, "--device", choices=["auto", "cpu"], help='"auto" (default: an accelerator for each process) or "cpu"'
    )
    parser.add_argument("--feature-dtype", choices=[*DTYPES], default="bfloat16", help="default: bfloat16")
    parser.add_argument("--no-pad", dest="pad", action="store_false", help="keep the aspect ratio without padding")
    add_option(parser, "--tokens")
    parser.add_argument("--dpi", type=positive(float), default=144.0, help="of rendered PDF pages (default: 144)")
    parser.add_argument("--image-column", metavar="NAME", help="of Parquet files and datasets; default: the only one")
    parser.add_argument("--split", default="train", help="of datasets (default: train)")
    parser.add_argument(
        "--any-path", action="store_true", help="cells may name any file, not only those below their dataset's folder"
    )
    parser.add_argument(
        "--max-megapixels", type=positive(float), help="the largest image that is decoded (default: PIL's 179)"
    )
    parser.add_argument("--batch-size", type=positive(int), default=4, help="pages of one shape (default: 4)")
    parser.add_argument(
        "--pages-per-shard", type=positive(int), default=64, help="what is lost when a process dies (default: 64)"
    )
    parser.add_argument(
        "--workers",
        type=not_negative,
        help="processes that read pages, for each that encodes; 0: none (default: 1 on the CPU, else 4)",
    )
    parser.add_argument("--fail-on-rejects", action="store_true", help="exit with status 1 if a page was rejected")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write speed, waiting and memory there")
    parser.add_argument("--verify", action="store_true", help="read all features in DIR, and tell which are damaged")
    arguments = parser.parse_args(argv)
    if not arguments.inputs and not arguments.verify:
        parser.error("the following arguments are required: INPUT")
    return arguments


def positive(kind: type) -> Any:
    """A type for argparse: a finite number above 0."""

    def parse(text: str) -> Any:
        number = kind(text)
        if not 0 < number < float("inf"):
            raise ValueError
        return number

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def not_negative(text: str) -> int:
    """A type for argparse: a whole number from 0 on."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def run(arguments: argparse.Namespace) -> int:
    """
    Extracts; returns the exit status.

    Raises:
        OSError, ValueError, ImportError: With a message for the user.
    """
    from ..corpora.extraction import ExtractionOptions, FailedElsewhereError, end_with, extract
    from ..corpora.pages import ReadOptions

    if "LOCAL_RANK" in os.environ:  # Started as one of several.
        end_with(os.getppid())
    rank = int(os.environ.get("RANK", "0"))
    options = ExtractionOptions(
        inputs=arguments.inputs,
        output=arguments.output,
        read=ReadOptions(arguments.dpi, arguments.image_column, arguments.split, arguments.any_path),
        feature_dtype=DTYPES[arguments.feature_dtype],
        batch_size=arguments.batch_size,
        pages_per_shard=arguments.pages_per_shard,
        workers=arguments.workers,
        cpu=arguments.device == "cpu",
        max_megapixels=arguments.max_megapixels,
        tokens=arguments.tokens,
    )
    settings: dict[str, Any] = {} if arguments.pad else {"do_pad": False}
    if not arguments.tokens:
        settings["tile_size"] = None  # Maps are of the whole view; only tokens tell of tiles.
    processor = load_processor(arguments.checkpoint, arguments.revision, **settings)
    if rank == 0:
        tell_what_is_passed_over(arguments.inputs)
        print_notice(arguments.checkpoint)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    with progress_bar(0, "page", is_shown=rank == 0) as progress:

        def load_encoder() -> Any:
            model = load_model(arguments.checkpoint, dtype, arguments.revision)
            check_tokens(model, arguments.tokens)
            return model

        def show_finished(done: int, total: int) -> None:
            progress.total = total
            progress.update(done - progress.n)

        try:
            result = extract(
                options,
                processor,
                load_encoder,
                arguments.checkpoint,
                show_finished,
            )
        except FailedElsewhereError:
            return ERROR
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(f"{message_of(error).rstrip('.')}. The same command goes on from here.") from error
    if rank == 0:
        report(result, arguments)
    if not result.encoded:
        return 1
    return 1 if result.rejects and arguments.fail_on_rejects else 0


def tell_what_is_passed_over(inputs: list[str]) -> None:
    """Counts the files in folders that are no pages by their names."""
    from ..corpora.pages import passed_over

    if others := passed_over(inputs):
        kinds = ", ".join(f"{count} {visible(suffix) or 'without suffix'}" for suffix, count in others.most_common(5))
        print(f"Passed over {others.total()} file(s) that are no pages by their names: {kinds}")


def report(result: Any, arguments: argparse.Namespace) -> None:
    """Tells what was made, what was rejected, and how fast it went."""
    output = arguments.output
    where = f": see {output}/rejects.parquet" if result.rejects else ""
    print(f"{result.encoded} page(s) in {output}, {result.rejects} rejected{where}")
    if result.rejects:
        tell_rejects(output, result.rejects)
    if not result.encoded:
        print("error: no page could be encoded", file=sys.stderr)
    if result.pages:
        running_s = result.seconds - result.first_page_s
        alone = result.pages / max(result.model_s, 1e-9)
        print(
            f"This process: {result.pages} pages in {running_s:.1f} s after {result.first_page_s:.1f} s for the first, "
            f"{result.pages / running_s:.2f} pages/s; the model alone {alone:.2f} pages/s; it "
            f"waited for pages {100 * result.waiting_s / running_s:.1f} % of the time"
        )
    if arguments.report:
        arguments.report.write_text(json.dumps(vars(result)) + "\n", encoding="utf-8")


def tell_rejects(output: Path, count: int) -> None:
    """The first rejects and their reasons."""
    from ..corpora.store import rejects

    for row in islice(rejects(output), MAX_REJECTS_SHOWN):
        print(f"rejected: {visible(row['id'])}: {visible(row['reason'])}", file=sys.stderr)
    if count > MAX_REJECTS_SHOWN:
        print(f"rejected: and {count - MAX_REJECTS_SHOWN} more", file=sys.stderr)


def verify(arguments: argparse.Namespace) -> int:
    """Reads all features of the folder; returns the exit status, 1 if any are not as they were written."""
    from ..corpora.store import FeatureStore

    output = arguments.output
    store = FeatureStore(output)
    shards = len(store.shards())
    damaged = 0
    for name, problem in store.damaged_shards():
        damaged += 1
        print(f"damaged: {output / name} {problem}", file=sys.stderr)
    if damaged:
        told = "Remove them, and the command that made them makes them again."
        print(f"error: {damaged} of {shards} shard(s) are damaged. {told}", file=sys.stderr)
        return 1
    print(f"{len(store)} page(s) in {shards} shard(s): all as they were written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
