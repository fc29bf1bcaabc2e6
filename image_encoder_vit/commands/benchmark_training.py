"""
Peak memory and time of a training step beside transformers' class, on the same random weights and the same pixels:
`benchmark --train`. Gradients are compared first, and nothing is measured where they differ.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..weights.naming import TRANSFORMERS

BASELINE, OURS = "transformers", "image-encoder-vit"
GRADIENT_BOUND = 1e-4  # Relative error of each gradient, in float32; both are about 1e-5 from float64's.
PARITY_SIDE_PX = 256  # Four by four cells, windows that stick out, positions resized.

# Builds a contender with seeded weights in float32.
Build = Callable[[], nn.Module]


class Step(NamedTuple):
    """A training step: peak memory beyond weights and gradients, and its time; None where the system does not tell."""

    peak_mb: float | None
    seconds: float
    cpu_seconds: float


class Contender(NamedTuple):
    """What is measured."""

    name: str
    is_checkpointed: bool

    def __str__(self) -> str:
        return f"{self.name}, gradient checkpointing" if self.is_checkpointed else self.name


CONTENDERS = [Contender(name, is_checkpointed) for is_checkpointed in (False, True) for name in (BASELINE, OURS)]


def compare_training(
    cases: Sequence[Any], builds: dict[str, Build], rounds: int, threads: int, module: str
) -> Iterator[dict[str, Any]]:
    """
    Prints a table for each case and gives what it says. Each step is made in a fresh process of `module`, which
    calls `measure_step` with the arguments `--measure-training`, contender by contender in each round.

    Raises:
        ArithmeticError: If gradients differ.
    """
    errors = gradient_errors(builds)
    name, error = max(errors.items(), key=lambda entry: entry[1])
    if not error <= GRADIENT_BOUND:
        raise ArithmeticError(f"The gradient of {name} differs from transformers' by {error:.1e}: nothing is measured.")
    print(f"gradients agree: relative difference {error:.1e} at most, of {len(errors)} weights", flush=True)
    for case in cases:
        print(f"\ntraining, {case}", flush=True)
        steps: dict[Contender, list[Step]] = {contender: [] for contender in CONTENDERS}
        for _ in range(rounds):
            for contender in CONTENDERS:
                steps[contender].append(_step_in_a_process(contender, case, threads, module))
        yield {"case": case._asdict(), "results": _print_table(steps)}


def gradient_errors(builds: dict[str, Build]) -> dict[str, float]:
    """The relative difference between the two contenders' gradients, by published name of the weight."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, PARITY_SIDE_PX, PARITY_SIDE_PX, generator=generator) * 2 - 1
    gradients = {}
    for name, build in builds.items():
        model = build().train()
        _loss(model, pixels).backward()
        gradients[name] = {name: parameter.grad for name, parameter in model.named_parameters()}
    theirs, errors = gradients[BASELINE], {}
    for name, gradient in gradients[OURS].items():
        published = name.rpartition("encoder.")[2]
        other = theirs[f"model.{TRANSFORMERS.from_published(published)}"]
        assert gradient is not None
        assert other is not None
        errors[published] = float((gradient - other).norm() / other.norm().clamp(min=1e-30))
    return errors


def measure_step(build: Build, is_checkpointed: bool, case: Any) -> Step:
    """One step in this process."""
    model = build().train()
    if is_checkpointed:
        inner: Any = getattr(model, "model", model)
        # Renamed in later releases of transformers.
        enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    precision = torch.autocast("cpu", torch.bfloat16) if case.dtype == "bfloat16" else nullcontext()
    pixels = case.pixels.float()
    with precision:
        _loss(model, pixels[:, :, :64, :64]).backward()  # Libraries allocate on first use.
    clear = Path("/proc/self/clear_refs")
    before_kb = _memory_kb("VmRSS") if clear.exists() else 0
    if clear.exists():
        clear.write_text("5")  # Resets the peak.
    start, cpu_start = time.perf_counter(), time.process_time()
    with precision:
        loss = _loss(model, pixels)
    loss.backward()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak_mb = (_memory_kb("VmHWM") - before_kb) * 1024 / 1e6 if clear.exists() else None
    return Step(peak_mb, seconds, cpu_seconds)


def _loss(model: nn.Module, pixels: Tensor) -> Tensor:
    features: Tensor = model(pixels)
    return features.float().square().mean()


def _memory_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}.")


def _step_in_a_process(contender: Contender, case: Any, threads: int, module: str) -> Step:
    command = [sys.executable, "-m", module, "--measure-training", json.dumps(contender), "--threads", str(threads)]
    command += ["--sizes", f"{case.height_px}x{case.width_px}", "--batches", str(case.batch), "--dtypes", case.dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return Step(*json.loads(result.stdout.strip().splitlines()[-1]))


def _print_table(steps: dict[Contender, list[Step]]) -> list[dict[str, Any]]:
    header = ["contender", "peak MB", "x theirs", "step s", "faster by", "CPU s", "less by"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    rows = []
    for contender, measured in steps.items():
        baseline = steps[Contender(BASELINE, contender.is_checkpointed)]
        peaks = [step.peak_mb for step in measured if step.peak_mb is not None]
        theirs = [step.peak_mb for step in baseline if step.peak_mb is not None]
        row = {
            "contender": str(contender),
            "peak_mb": max(peaks, default=None),
            "memory_ratio": max(peaks) / max(theirs) if peaks and theirs else None,
            "seconds": statistics.median(step.seconds for step in measured),
            "speedup": _ratio(baseline, measured, "seconds"),
            "cpu_seconds": statistics.median(step.cpu_seconds for step in measured),
            "cpu_ratio": _ratio(baseline, measured, "cpu_seconds"),
        }
        rows.append(row)
        shown = [
            row["contender"],
            "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
            "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}",
            *(f"{row[name]:.2f}" for name in ("seconds", "speedup", "cpu_seconds", "cpu_ratio")),
        ]
        print("| " + " | ".join(map(str, shown)) + " |", flush=True)
    return rows


def _ratio(theirs: Sequence[Step], ours: Sequence[Step], field: str) -> float:
    """The median of the rounds' ratios."""
    pairs = zip(theirs, ours, strict=True)
    return statistics.median(getattr(baseline, field) / getattr(step, field) for baseline, step in pairs)
