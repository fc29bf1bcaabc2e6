"""The CPU's attention kernel over random shapes, with sanitizers watching its memory, against attention in float64."""

import subprocess
import sys
from pathlib import Path

import pytest
from builders import has_instructions

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import hatch_build  # noqa: E402

SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SHAPES = 120
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}


def compiled(sources: list[Path], target: Path, kernel: str) -> str:
    """Compiles with the flags of an installation and the sanitizers; returns what the compiler has to say."""
    command = ["cc", *hatch_build.flags_of(kernel), "-std=gnu11", *SANITIZERS, *map(str, sources)]
    result = subprocess.run([*command, "-o", str(target), "-lm", "-lpthread"], capture_output=True, text=True)
    return "" if result.returncode == 0 else result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel needs Linux")
@pytest.mark.parametrize("kernel", hatch_build.FLAGS_OF_KERNEL)
def test_any_shape_stays_within_its_memory_and_gives_the_exact_result(kernel: str, tmp_path: Path) -> None:
    if not has_instructions(kernel):
        pytest.skip("this processor lacks its instructions")
    trivial = tmp_path / "trivial.c"
    trivial.write_text("int main(void) { return 0; }\n")
    try:
        missing = compiled([trivial], tmp_path / "trivial", kernel)
    except OSError as error:
        pytest.skip(f"no C compiler: {error}")
    if missing or subprocess.run([tmp_path / "trivial"]).returncode:
        pytest.skip(f"this compiler has no sanitizers: {missing}")
    sources = [ROOT / "image_encoder_vit" / "cpu_kernel.c", ROOT / "tests" / "kernel_driver.c"]
    assert compiled(sources, tmp_path / "driver", kernel) == ""
    seed = 1 + [*hatch_build.FLAGS_OF_KERNEL].index(kernel)
    command = [str(tmp_path / "driver"), str(seed), str(SHAPES), str(BOUNDS[kernel.split("_")[1]])]
    result = subprocess.run(command, capture_output=True, text=True)
    # The last line names the shape at which it stopped.
    assert result.returncode == 0, f"{result.stdout.splitlines()[-1:]}\n{result.stderr}"
    assert len(result.stdout.splitlines()) == SHAPES
