"""Folders with a DeepEncoder: Auto classes, pipeline, remote code, strict loading, placement and adapters."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils import compute_module_sizes
from builders import DEEP_ENCODER_CODE, random_pixels, relative_error
from deep import small_deep_encoder
from fresh_python import FreshPython
from safetensors.torch import load_file, save_file
from test_loading import assert_same_weights, edit_weights
from test_remote_code import PACKAGE, SAMPLE_PAGE
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

from image_encoder_vit import (
    DeepEncoderConfig,
    DeepEncoderModel,
    ImageEncoderViTImageProcessorPil,
    ImageEncoderViTModel,
)
from image_encoder_vit.training.fine_tuning import with_lora

PLENTY = 1 << 40
GRIDS = torch.tensor([[2, 1]])

WITHOUT_PACKAGE = """
import sys
sys.modules["image_encoder_vit"] = None
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline
from safetensors.torch import save_file
folder, page, output = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(model).__name__ == "DeepEncoderModel", type(model)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).to_dict() == model.config.to_dict()
inputs = processor(page, return_tensors="pt")
extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True, image_processor=processor)
save_file(
    {
        "tokens": model(**inputs).vision_tokens[0].detach().contiguous(),
        "pipeline": extract(page, return_tensors=True).contiguous(),
    },
    output,
)
model.save_pretrained(folder + "-again")
processor.save_pretrained(folder + "-again")
"""


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DeepEncoder and its processor: views of 128 px, tiles of 64 px."""
    folder = tmp_path_factory.mktemp("deep")
    small_deep_encoder().save_pretrained(folder)
    ImageEncoderViTImageProcessorPil(size=128, tile_size=64, min_tiles=2, max_tiles=6).save_pretrained(folder)
    return folder


def tokens_of(model: torch.nn.Module, side_px: int = 128) -> torch.Tensor:
    pixels, tiles = random_pixels(1, 3, side_px, side_px), random_pixels(2, 3, 64, 64, seed=1)
    return model(pixels, pixel_values_local=tiles, tile_grids=GRIDS).vision_tokens[0]


def test_a_saved_folder_has_exactly_these_files_and_names(deep_folder: Path) -> None:
    files = {path.name for path in deep_folder.iterdir()}
    assert files == DEEP_ENCODER_CODE | {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert len(DEEP_ENCODER_CODE) == 13
    config = json.loads((deep_folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_deep_encoder.DeepEncoderConfig",
        "AutoModel": "modeling_deep_encoder.DeepEncoderModel",
    }
    assert config["model_type"] == "deep_encoder"
    assert load_file(deep_folder / "model.safetensors").keys() == small_deep_encoder().state_dict().keys()
    for module in DEEP_ENCODER_CODE:
        assert (deep_folder / module).read_bytes() == (PACKAGE / module).read_bytes()


def test_the_new_modules_import_only_what_every_installation_has() -> None:
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for name in ("modeling_deep_encoder", "configuration_deep_encoder"):
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in allowed, node.module
                assert node.module != "__future__"
            elif isinstance(node, ast.ImportFrom):
                assert f"{node.module}.py" in DEEP_ENCODER_CODE, node.module


def test_auto_classes_and_round_trip(deep_folder: Path) -> None:
    loaded = AutoModel.from_pretrained(deep_folder)
    assert type(loaded) is DeepEncoderModel
    assert not loaded.training
    assert_same_weights(loaded, small_deep_encoder())
    assert type(AutoConfig.from_pretrained(deep_folder)) is DeepEncoderConfig
    assert type(AutoImageProcessor.from_pretrained(deep_folder)).__name__.startswith("ImageEncoderViTImageProcessor")
    with torch.no_grad():
        assert torch.equal(tokens_of(loaded), tokens_of(small_deep_encoder()))
    low = AutoModel.from_pretrained(deep_folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("pool", [False, True])
def test_pipeline(deep_folder: Path, pool: bool) -> None:
    extract = pipeline("image-feature-extraction", model=str(deep_folder))
    with torch.no_grad():
        outputs = extract.model(**extract.image_processor(str(SAMPLE_PAGE), return_tensors="pt"))
    expected = outputs.pooler_output if pool else outputs.last_hidden_state
    torch.testing.assert_close(extract(str(SAMPLE_PAGE), pool=pool, return_tensors=True), expected)


def test_remote_code_gives_the_same_tokens_without_the_package(
    run_python: FreshPython, deep_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "outputs.safetensors"
    run_python(WITHOUT_PACKAGE, str(deep_folder), str(SAMPLE_PAGE), str(output), cache=tmp_path)
    remote = load_file(output)
    model = AutoModel.from_pretrained(deep_folder)
    inputs = AutoImageProcessor.from_pretrained(deep_folder, backend="pil")(str(SAMPLE_PAGE), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    assert relative_error(remote["tokens"], outputs.vision_tokens[0]) <= 1e-6
    assert relative_error(remote["pipeline"], outputs.last_hidden_state) <= 1e-6
    again = Path(f"{deep_folder}-again")
    assert {path.name: path.read_bytes() for path in again.glob("*.py")} == {
        path.name: path.read_bytes() for path in deep_folder.glob("*.py")
    }
    assert json.loads((again / "config.json").read_text()) == json.loads((deep_folder / "config.json").read_text())


def test_names_with_deepseek_s_prefix_and_what_nothing_reads_load_too(tmp_path: Path) -> None:
    model = small_deep_encoder()
    model.save_pretrained(tmp_path)
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    weights["model.vision_model.embeddings.patch_embedding.weight"] = torch.zeros(20, 3, 14, 14)
    weights["model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(AutoModel.from_pretrained(tmp_path), model)

    fresh = small_deep_encoder(seed=1)
    fresh.load_state_dict(weights)
    assert_same_weights(fresh, model)


def test_weights_that_do_not_fit_raise_and_are_named(tmp_path: Path) -> None:
    model = small_deep_encoder()
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, {"view_seperator": "view_separator", r"layers\.1\.mlp\.fc1\.bias": None})
    message = (
        r"(?s)does not fit.*Missing weights \(2\): view_seperator, vision_model.transformer.layers.1.mlp.fc1.bias"
        r".*Unexpected weights \(1\): view_separator"
    )
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, strict=False, output_loading_info=True)
    assert "view_seperator" in info["missing_keys"]
    assert torch.equal(loaded.image_newline, model.image_newline)
    with pytest.raises(RuntimeError, match="image_newline"):
        small_deep_encoder().load_state_dict({"view_seperator": model.view_seperator})


def test_a_whole_model_s_checkpoint_is_explained(tmp_path: Path) -> None:
    model = small_deep_encoder()
    model.save_pretrained(tmp_path)
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    save_file(weights | {"model.embed_tokens.weight": torch.zeros(4, 24)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)Unexpected weights \(1\).*a decoder too: .*pull --part deep-encoder"):
        AutoModel.from_pretrained(tmp_path)


def test_a_folder_of_the_other_model_is_refused(deep_folder: Path, model_folder: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)does not fit.*It holds an encoder under 'sam_model.'"):
        ImageEncoderViTModel.from_pretrained(deep_folder)
    with pytest.raises(ValueError, match=r"model_type 'image_encoder_vit', not 'deep_encoder'.*AutoModel"):
        DeepEncoderModel.from_pretrained(model_folder)


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
@pytest.mark.parametrize("share_in_memory", [0.02, 0.5, 0.9])
def test_auto_placement_with_too_little_memory(share_in_memory: float, deep_folder: Path, tmp_path: Path) -> None:
    size = compute_module_sizes(small_deep_encoder())[""]
    model = AutoModel.from_pretrained(
        deep_folder,
        device_map="auto",
        max_memory={"cpu": int(share_in_memory * size), "disk": PLENTY},
        offload_folder=tmp_path,
    )
    assert any(weight.is_meta for weight in model.parameters())
    assert_same_tokens(model)


def test_offloading_to_memory_and_disk(tmp_path: Path) -> None:
    for model in (
        cpu_offload(small_deep_encoder(), execution_device=torch.device("cpu")),
        disk_offload(small_deep_encoder(), tmp_path, execution_device=torch.device("cpu")),
    ):
        assert all(weight.is_meta for weight in model.parameters())
        assert_same_tokens(model)


def assert_same_tokens(model: torch.nn.Module) -> None:
    for side_px in (128, 192):  # CLIP's positions as they are, and resized.
        with torch.no_grad():
            assert relative_error(tokens_of(model, side_px), tokens_of(small_deep_encoder(), side_px)) <= 1e-6


def test_own_tokens_on_another_device_follow_the_cells() -> None:
    model = small_deep_encoder()
    cells = torch.empty(24, 2, 3, device="meta")
    assert model.lay_out_tokens(cells, None).device.type == "meta"
    assert model.lay_out_tokens(cells, None).shape == (2 * 4 + 1, 24)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it.
def test_lora_adapts_every_linear_layer_of_both_towers() -> None:
    pytest.importorskip("peft")
    model = small_deep_encoder()
    adapted = with_lora(model, rank=2)
    names = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name}
    assert len(names) == 4 * model.config.sam_config.num_hidden_layers + 4 * model.config.clip_num_hidden_layers
    with torch.no_grad():
        assert relative_error(tokens_of(adapted), tokens_of(small_deep_encoder())) <= 1e-6
    tokens_of(adapted.train()).square().mean().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any(".lora_B." in name for name in trained)
    assert all(".lora_" in name for name in trained)
    merged = adapted.merge_and_unload()
    assert type(merged) is DeepEncoderModel
    assert merged.state_dict().keys() == small_deep_encoder().state_dict().keys()
