"""The CPU's attention kernel over random shapes, with sanitizers watching its memory, against attention in float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import hatch_build  # noqa: E402

SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SHAPES = 120
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}


def compiled(sources: list[Path], target: Path, flags: list[str]) -> str:
    """Compiles with the flags of an installation and the sanitizers; returns what the compiler has to say."""
    command = ["cc", *hatch_build.FLAGS, "-std=gnu11", *flags, *SANITIZERS, *map(str, sources)]
    result = subprocess.run([*command, "-o", str(target), "-lm", "-lpthread"], capture_output=True, text=True)
    return "" if result.returncode == 0 else result.stderr


@pytest.mark.skipif(
    sys.platform != "linux" or "AVX512" not in torch.backends.cpu.get_cpu_capability(),
    reason="the kernel needs Linux and AVX-512",
)
@pytest.mark.parametrize("precision", [*BOUNDS])
def test_any_shape_stays_within_its_memory_and_gives_the_exact_result(precision: str, tmp_path: Path) -> None:
    if precision == "bfloat16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no products of bfloat16")
    flags, trivial = hatch_build.FLAGS_OF_PRECISION[precision], tmp_path / "trivial.c"
    trivial.write_text("int main(void) { return 0; }\n")
    try:
        missing = compiled([trivial], tmp_path / "trivial", flags)
    except OSError as error:
        pytest.skip(f"no C compiler: {error}")
    if missing or subprocess.run([tmp_path / "trivial"]).returncode:
        pytest.skip(f"this compiler has no sanitizers: {missing}")
    sources = [ROOT / "image_encoder_vit" / "cpu_kernel.c", ROOT / "tests" / "kernel_driver.c"]
    assert compiled(sources, tmp_path / "driver", flags) == ""
    command = [str(tmp_path / "driver"), "1", str(SHAPES), str(BOUNDS[precision])]
    result = subprocess.run(command, capture_output=True, text=True)
    # The last line names the shape at which it stopped.
    assert result.returncode == 0, f"{result.stdout.splitlines()[-1:]}\n{result.stderr}"
    assert len(result.stdout.splitlines()) == SHAPES
