"""The benchmark refuses what is wrong, and measures the memory that the encoder needs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from image_encoder_vit import ImageEncoderViT
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
def test_a_contender_that_differs_or_fails_costs_its_own_row_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if not hasattr(__import__("transformers"), "UnlimitedOcrConfig"):
        pytest.skip("this transformers has no UnlimitedOcr to measure against")

    def run_slightly_wrong(case: benchmark.Case, deepseek_file: Path | None) -> benchmark.Run:
        right = benchmark.run_ours(case, deepseek_file)
        return lambda pixels: right(pixels) * 1.001

    def run_broken(case: benchmark.Case, deepseek_file: Path | None) -> benchmark.Run:
        raise RuntimeError("no such size")

    def run_once(case: benchmark.Case, deepseek_file: Path | None) -> benchmark.Run:
        runs = iter([benchmark.run_ours(case, deepseek_file)])
        return lambda pixels: next(runs)(pixels)

    contenders = {"slightly wrong": run_slightly_wrong, "broken": run_broken, "once": run_once}
    for name, run in contenders.items():
        monkeypatch.setitem(benchmark.CONTENDERS, name, run)
    arguments = ["--sizes", "64x128", "--dtypes", "float32", "--rounds", "2", "--no-memory"]
    arguments += ["--contenders", *contenders, benchmark.OURS, "--json", str(tmp_path / "report.json")]
    threads = torch.get_num_threads()
    assert benchmark.main(arguments) == 1
    assert torch.get_num_threads() == threads
    output = capsys.readouterr().out
    assert re.search(r"\n\| image-encoder-vit \| \d+\.\d\d \|", output)
    assert not re.search(r"\n\| (slightly wrong|broken|once) \|", output)
    assert re.search(r"refused: slightly wrong: error 1.0e-03 exceeds 1.0e-05", output)
    assert "refused: broken: RuntimeError: no such size" in output
    assert "refused: once: StopIteration" in output
    report = json.loads((tmp_path / "report.json").read_text())
    assert [result["contender"] for result in report["cases"][0]["results"]] == [benchmark.BASELINE, benchmark.OURS]


def entry(side_px: int, batch: int, dtype: str, seconds: float, ratio: float | None) -> dict[str, Any]:
    result = benchmark.Result(benchmark.OURS, seconds, 0.1, ratio, 1e-6, 100, 0.9, None)
    return {"case": benchmark.Case(side_px, side_px, batch, dtype)._asdict(), "results": [result._asdict()]}


def test_the_grid_is_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    dtypes = ("float32", "bfloat16")
    benchmark.print_grid([entry(224, batch, dtype, batch * 0.05, 2.5) for batch in (1, 16) for dtype in dtypes])
    table = capsys.readouterr().out.strip().splitlines()
    assert (
        table[0]
        == "| px | batch | " + " | ".join(f"{d}, {c}" for d in dtypes for c in ("ms an image", "x baseline")) + " |"
    )
    assert table[2:] == ["| 224 | 1 | 50 | 2.50 | 50 | 2.50 |", "| 224 | 16 | 50 | 2.50 | 50 | 2.50 |"]


def test_the_grid_takes_the_place_of_sizes_and_batches() -> None:
    cases = benchmark.parse_arguments(["--grid", "--dtypes", "float16"]).cases
    assert [(case.height_px, case.batch) for case in cases] == list(benchmark.GRID)
    assert {case.dtype for case in cases} == {"float16"}


def test_bars_name_seconds_and_ratio(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cases = [entry(224, 1, "float32", 2.39, 3.138)]
    assert benchmark.figures_of(cases[0]["results"][0]) == "2.39 s, 3.14 x"
    benchmark.plot({"cases": cases}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_a_file_that_imports_flash_attn_without_using_it_is_a_contender(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = ImageEncoderViT(64, embed_dim=16, depth=1, num_heads=2, out_chans=4, global_attn_indexes=[0])
    monkeypatch.setattr(benchmark, "random_encoder", lambda dtype: SimpleNamespace(encoder=ours))
    file = tmp_path / "sam_vary_sdpa.py"
    file.write_text(
        "from flash_attn import flash_attn_qkvpacked_func\n"
        "from image_encoder_vit import ImageEncoderViT\n\n\n"
        "def build_sam_vit_b(checkpoint=None):\n"
        "    return ImageEncoderViT(64, embed_dim=16, depth=1, num_heads=2, out_chans=4, global_attn_indexes=[0])\n"
    )
    case = benchmark.Case(64, 64, 1, "float32")
    with torch.no_grad():
        assert torch.equal(benchmark.run_deepseek(case, file)(case.pixels), ours.eval()(case.pixels))
    assert "flash_attn" not in sys.modules


def test_peers_of_one_size_are_measured_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    seen = []
    for name in ("segment-anything", "timm"):
        monkeypatch.setitem(benchmark.CONTENDERS, name, lambda case, file: lambda pixels: seen.append(pixels.shape[2]))
        assert benchmark.measure_memory(name, benchmark.Case(224, 224, 1, "float32"), None) >= 0
    assert seen == [224, 224]
