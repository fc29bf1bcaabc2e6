"""Quantisation configurations of transformers load and run on the CPU, or say what they need."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers import AutoModel

TESTS = Path(__file__).parent
TORCHAO = Path(sys.prefix) / "torchao"


def run_with(name: str, model_folder: str) -> subprocess.CompletedProcess[str]:
    if not (TORCHAO / "torchao").is_dir():
        pytest.skip("torchao is not beside this environment; the Makefile puts it there")
    command = [sys.executable, "-W", "ignore", str(TESTS / "quantized_worker.py"), model_folder, str(TORCHAO), name]
    return subprocess.run(command, capture_output=True, text=True, cwd=TESTS)


@pytest.mark.parametrize(
    "name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "IntxWeightOnlyConfig"]
)
def test_int8_of_torchao_runs(name: str, model_folder: str) -> None:
    result = run_with(name, model_folder)
    assert result.returncode == 0, result.stderr
    weight_class, *cosines = result.stdout.split()[-3:]
    assert weight_class != "Parameter"
    assert min(map(float, cosines)) >= 0.999


def test_float8_says_what_it_needs(model_folder: str) -> None:
    result = run_with("Float8DynamicActivationFloat8WeightConfig", model_folder)
    assert result.returncode != 0
    assert "Float8 dynamic quantization requires CUDA" in result.stderr


@pytest.mark.parametrize(
    ("config", "library", "package"),
    [("QuantoConfig", "optimum.quanto", "optimum-quanto"), ("BitsAndBytesConfig", "bitsandbytes", "bitsandbytes")],
)
def test_a_library_that_is_missing_is_named(config: str, library: str, package: str, model_folder: str) -> None:
    if importlib.util.find_spec(library.split(".")[0]) is not None:
        pytest.skip(f"{package} is installed")
    arguments = {"weights": "int8"} if config == "QuantoConfig" else {"load_in_8bit": True}
    with pytest.raises(ImportError, match=package):
        AutoModel.from_pretrained(model_folder, quantization_config=getattr(transformers, config)(**arguments))
