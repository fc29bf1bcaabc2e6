"""`benchmark --train`: gradients first, and what it measures of a step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import small_model
from native import native_twin
from torch import nn

from image_encoder_vit.commands import benchmark, benchmark_training
from image_encoder_vit.commands.benchmark import Case, FirstOutput
from image_encoder_vit.commands.benchmark_training import BASELINE, OURS, Contender, Step

CASE = Case(128, 128, 2, "float32")


def ours() -> nn.Module:
    return FirstOutput(small_model(downsample_channels=[512, 1024]))


def theirs() -> nn.Module:
    return FirstOutput(native_twin("unlimited_ocr", small_model(downsample_channels=[512, 1024]), "sdpa"))


def test_gradients_are_those_of_transformers_class() -> None:
    errors = benchmark_training.gradient_errors({OURS: ours, BASELINE: theirs})
    assert errors.keys() == {
        name for name, _ in small_model(downsample_channels=[512, 1024]).encoder.named_parameters()
    }
    assert max(errors.values()) <= benchmark_training.GRADIENT_BOUND


def test_nothing_is_measured_where_gradients_differ(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> nn.Module:
        model: Any = ours()
        with torch.no_grad():
            model.model.encoder.blocks[0].mlp.lin2.weight.mul_(1.01)
        return model

    with pytest.raises(ArithmeticError, match=r"differs from transformers' by .*: nothing is measured"):
        list(benchmark_training.compare_training([CASE], {OURS: wrong, BASELINE: theirs}, 1, 1, "none"))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_measured(is_checkpointed: bool, dtype: str) -> None:
    step = benchmark_training.measure_step(ours, is_checkpointed, CASE._replace(dtype=dtype))
    assert step.seconds > 0
    assert step.cpu_seconds > 0
    assert (step.peak_mb is not None) == Path("/proc/self/clear_refs").exists()


def test_the_table_compares_each_with_its_own_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = {(BASELINE, False): 900.0, (OURS, False): 300.0, (BASELINE, True): 400.0, (OURS, True): 100.0}

    def step(contender: Contender, *_: object) -> Step:
        return Step(measured[contender], measured[contender] / 100, 1.0)

    monkeypatch.setattr(benchmark_training, "_step_in_a_process", step)
    monkeypatch.setattr(benchmark_training, "gradient_errors", lambda builds: {"pos_embed": 1e-6})
    (report,) = benchmark_training.compare_training([CASE], {}, 2, 1, "none")
    assert [row["memory_ratio"] for row in report["results"]] == [1, pytest.approx(1 / 3), 1, 0.25]
    assert [row["speedup"] for row in report["results"]] == [1, pytest.approx(3), 1, pytest.approx(4)]
    assert f"| {OURS}, gradient checkpointing | 100 | 0.25 | 1.00 | 4.00 |" in capsys.readouterr().out


def test_the_command_writes_each_case_and_ends_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark_training, "_step_in_a_process", lambda *_: Step(1.0, 1.0, 1.0))
    monkeypatch.setattr(benchmark_training, "gradient_errors", lambda builds: {"pos_embed": 1e-6})
    report = tmp_path / "report.json"
    arguments = ["--train", "--sizes", "64x64", "--batches", "1", "2", "--dtypes", "float32", "--json", str(report)]
    assert benchmark.main(arguments) == 0
    assert [entry["case"]["batch"] for entry in json.loads(report.read_text())["cases"]] == [1, 2]


@pytest.mark.parametrize("option", [["--grid"], ["--plot", "bars.png"]])
def test_training_has_no_grid_and_no_bars(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--train", *option])
    assert f"--train does not go with {option[0]}" in capsys.readouterr().err
