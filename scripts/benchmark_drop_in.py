#!/usr/bin/env python
"""Times whole vision models of transformers before and after `replace_sam_encoder`: Unlimited-OCR's, CLIP-L included,
and those of PaddleOCR's table and formula recognisers.

Full size with random weights, one image. It is one model: each round undoes the replacement, times a forward pass,
replaces and times another. The results must agree first; where they do not, no number is printed.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from image_encoder_vit.commands.benchmark import (
    BFLOAT16_FACTOR,
    DTYPES,
    FLOAT32_BOUND,
    PAUSE_S,
    SEED,
    Case,
    describe_machine,
)
from image_encoder_vit.commands.frame import run_command
from image_encoder_vit.runtimes.drop_in import replace_sam_encoder
from image_encoder_vit.runtimes.onnx_export import relative_error

STATES = ("before", "after")


class Owner(NamedTuple):
    """A vision model with SAM's encoder in it: its class in transformers."""

    title: str
    module: str
    model: str
    size_px: int  # PaddleOCR's take this one only.


OWNERS = {
    "unlimited-ocr": Owner("Unlimited-OCR's", "unlimited_ocr", "UnlimitedOcrVisionModel", 1024),
    "slanext": Owner("SLANeXt's", "slanext", "SLANeXtBackbone", 512),
    "pp-formulanet": Owner("PP-FormulaNet's", "pp_formulanet", "PPFormulaNetVisionModel", 512),
}


class Held(nn.Module):
    """A vision model as a part of another: the drop-in puts an encoder into something, and PP-FormulaNet's is one."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, pixels: Tensor) -> Any:
        return self.vision(pixels)


class Result(NamedTuple):
    """Seconds of whole forward passes; `ratio` is the median of the rounds' ratios, errors are against float32."""

    dtype: str
    median_s: dict[str, float]
    spread: dict[str, float]
    ratio: float
    error: dict[str, float]
    encoder_median_s: dict[str, float]
    encoder_ratio: float


def main() -> int:
    return run_command(compare, parse_arguments(), after_interrupt="what was printed stands")


def compare(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    print(describe_machine(), flush=True)
    owner = OWNERS[arguments.model]
    size = arguments.size or owner.size_px
    print(f"{owner.title} vision model, {size} x {size} px, batch 1\n", flush=True)
    print("| precision | before, s | after, s | x before | spread | SAM encoder alone, x before | error |")
    print("|---|---|---|---|---|---|---|", flush=True)
    model = random_vision_model(owner)
    exact = vision_tokens(model, Case(size, size, 1, "float32").pixels)
    results = []
    failed = False
    for dtype in sorted(arguments.dtypes, key=list(DTYPES).index):  # The weights lose precision on the way.
        outcome = benchmark(model.to(DTYPES[dtype]), Case(size, size, 1, dtype), exact, arguments.rounds)
        if isinstance(outcome, str):
            failed = True
            print(f"refused: {dtype}: {outcome}")
            continue
        results.append(outcome)
        before, after = (outcome.median_s[state] for state in STATES)
        spread, error = (", ".join(form.format(value[state]) for state in STATES) for form, value in (
            ("{:.0%}", outcome.spread), ("{:.1e}", outcome.error)
        ))  # fmt: skip
        print(
            f"| {dtype} | {before:.2f} | {after:.2f} | {outcome.ratio:.2f} | {spread} "
            f"| {outcome.encoder_ratio:.2f} | {error} |",
            flush=True,
        )
    if arguments.json:
        report = {
            "machine": describe_machine(),
            "model": arguments.model,
            "size_px": size,
            "results": [r._asdict() for r in results],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=OWNERS, default="unlimited-ocr", help="default: unlimited-ocr")
    parser.add_argument("--size", type=int, help="side of the image in px (default: 1024, of the others 512)")
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results there")
    return parser.parse_args()


def random_vision_model(owner: Owner) -> Any:
    """The vision model in float32, seeded; positions as large as a trained model's."""
    module = importlib.import_module(f"transformers.models.{owner.module}.modeling_{owner.module}")
    model_class = getattr(module, owner.model)
    torch.manual_seed(SEED)
    model = model_class(model_class.config_class()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos" in name:
                parameter.normal_(std=0.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return Held(model)


@torch.inference_mode()
def vision_tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    tokens: Tensor = model(pixels).last_hidden_state
    return tokens


@torch.inference_mode()
def benchmark(model: Any, case: Case, exact: Tensor, rounds: int) -> Result | str:
    """The result in one precision, or why there is none."""
    pixels = case.pixels
    error = {"before": relative_error(vision_tokens(model, pixels), exact)}
    replaced = replace_sam_encoder(model)
    (path,) = replaced.originals
    error["after"] = relative_error(vision_tokens(model, pixels), exact)
    replaced.undo()
    bound = FLOAT32_BOUND if case.dtype == "float32" else BFLOAT16_FACTOR * error["before"]
    if not error["after"] <= bound:
        return f"error {error['after']:.1e} exceeds {bound:.1e}"

    seconds: dict[str, list[float]] = {state: [] for state in STATES}
    encoder_seconds: dict[str, list[float]] = {state: [] for state in STATES}
    for _ in range(rounds):
        for state in STATES:
            drop_in = replace_sam_encoder(model) if state == "after" else None
            for module, into in ((model, seconds), (model.get_submodule(path), encoder_seconds)):
                time.sleep(PAUSE_S)
                start = time.perf_counter()
                module(pixels)
                into[state].append(time.perf_counter() - start)
            if drop_in is not None:
                drop_in.undo()
    return Result(
        dtype=case.dtype,
        median_s={state: statistics.median(seconds[state]) for state in STATES},
        spread={state: (max(values) - min(values)) / statistics.median(values) for state, values in seconds.items()},
        ratio=median_ratio(seconds),
        error=error,
        encoder_median_s={state: statistics.median(encoder_seconds[state]) for state in STATES},
        encoder_ratio=median_ratio(encoder_seconds),
    )


def median_ratio(seconds: dict[str, list[float]]) -> float:
    return statistics.median(
        before / after for before, after in zip(*(seconds[state] for state in STATES), strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
