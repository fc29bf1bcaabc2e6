"""Compiles the CPU's attention kernel into the wheel, where there is a C compiler for it; without one it stays out."""

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "image_encoder_vit/cpu_kernel.c"
LIBRARY = "image_encoder_vit/_cpu_kernel.so"
FLAGS = ["-std=c11", "-O3", "-fPIC"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
# By the names that cpu_kernel.py knows them by: what a processor has, and the precision of its values.
FLAGS_OF_KERNEL = {
    "avx2_float32": AVX2,
    "avx2_bfloat16": [*AVX2, "-DBFLOAT16"],
    "avx2_float16": [*AVX2, "-DFLOAT16"],
    "avx512_float32": AVX512,
    "avx512_bfloat16": [*AVX512, "-DBFLOAT16"],
    "avx512_float16": [*AVX512, "-DFLOAT16"],
    "avx512bf16_bfloat16": [*AVX512, "-mavx512bf16", "-DBFLOAT16"],
}


class KernelBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the kernel to a wheel, or puts it beside the source of an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects the files of a wheel."""
        root = Path(self.root)
        (root / LIBRARY).unlink(missing_ok=True)
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return
        try:
            compile_kernel(root / SOURCE, root / LIBRARY)
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "stderr", "")
            self.app.display_warning(f"The CPU's attention kernel is left out, PyTorch's is used: {error}\n{output}")
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"


def compile_kernel(source: Path, library: Path) -> None:
    """
    Compiles `source` for each processor and precision into one `library`, which appears whole or not at all. Those that
    an old compiler does not know are left out.

    Raises:
        OSError: If there is no compiler: `CC`, or else `cc`.
        subprocess.CalledProcessError: If the compiler fails for all of them.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects, failures = [], []
        for kernel in FLAGS_OF_KERNEL:
            target = f"{scratch}/{kernel}.o"
            try:
                run([*compiler, *flags_of(kernel), "-c", str(source), "-o", target])
                objects.append(target)
            except subprocess.CalledProcessError as error:
                failures.append(error)
        if not objects:
            raise failures[0]
        run([*compiler, "-shared", *objects, "-o", f"{scratch}/library.so"])
        os.replace(f"{scratch}/library.so", library)


def flags_of(kernel: str) -> list[str]:
    return [*FLAGS, *FLAGS_OF_KERNEL[kernel], f"-DATTENTION=image_encoder_vit_attention_{kernel}"]


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
