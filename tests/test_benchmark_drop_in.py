"""The benchmark of the drop-in prints no number for outputs that differ, and leaves the model as it was."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_drop_in import built

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import benchmark_drop_in

from image_encoder_vit.runtimes.drop_in import find_sam_encoders, replace_sam_encoder


@pytest.fixture
def tower(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A small vision model in place of the full-size one, and arguments that fit it."""
    model = built("unlimited_ocr").model.vision_tower
    monkeypatch.setattr(benchmark_drop_in, "random_vision_model", lambda owner: model)
    arguments = ["--size", "128", "--rounds", "2", "--dtypes", "float32", "--json", str(tmp_path / "report.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark_drop_in.py", *arguments, "--threads", str(torch.get_num_threads())])
    return model


def test_before_and_after_are_timed(tower: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert benchmark_drop_in.main() == 0
    (result,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert result["dtype"] == "float32"
    assert result["error"]["before"] == 0 < result["error"]["after"] <= 1e-5
    assert all(result[name][state] > 0 for name in ("median_s", "encoder_median_s") for state in ("before", "after"))
    assert capsys.readouterr().out.splitlines()[-1].startswith("| float32 | ")
    assert list(find_sam_encoders(tower)) == ["sam_encoder"]  # nothing replaced is left


def test_a_drop_in_that_differs_gets_no_number(
    tower: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def replace_wrongly(model: Any) -> Any:
        replaced = replace_sam_encoder(model)
        model.sam_encoder.layers[3].register_forward_hook(lambda *call: call[2] + 0.01 * call[2].roll(1, -1))
        return replaced

    monkeypatch.setattr(benchmark_drop_in, "replace_sam_encoder", replace_wrongly)
    assert benchmark_drop_in.main() == 1
    assert "refused: float32: error " in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["results"] == []


@pytest.mark.full_size
@pytest.mark.parametrize(
    ("name", "encoder", "parameters"),
    [
        ("unlimited-ocr", "vision.sam_encoder", 400e6),
        ("slanext", "vision.vision_tower", 90e6),
        ("pp-formulanet", "vision", 96e6),
    ],
)
def test_the_full_size_models_are_transformers_own(name: str, encoder: str, parameters: float) -> None:
    owner = benchmark_drop_in.OWNERS[name]
    pytest.importorskip(f"transformers.models.{owner.module}")
    with torch.device("meta"):
        model = benchmark_drop_in.random_vision_model(owner)
    assert list(find_sam_encoders(model)) == [encoder]
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.03)
