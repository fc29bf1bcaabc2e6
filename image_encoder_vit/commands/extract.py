"""
Extracts the features of whole corpora: folders, PDFs, TIFF files, WebDataset tars, Parquet files and datasets.

One process, or several on any number of machines that share the output folder: `accelerate launch --multi_gpu
--num_processes N -m image_encoder_vit.commands.extract ...`. After an interruption the same command goes on.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import PIL
import psutil
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from ..corpora.extraction import (
    PreparedPage,
    PreparedPages,
    as_it_is,
    batches_by_shape,
    end_with,
    end_worker_with_parent,
)
from ..corpora.pages import ReadOptions, find_pages
from ..corpora.store import (
    MANIFEST_FILE,
    WORK,
    Plan,
    check_folder,
    check_manifest,
    is_complete,
    merge,
    remove_partial_files,
    shard_name,
    write_plan,
    write_unit,
)
from ..storage.output_folder import discard, folder_lock
from ..support import message_of
from .frame import progress_bar, run_command
from .loading import RANDOM_SEED, RANDOM_WEIGHTS_NOTICE, load_model, load_processor
from .options import DTYPES, add_option, command_parser

WORKERS_ON_CPU, WORKERS_ON_ACCELERATOR = 1, 4
PAGES_AHEAD = 4  # By each worker.
LOCK_WAIT_S = 15  # What is left of a killed run ends within seconds.
POLL_S = 0.5
LONGEST_RUN = timedelta(days=30)  # The first process to finish waits for the others.


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if "LOCAL_RANK" in os.environ:  # Started as one of several.
        end_with(os.getppid())
    return run_command(extract, arguments, after_interrupt="the same command goes on from here")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("extract", __doc__)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="files, folders, glob patterns, dataset:HUB_ID_OR_FOLDER"
    )
    add_option(parser, "--output", metavar="DIR", help="where the features go")
    for name in ("--checkpoint", "--revision", "--dtype"):
        add_option(parser, name)
    add_option(
        parser, "--device", choices=["auto", "cpu"], help='"auto" (default: an accelerator for each process) or "cpu"'
    )
    parser.add_argument("--feature-dtype", choices=[*DTYPES], default="bfloat16", help="default: bfloat16")
    parser.add_argument("--no-pad", dest="pad", action="store_false", help="keep the aspect ratio without padding")
    parser.add_argument("--dpi", type=positive(float), default=144.0, help="of rendered PDF pages (default: 144)")
    parser.add_argument("--image-column", metavar="NAME", help="of Parquet files and datasets; default: the only one")
    parser.add_argument("--split", default="train", help="of datasets (default: train)")
    parser.add_argument("--batch-size", type=positive(int), default=4, help="pages of one shape (default: 4)")
    parser.add_argument(
        "--pages-per-shard", type=positive(int), default=64, help="what is lost when a process dies (default: 64)"
    )
    parser.add_argument(
        "--workers",
        type=positive(int),
        help="processes that decode, for each that encodes (default: 1 on the CPU, else 4)",
    )
    parser.add_argument("--fail-on-rejects", action="store_true", help="exit with status 1 if a page was rejected")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write speed, waiting and memory there")
    return parser.parse_args(argv)


def positive(kind: type) -> Any:
    """A type for argparse: a finite number above 0."""

    def parse(text: str) -> Any:
        number = kind(text)
        if not 0 < number < float("inf"):
            raise ValueError
        return number

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def extract(arguments: argparse.Namespace) -> int:
    """
    Makes all features that are missing; the exit status, 1 if pages were rejected that must not be.

    Raises:
        OSError, ValueError, ImportError: With a message for the user.
    """
    accelerator = Accelerator(
        cpu=arguments.device == "cpu"
        or not has_accelerator(),  # Accelerate would run several processes on CPUs as if each was alone.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_RUN)],
    )
    options = ReadOptions(arguments.dpi, arguments.image_column, arguments.split)
    settings = {} if arguments.pad else {"do_pad": False}
    processor = load_processor(arguments.checkpoint, arguments.revision, **settings)
    with ExitStack() as stack:
        plan_digest = from_main_process(accelerator, lambda: open_run(arguments, options, stack))
        plan = Plan(arguments.output, arguments.pages_per_shard)
        remaining = from_main_process(accelerator, lambda: remaining_units(arguments.output, plan))
        units = remaining[accelerator.process_index :: accelerator.num_processes]
        # Workers take seconds to start: they do while the model is loaded.
        pages = start_workers(units, PreparedPages(plan, processor, options), arguments, accelerator)
        dtype = DTYPES[arguments.dtype] if arguments.dtype else None
        model = load_model(arguments.checkpoint, dtype, arguments.revision).to(accelerator.device)
        manifest = manifest_of(arguments, processor, model, plan_digest, plan, accelerator)
        from_main_process(accelerator, lambda: check_manifest(arguments.output, manifest))
        if accelerator.is_main_process and arguments.checkpoint is None:
            print(RANDOM_WEIGHTS_NOTICE)
        run = Run(accelerator, arguments, plan, model, units)
        try:
            run.encode(pages)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(f"{message_of(error).rstrip('.')}. The same command goes on from here.") from error
        rejects = from_main_process(accelerator, lambda: finish(run))
    accelerator.end_training()
    return 1 if rejects and arguments.fail_on_rejects else 0


def has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


def from_main_process(accelerator: Accelerator, compute: Any) -> Any:
    """What `compute` returns in the main process, for all; an error in it is raised by all, so that none waits."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = compute()
        except (OSError, ValueError, ImportError) as error:
            outcome[1] = error
            if accelerator.num_processes == 1:
                raise
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        if accelerator.is_main_process:
            raise outcome[1]
        sys.exit(2)  # The main process tells why.
    return outcome[0]


def open_run(arguments: argparse.Namespace, options: ReadOptions, stack: ExitStack) -> str:
    """Locks the output folder, and lists all pages there; returns a digest of the list."""
    check_folder(arguments.output)
    stack.enter_context(folder_lock(arguments.output, LOCK_WAIT_S))
    stack.callback(remove_if_empty, arguments.output)
    remove_partial_files(arguments.output)
    digest = write_plan(arguments.output, find_pages(arguments.inputs, options))
    if Plan(arguments.output, arguments.pages_per_shard).num_pages == 0:
        raise ValueError(f"No page in {', '.join(arguments.inputs)}.")
    return digest


def remove_if_empty(output: Path) -> None:
    """Removes what a run has left that was refused before it began."""
    if not (output / MANIFEST_FILE).exists():
        discard(output / WORK)
        output.rmdir()


def remaining_units(output: Path, plan: Plan) -> list[int]:
    return [unit for unit in range(plan.num_units) if not is_complete(output, unit)]


def start_workers(
    units: list[int], pages: PreparedPages, arguments: argparse.Namespace, accelerator: Accelerator
) -> Iterator[PreparedPage]:
    """The pages of the units in their order, prepared by worker processes that start now."""
    positions = [position for unit in units for position in pages.plan.positions(unit)]
    if not positions:
        return iter(())
    on_cpu = accelerator.device.type == "cpu"
    loader = DataLoader(
        pages,
        batch_size=None,
        sampler=positions,
        collate_fn=as_it_is,
        num_workers=arguments.workers or (WORKERS_ON_CPU if on_cpu else WORKERS_ON_ACCELERATOR),
        prefetch_factor=PAGES_AHEAD,
        # A forked worker would hold the lock on the output folder for seconds after this process is killed.
        multiprocessing_context="spawn",
        worker_init_fn=end_worker_with_parent,
    )
    return iter(loader)


def manifest_of(
    arguments: argparse.Namespace,
    processor: Any,
    model: Any,
    plan_digest: str,
    plan: Plan,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What the features depend on: two runs of one manifest make the same bytes."""
    on_cpu = accelerator.device.type == "cpu"
    device = "cpu" if on_cpu or accelerator.device.type != "cuda" else torch.cuda.get_device_name(accelerator.device)
    provenance = Path(arguments.checkpoint or "", "provenance.json")
    source = json.loads(provenance.read_text(encoding="utf-8")) if arguments.checkpoint and provenance.is_file() else {}
    # Read from a module, since a version is not always where pip would find it.
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "pillow": PIL.__version__}
    return {
        "format": 1,
        "model": {
            "checkpoint": arguments.checkpoint or f"random weights, seed {RANDOM_SEED}",
            "commit": getattr(model.config, "_commit_hash", None) or source.get("commit"),
            "weights_sha256": digest_of(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "stride": model.encoder.stride,
        },
        "inputs": {"arguments": arguments.inputs, "pages": plan.num_pages, "sha256_of_list": plan_digest},
        "settings": {
            "processor": processor.to_dict(),
            "dpi": arguments.dpi,
            "image_column": arguments.image_column,
            "split": arguments.split,
            "feature_dtype": arguments.feature_dtype,
            "batch_size": arguments.batch_size,
            "pages_per_shard": arguments.pages_per_shard,
        },
        # The last bits depend on these: on the CPU also on the number of threads, which OMP_NUM_THREADS sets.
        "machine": {"device": device, "threads": torch.get_num_threads() if on_cpu else None, "versions": versions},
    }


def digest_of(model: Any) -> str:
    """SHA-256 of all weights with their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class Run:
    """One process's part of a run: its units, and what it measures while it makes them."""

    accelerator: Accelerator
    arguments: argparse.Namespace
    plan: Plan
    model: Any
    units: list[int]
    pages: int = 0
    seconds: float = 0.0
    first_page_s: float = 0.0
    waiting_s: float = 0.0
    model_s: float = 0.0
    memory_mb: list[float] = field(default_factory=list)
    progress: Any = field(init=False)

    def __post_init__(self) -> None:
        self.progress = progress_bar(self.plan.num_pages, "page", is_shown=self.accelerator.is_main_process)
        self.show_finished()

    def show_finished(self) -> None:
        """Sets the bar to what all processes have finished, as the disk tells."""
        if not self.accelerator.is_main_process:
            return
        output = self.arguments.output
        done = sum(len(self.plan.positions(u)) for u in range(self.plan.num_units) if is_complete(output, u))
        self.progress.update(done - self.progress.n)

    def encode(self, pages: Iterator[PreparedPage]) -> None:
        """Makes all units of this process."""
        start = time.perf_counter()
        for unit in self.units:
            features: dict[int, torch.Tensor] = {}
            positions = self.plan.positions(unit)
            prepared: list[PreparedPage] = []
            reasons: dict[int, str] = {}
            for batch in batches_by_shape(self.take(pages, len(positions), prepared), self.arguments.batch_size):
                for page, tensor in zip(batch, self.features_of(batch), strict=True):
                    if bool(torch.isfinite(tensor).all()):
                        features[page.position - positions.start] = tensor
                    else:
                        reasons[page.position] = f"its features are not finite in {self.arguments.feature_dtype}"
            rows = [self.row(unit, page, features, reasons.get(page.position, page.reason)) for page in prepared]
            write_unit(self.arguments.output, unit, features, rows)
            self.show_finished()
            self.memory_mb.append(memory_mb())
        self.seconds = time.perf_counter() - start

    def take(self, pages: Iterator[PreparedPage], count: int, taken: list[PreparedPage]) -> Iterator[PreparedPage]:
        """The next pages, with the time counted that they are waited for; `taken` keeps them without their pixels."""
        source = islice(pages, count)
        while True:
            start = time.perf_counter()
            page = next(source, None)
            waited_s = time.perf_counter() - start
            if self.pages == 0:
                self.first_page_s = waited_s  # The workers are still starting.
            else:
                self.waiting_s += waited_s
            if page is None:
                return
            self.pages += 1
            taken.append(page._replace(inputs={}))
            yield page

    @torch.inference_mode()
    def features_of(self, batch: list[PreparedPage]) -> list[torch.Tensor]:
        """The feature maps (C, h, w) of pages of one shape, on the host."""
        start = time.perf_counter()
        device = self.accelerator.device
        inputs = {name: torch.stack([page.inputs[name] for page in batch]).to(device) for name in batch[0].inputs}
        features = self.model(**inputs).last_hidden_state.to("cpu", DTYPES[self.arguments.feature_dtype])
        self.model_s += time.perf_counter() - start
        return [tensor.clone() for tensor in features]

    def row(
        self, unit: int, page: PreparedPage, features: dict[int, torch.Tensor], reason: str | None
    ) -> dict[str, Any]:
        """The page's row of the index, or of the rejects with a `reason`."""
        name = {"id": page.page.id, "source": page.page.source, "page": page.page.page, "reason": reason}
        if reason is not None:
            return name
        number = page.position - self.plan.positions(unit).start
        return name | {
            "original_size": page.original_size,
            "valid_region": page.valid_region,
            "grid": tuple(features[number].shape[1:]),
            "shard": shard_name(unit),
            "row": number,
            "sha256": page.sha256,
        }


def memory_mb() -> float:
    """Resident memory of this process and its workers, in MB."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return round(total / 1e6, 1)


def finish(run: Run) -> int:
    """Waits for the units of all processes, joins the index, and reports; returns the number of rejects."""
    output = run.arguments.output
    while remaining_units(output, run.plan):
        time.sleep(POLL_S)
        run.show_finished()
    run.show_finished()
    run.progress.close()
    encoded, rejects = merge(output, run.plan.num_units)
    print(f"{encoded} page(s) in {output}, {rejects} rejected" + (f": see {output}/rejects.parquet" if rejects else ""))
    if run.pages:
        running_s = run.seconds - run.first_page_s
        alone = run.pages / max(run.model_s, 1e-9)
        print(
            f"This process: {run.pages} pages in {running_s:.1f} s after {run.first_page_s:.1f} s for the first, "
            f"{run.pages / running_s:.2f} pages/s; the model alone {alone:.2f} pages/s; it "
            f"waited for pages {100 * run.waiting_s / running_s:.1f} % of the time"
        )
    if run.arguments.report:
        names = ("pages", "seconds", "first_page_s", "waiting_s", "model_s", "memory_mb")
        report = {name: getattr(run, name) for name in names} | {"encoded": encoded, "rejects": rejects}
        run.arguments.report.write_text(json.dumps(report) + "\n", encoding="utf-8")
    return rejects


if __name__ == "__main__":
    raise SystemExit(main())
