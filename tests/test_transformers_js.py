"""
The folder for transformers.js. Its structure is checked always; `make test-js` installs transformers.js, and then what
Node computes is compared with what Python does.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import relative_error, small_model
from PIL import Image

from image_encoder_vit import ImageEncoderViTImageProcessorPil
from image_encoder_vit.runtimes.transformers_js import ONNX_FILES, page_settings, preprocessor_config

ROOT = Path(__file__).parent.parent
NODE_MODULES = Path(os.environ.get("NODE_MODULES", ROOT / ".node" / "node_modules"))
SIDE = 128
BOUND = 1e-4
# Relative errors of the small model, measured: 1.0e-3 and 2.0e-2.
BOUNDS = {"fp32": BOUND, "fp16": 5e-3, "q8": 0.1}
# Processor types that transformers.js 4 maps to its plain processor.
KNOWN_TYPES = {"ViTImageProcessor"}

needs_node = pytest.mark.skipif(
    not (NODE_MODULES / "@huggingface" / "transformers").is_dir(), reason="transformers.js is installed by make test-js"
)


@pytest.fixture(scope="module")
def folder(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command makes of the small model; in a process of its own, as ONNX Runtime wants."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} comes with the extra export, which this environment lacks")
    output = tmp_path_factory.mktemp("js") / "folder"
    command = [sys.executable, "-m", "image_encoder_vit", "export", "--format", "transformers.js"]
    command += [model_folder, str(output), "--size", f"{SIDE}x{SIDE}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0].strip() for line in result.stdout.splitlines()[1:]] == list(ONNX_FILES)
    return output


def test_the_folder_is_what_transformers_js_looks_for(folder: Path) -> None:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    onnx_files = {f"onnx/{name}" for name in ("model.onnx", "model_fp16.onnx", "model_quantized.onnx")}
    assert files == {"README.md", "config.json", "preprocessor_config.json", "prepare_page.mjs"} | onnx_files
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "image_encoder_vit"
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"] in KNOWN_TYPES
    assert (folder / "onnx/model_quantized.onnx").stat().st_size < (folder / "onnx/model.onnx").stat().st_size


def test_its_readme_tells_the_error_of_every_file(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| onnx/([\w.]+) \| [\d.]+ \| (.*) \|$", readme, re.MULTILINE)
    assert {dtype: name for dtype, name, _ in rows} == ONNX_FILES
    for dtype, _, errors in rows:
        largest = max(map(float, errors.split(" | ")))
        assert (0 if dtype == "fp32" else BOUND) < largest < BOUNDS[dtype]


def test_settings_of_other_models_are_kept() -> None:
    sam = page_settings(ImageEncoderViTImageProcessorPil.from_preset("sam"), (64, 64))
    assert (sam["padding_position"], sam["padding_color"], sam["resample"]) == ("bottom_right", "mean", 2)
    got = preprocessor_config(page_settings(ImageEncoderViTImageProcessorPil.from_preset("got-ocr2"), (64, 64)))
    assert (got["size"], got["do_pad"]) == ({"height": 64, "width": 64}, False)
    wide = preprocessor_config(page_settings(ImageEncoderViTImageProcessorPil(), (64, 96)))
    assert (wide["size"], wide["do_pad"]) == ({"height": 64, "width": 96}, False)
    with pytest.raises(ValueError, match="bilinear"):
        page_settings(ImageEncoderViTImageProcessorPil(resample=1), (64, 64))


def test_a_failed_export_leaves_nothing(model_folder: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "image_encoder_vit", "export", "--format", "transformers.js", model_folder]
    result = subprocess.run([*command, str(tmp_path / "js"), "--size", "100x64"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "multiples of patch_size=16" in result.stderr
    assert not list(tmp_path.iterdir())


# What Node computes

PAGES = [((1240, 1754), "RGB"), ((300, 341), "RGB"), ((40, 30), "RGBA"), ((700, 90), "L"), ((128, 128), "RGB")]


def write_pages(place: Path) -> list[Path]:
    """Noise over large shapes, so that every px of a resized page depends on its filter."""
    paths = []
    for seed, ((width, height), mode) in enumerate(PAGES):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
        pixels[height // 4 : height // 2] = 255
        paths.append(place / f"{seed}.png")
        Image.fromarray(pixels, "RGBA").convert(mode).save(paths[-1])
    return paths


def run_node(place: Path, script: str, *arguments: object) -> str:
    """Runs a module that lies in `place`, where transformers.js can be imported."""
    if not (place / "node_modules").exists():
        (place / "node_modules").symlink_to(NODE_MODULES)
    result = subprocess.run(["node", script, *map(str, arguments)], capture_output=True, text=True, cwd=place)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def results(folder: Path, pages: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("node")
    shutil.copy(ROOT / "tests" / "transformers_js_check.mjs", place)
    (place / "cases.json").write_text(json.dumps([{"image": str(path)} for path in pages]))
    run_node(place, "transformers_js_check.mjs", folder, "cases.json", "results.json")
    return json.loads((place / "results.json").read_text())


@pytest.fixture(scope="module")
def expected(model_folder: str, pages: list[Path]) -> tuple[Any, Any]:
    """What Python makes of the pages: the processor's inputs and the model's outputs."""
    inputs = ImageEncoderViTImageProcessorPil(size=SIDE)([Image.open(path) for path in pages], return_tensors="pt")
    with torch.inference_mode():
        return inputs, small_model()(inputs["pixel_values"])


@needs_node
def test_pages_are_prepared_to_the_bit(results: dict[str, Any], expected: tuple[Any, Any]) -> None:
    inputs, _ = expected
    for index, page in enumerate(results["pages"]):
        pixels = np.frombuffer(base64.b64decode(page["data"]), dtype=np.float32).reshape(page["dims"])
        np.testing.assert_array_equal(pixels[0], inputs["pixel_values"][index].numpy())
        assert page["originalSize"] == inputs["original_sizes"][index].tolist()
        assert page["validRegion"] == inputs["valid_regions"][index].tolist()


def tensor_of(numbers: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(numbers["data"]).view(numbers["dims"])


@needs_node
@pytest.mark.parametrize("dtype", [*BOUNDS])
def test_models_in_node_give_what_python_gives(dtype: str, results: dict[str, Any], expected: tuple[Any, Any]) -> None:
    _, outputs = expected
    for index, answer in enumerate(results["models"][dtype]):
        assert set(answer) == set(outputs)
        for name, numbers in answer.items():
            assert relative_error(tensor_of(numbers), outputs[name][index : index + 1]) <= BOUNDS[dtype]


@needs_node
def test_the_pipeline_works_and_is_exact_with_the_page_processor(
    results: dict[str, Any], expected: tuple[Any, Any]
) -> None:
    _, outputs = expected
    assert relative_error(tensor_of(results["pipeline"]), outputs.last_hidden_state) <= BOUND
    assert relative_error(tensor_of(results["pooled"]), outputs.pooler_output) <= BOUND
    assert results["approximate"]["dims"] == list(outputs.last_hidden_state.shape)
    assert results["processor"] == ["ViTImageProcessor", [1, 3, SIDE, SIDE]]


@needs_node
def test_the_readme_s_code_runs(folder: Path, pages: list[Path], tmp_path: Path) -> None:
    place = shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(pages[0], place / "page.png")
    blocks = re.findall(r"```js\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for index, (block, shown) in enumerate(zip(blocks, ("last_hidden_state", "features"), strict=True)):
        code = block.replace("PATH_OR_ID", "./") + f"console.log(JSON.stringify({shown}.dims));\n"
        (place / f"{index}.mjs").write_text(code)
        assert json.loads(run_node(place, f"{index}.mjs").splitlines()[-1]) == [1, 20, 2, 2]
