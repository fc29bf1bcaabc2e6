"""The saved code loads, with equal outputs, in interpreters where this package is not installed; and pipelines."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import relative_error
from fresh_python import FreshPython
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, pipeline

import image_encoder_vit

PACKAGE = Path(image_encoder_vit.__file__).parent
SAMPLE_PAGE = Path(__file__).parent.parent / "samples" / "page.png"

# Importing the package is forbidden first of all: as good as not installed.
WITHOUT_PACKAGE = """
import sys
sys.modules["image_encoder_vit"] = None
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline
from safetensors.torch import save_file
folder, page, output = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
assert type(processor).__name__ == "ImageEncoderViTImageProcessorPil", type(processor)
assert config.embed_dim == model.config.hidden_size
inputs = processor(page, return_tensors="pt")
outputs = model(**inputs)
extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True, image_processor=processor)
save_file(
    {
        "pixel_values": inputs.pixel_values,
        "features": outputs.last_hidden_state.detach().contiguous(),
        "pipeline": extract(page, return_tensors=True).contiguous(),
        "pipeline_pool": extract(page, pool=True, return_tensors=True).contiguous(),
    },
    output,
)
model.save_pretrained(folder + "-again")
processor.save_pretrained(folder + "-again")
"""

WITH_PACKAGE_AND_TRUST = """
import sys
import image_encoder_vit
from transformers import AutoImageProcessor, AutoModel
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model) is image_encoder_vit.ImageEncoderViTModel, type(model)
assert type(processor).__module__.startswith("image_encoder_vit."), type(processor)
"""


def test_remote_code_gives_the_same_outputs_without_the_package(
    run_python: FreshPython, model_folder: str, tmp_path: Path
) -> None:
    output = tmp_path / "outputs.safetensors"
    run_python(WITHOUT_PACKAGE, model_folder, str(SAMPLE_PAGE), str(output), cache=tmp_path)
    remote = load_file(output)

    model = AutoModel.from_pretrained(model_folder)
    inputs = AutoImageProcessor.from_pretrained(model_folder, backend="pil")(str(SAMPLE_PAGE), return_tensors="pt")
    with torch.no_grad():
        features = model(**inputs).last_hidden_state
    assert torch.equal(remote["pixel_values"], inputs.pixel_values)
    for name, expected in {
        "features": features,
        "pipeline": features,
        "pipeline_pool": features.mean(dim=(2, 3)),
    }.items():
        assert relative_error(remote[name], expected) <= 1e-6, name

    # What remote code saves is what it was loaded from: it can travel on.
    again = Path(model_folder + "-again")
    files = sorted(path.name for path in Path(model_folder).iterdir())
    assert sorted(path.name for path in again.iterdir()) == files
    for name in files:
        if not name.endswith(".json"):
            assert (again / name).read_bytes() == (Path(model_folder) / name).read_bytes(), name
        else:
            assert json.loads((again / name).read_text()) == json.loads((Path(model_folder) / name).read_text()), name


def test_installed_code_wins_over_remote_code(run_python: FreshPython, model_folder: str, tmp_path: Path) -> None:
    run_python(WITH_PACKAGE_AND_TRUST, model_folder, cache=tmp_path)


@pytest.mark.parametrize("pool", [False, True])
def test_pipeline_with_the_package(model_folder: str, pool: bool) -> None:
    extract = pipeline("image-feature-extraction", model=model_folder)
    page = Image.open(SAMPLE_PAGE).convert("RGB")
    inputs = extract.image_processor(page, return_tensors="pt")
    with torch.no_grad():
        outputs = extract.model(**inputs)
    expected = outputs.pooler_output if pool else outputs.last_hidden_state
    for image in (page, str(SAMPLE_PAGE)):
        np.testing.assert_allclose(extract(image, pool=pool), expected.numpy(), rtol=1e-5, atol=1e-6)
    batch = extract([str(SAMPLE_PAGE)] * 3, pool=pool, batch_size=2, return_tensors=True)
    assert [features.shape for features in batch] == [expected.shape] * 3


def test_modules_follow_the_rules_of_remote_code(model_folder: str) -> None:
    """A module is copied with its `from .name import` neighbours, flat; what it imports on top is required."""
    modules = sorted(Path(model_folder).glob("*.py"))
    assert modules
    allowed = {"PIL", "torch", "transformers", "numpy", "huggingface_hub", *sys.stdlib_module_names}
    for module in modules:
        assert module.read_bytes() == (PACKAGE / module.name).read_bytes()
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, module.name
                assert node.module, module.name
                assert (Path(model_folder) / f"{node.module}.py").exists(), f"{module.name} needs {node.module}"
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed, f"{module.name} imports {node.module}"
                # It would turn annotations, which `@strict` reads, into strings.
                assert node.module != "__future__", module.name
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), module.name


def test_importing_the_package_changes_no_global_state(run_python: FreshPython, tmp_path: Path) -> None:
    # What transformers changes when it is imported is not ours.
    code = """
import logging, warnings
import PIL.Image, torch, transformers.image_processing_backends, transformers.modeling_utils

def state():
    return (
        torch.get_num_threads(), torch.get_default_dtype(), torch.random.initial_seed(), torch.is_grad_enabled(),
        PIL.Image.MAX_IMAGE_PIXELS, list(warnings.filters), logging.root.level, list(logging.root.handlers),
    )

before = state()
import image_encoder_vit
assert state() == before
"""
    run_python(code, cache=tmp_path)
