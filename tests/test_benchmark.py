"""The benchmark refuses what is wrong, and measures the memory that the encoder needs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from image_encoder_vit.commands import benchmark

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "benchmark.py"

# transformers' class needs 1694 MB beyond its weights at 1024 x 1024 px in float32, one whole bias 805 MB.
MEMORY_BOUND_MB = 1694 / 8


@pytest.mark.full_size
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_leaves_no_room_for_a_whole_bias() -> None:
    command = [sys.executable, SCRIPT, "--measure-memory", benchmark.OURS, "--dtypes", "float32"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert 10 < float(result.stdout.split()[-1]) < MEMORY_BOUND_MB


def test_flops_are_counted_by_the_real_tokens() -> None:
    case = benchmark.Case(1024, 1024, 1, "float32")
    linears = 2 * 4096 * 12 * (4 + 2 * 4) * 768**2 / 1e9
    global_attention = 4 * 2 * 2 * 4096**2 * 768 / 1e9
    counted = benchmark.count_gflop(case)
    assert linears + global_attention < counted < 1.1 * (linears + global_attention)
    assert benchmark.count_gflop(case._replace(batch=2)) == pytest.approx(2 * counted, rel=1e-4)


@pytest.mark.full_size
def test_a_contender_that_differs_gets_no_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if not hasattr(__import__("transformers"), "UnlimitedOcrConfig"):
        pytest.skip("this transformers has no UnlimitedOcr to measure against")

    def run_slightly_wrong(case: benchmark.Case, deepseek_file: Path | None) -> benchmark.Run:
        right = benchmark.run_ours(case, deepseek_file)
        return lambda pixels: right(pixels) * 1.001

    monkeypatch.setitem(benchmark.CONTENDERS, "slightly wrong", run_slightly_wrong)
    arguments = ["--sizes", "64x128", "--dtypes", "float32", "--rounds", "2", "--no-memory"]
    arguments += ["--contenders", benchmark.OURS, "slightly wrong", "--json", str(tmp_path / "report.json")]
    threads = torch.get_num_threads()
    assert benchmark.main(arguments) == 1
    assert torch.get_num_threads() == threads
    output = capsys.readouterr().out
    assert re.search(r"\n\| image-encoder-vit \| \d+\.\d\d \|", output)
    assert not re.search(r"\n\| slightly wrong \|", output)
    assert re.search(r"refused: slightly wrong: error 1.0e-03 exceeds 1.0e-05", output)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [result["contender"] for result in report["cases"][0]["results"]] == [benchmark.BASELINE, benchmark.OURS]
