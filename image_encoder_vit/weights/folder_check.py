"""
Loads a model folder in a process of its own, by transformers and the folder's code, as a stranger will, and compares
what comes out with this package's own results.

That code may be a stranger's too. The process gets none of the user's environment but what Python needs to start, an
empty home folder and no token; it is no sandbox against code that looks for files by their full paths.
"""

import json
import os
import site
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from ..image_processing_image_encoder_vit import ImageEncoderViTImageProcessorPil
from ..support import message_of, visible
from .model_kinds import kind_of

PACKAGE_FOLDER = Path(__file__).parent.parent
CHECK_SECONDS = 900
PIXELS = "pixels"
# Rounding may differ between two runs of the same code on other numbers of threads, in the dtype of the weights.
MAX_RELATIVE_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
PROBE_IMAGE_PX = (93, 131)
# What Python, torch and their libraries need to start; nothing of it is private.
KEPT_VARIABLES = (
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "SYSTEMROOT", "LANG", "LC_ALL"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_DYNAMIC"),
)


def foreign_code(files: Iterable[Path]) -> list[str]:
    """Names of the Python files that are not this package's own, byte by byte."""
    return sorted(
        visible(path.name)
        for path in files
        if path.suffix == ".py"
        and not (
            (PACKAGE_FOLDER / path.name).is_file() and (PACKAGE_FOLDER / path.name).read_bytes() == path.read_bytes()
        )
    )


def check_remote_code(folder: Path, config: PreTrainedConfig) -> dict[str, str]:
    """
    Loads a folder in a fresh process, by transformers and the folder's own code, and compares its outputs with those
    of this package: those of a small random image, and the image processor's pixels of another one. Needs no
    network. Returns what was measured.

    Raises:
        ValueError: If the folder cannot be loaded so, the outputs differ, or they are no numbers.
    """
    outputs = kind_of(config).outputs
    probe = probe_of(config)
    try:
        ours = results_of(folder, outputs, probe)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{str(folder)!r} cannot be loaded: {' '.join(message_of(error, 20).split())}") from None
    for name, result in ours.items():
        if not torch.isfinite(result).all():
            cause = "preprocessor_config.json cannot work" if name == PIXELS else "weights are damaged"
            raise ValueError(f"{str(folder)!r} gives {name} that are not finite: its {cause}.")
    strangers = run_check(folder, outputs, probe)

    differences = {}
    for name, expected in ours.items():
        actual = strangers[name]
        if actual.shape != expected.shape:
            shapes = f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
            raise ValueError(f"{str(folder)!r} gives {name} of shape {shapes} when it is loaded with its own code.")
        if name == PIXELS:
            if not torch.equal(actual, expected):
                raise ValueError(f"{str(folder)!r} prepares images in another way when it is loaded with its own code.")
            continue
        reference = expected.double()
        difference = float((actual.double() - reference).norm() / reference.norm().clamp(min=1e-30))
        if not difference <= MAX_RELATIVE_DIFFERENCE.get(expected.dtype, 0.0):
            raise ValueError(
                f"{str(folder)!r} gives other {name} when it is loaded with its own code: relative difference "
                f"{difference:.3g}. Its code or weights are not those of this package; save it again."
            )
        differences[name] = difference
    height_px, width_px = probe["pixel_values"].shape[2:]
    return {
        f"{name}, loaded afresh with the published code": (
            f"{' x '.join(map(str, ours[name].shape))}, relative difference {difference:.3g}, "
            f"image {height_px} x {width_px} px"
        )
        for name, difference in differences.items()
    }


def results_of(folder: Path, outputs: Mapping[str, str], probe: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What this package's classes make of the probe: each output by its name, and the pixels."""
    results = {}
    for auto_class, output in outputs.items():
        model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=False).eval()
        with torch.no_grad():
            results[output] = getattr(model(probe["pixel_values"]), output)
    processor = ImageEncoderViTImageProcessorPil.from_pretrained(folder)
    image = Image.fromarray(probe["image"].numpy())
    return results | {PIXELS: processor(image, return_tensors="pt")["pixel_values"]}


def probe_of(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """A random image (height, width, 3), and random pixel values (1, channels, height in px, width in px)."""
    generator = torch.Generator().manual_seed(0)
    # A window and a bit on each side, and not square: padding, windows and resized positions all take part.
    patch, window = config.patch_size, config.window_size
    sides_px = patch * (window + 1), patch * (window + 3)
    pixel_values = torch.rand(1, config.num_channels, *sides_px, generator=generator) * 2 - 1
    image = torch.randint(0, 256, (*PROBE_IMAGE_PX, 3), dtype=torch.uint8, generator=generator)
    return {"image": image, "pixel_values": pixel_values}


def run_check(folder: Path, outputs: Mapping[str, str], probe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Runs `remote_code_check` on a folder in a process of its own, and returns its results, as `results_of`."""
    code = (Path(__file__).with_name("remote_code_check.py")).read_text(encoding="utf-8")
    with TemporaryDirectory(prefix="image-encoder-vit-") as scratch:
        probe_file, result_file = Path(scratch) / "probe.safetensors", Path(scratch) / "result.safetensors"
        save_file(probe, probe_file)
        command = [sys.executable, "-c", code, str(folder.absolute()), json.dumps(dict(outputs)), str(probe_file)]
        try:
            done = subprocess.run(
                [*command, str(result_file)],
                env=clean_environment(Path(scratch)),
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=CHECK_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{str(folder)!r} did not load and run within {CHECK_SECONDS} s.") from None
        if done.returncode != 0:
            reason = visible((done.stderr.strip().splitlines() or ["no message"])[-1])
            raise ValueError(f"{str(folder)!r} does not work when it is loaded with its own code: {reason[:300]}")
        return dict(load_file(result_file))


def clean_environment(scratch: Path) -> dict[str, str]:
    """An environment in which Python runs, with everything of the user's replaced by empty folders in `scratch`."""
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    home = scratch / "home"
    home.mkdir()
    if site.ENABLE_USER_SITE:
        # Packages that were installed for this user alone are found by it, instead of below the home folder.
        environment["PYTHONUSERBASE"] = site.getuserbase()
    return environment | {
        "HOME": str(home),
        "USERPROFILE": str(home),
        "TMPDIR": str(scratch),
        "HF_HOME": str(home / "huggingface"),
        # Code cached from another folder must not be taken for this one's.
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
