"""Saving and loading: round trips, foreign prefixes, and no silently random weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from builders import REMOTE_CODE, random_pixels, small_model
from safetensors.torch import load_file, save_file
from small import SMALL
from transformers import AutoImageProcessor, AutoModel

from image_encoder_vit import (
    ImageEncoderViT,
    ImageEncoderViTConfig,
    ImageEncoderViTImageProcessorPil,
    ImageEncoderViTModel,
)


def edit_weights(folder: Path, rename: dict[str, str | None]) -> None:
    """Renames weights of a saved model by regular expressions; a weight renamed to None is left out."""
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        new: str | None = name
        for pattern, replacement in rename.items():
            if new is not None and re.search(pattern, new):
                new = None if replacement is None else re.sub(pattern, replacement, new)
        if new is not None:
            weights[new] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name].to(weight.dtype)), name


def test_save_pretrained_writes_exactly_these_files(model_folder: str) -> None:
    files = {path.name for path in Path(model_folder).iterdir()}
    assert files == REMOTE_CODE | {"config.json", "model.safetensors", "preprocessor_config.json"}
    auto_map = json.loads((Path(model_folder) / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_image_encoder_vit.ImageEncoderViTConfig",
        "AutoModel": "modeling_image_encoder_vit.ImageEncoderViTModel",
        "AutoModelForImageClassification": "modeling_image_encoder_vit.ImageEncoderViTForImageClassification",
        "AutoBackbone": "modeling_image_encoder_vit.ImageEncoderViTBackbone",
    }
    processor = json.loads((Path(model_folder) / "preprocessor_config.json").read_text())
    assert processor["auto_map"]["AutoImageProcessor"] == [
        "image_processing_image_encoder_vit.ImageEncoderViTImageProcessorPil",
        "image_processing_image_encoder_vit.ImageEncoderViTImageProcessor",
    ]
    names = load_file(Path(model_folder) / "model.safetensors").keys()
    assert names == {f"encoder.{name}" for name in small_model().encoder.state_dict()}


def test_round_trip_is_bit_equal(model_folder: str) -> None:
    model = small_model()
    loaded = AutoModel.from_pretrained(model_folder)
    assert type(loaded) is ImageEncoderViTModel
    assert not loaded.training
    assert_same_weights(loaded, model)
    pixels = random_pixels(1, 3, 128, 128)
    assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_processor_round_trip(model_folder: str) -> None:
    processor = AutoImageProcessor.from_pretrained(model_folder)
    assert type(processor).__name__.startswith("ImageEncoderViTImageProcessor")
    assert dict(processor.size) == {"height": 128, "width": 128}
    assert AutoImageProcessor.from_pretrained(model_folder, backend="pil").to_dict() == (
        ImageEncoderViTImageProcessorPil.from_pretrained(model_folder).to_dict()
    )


def test_sharded_round_trip(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(ImageEncoderViTModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept_and_can_be_chosen(tmp_path: Path, dtype: torch.dtype) -> None:
    small_model().to(dtype).save_pretrained(tmp_path)
    assert ImageEncoderViTModel.from_pretrained(tmp_path, dtype="auto").dtype == dtype
    assert ImageEncoderViTModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert_same_weights(ImageEncoderViTModel.from_pretrained(tmp_path, dtype="auto"), small_model().to(dtype))


def test_weights_without_the_prefix_load_too(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, {r"^encoder\.": ""})
    assert_same_weights(AutoModel.from_pretrained(tmp_path), model)

    plain = model.encoder.state_dict()
    fresh = ImageEncoderViTModel(ImageEncoderViTConfig(**SMALL))
    fresh.load_state_dict(plain)
    assert_same_weights(fresh, model)
    fresh = ImageEncoderViTModel(ImageEncoderViTConfig(**SMALL))
    fresh.load_state_dict(model.state_dict())
    assert_same_weights(fresh, model)


def test_state_dicts_load_into_the_plain_encoder() -> None:
    model = small_model()
    encoder = ImageEncoderViT(128, 16, 3, 32, 4, 2, 4.0, 8, (1, 3), window_size=3, downsample_channels=(12, 20))
    encoder.load_state_dict(model.encoder.state_dict())
    pixels = random_pixels(1, 3, 128, 128)
    assert torch.equal(encoder(pixels), model(pixels).last_hidden_state)


def test_missing_weights_raise_and_are_named(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    edit_weights(tmp_path, {r"blocks\.1\.attn\.rel_pos_[hw]": None, "net_3": None})
    message = r"(?s)does not fit.*Missing weights \(3\): encoder.blocks.1.attn.rel_pos_h, .*encoder.net_3.weight"
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="net_3"):
        ImageEncoderViTModel(ImageEncoderViTConfig(**SMALL)).load_state_dict({"pos_embed": torch.zeros(1, 8, 8, 32)})


def test_unexpected_weights_raise_and_are_named(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    edit_weights(tmp_path, {"net_3": "net_4"})
    with pytest.raises(ValueError, match=r"(?s)Missing weights \(1\): encoder.net_3.weight.*net_4.weight"):
        AutoModel.from_pretrained(tmp_path)


def test_a_foreign_prefix_is_explained_and_can_be_mapped(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, {r"^encoder\.": "model.sam_model."})
    with pytest.raises(ValueError, match=r"(?s)Missing weights \(67\).*an encoder under 'model.sam_model.': load it"):
        AutoModel.from_pretrained(tmp_path)
    mapped = AutoModel.from_pretrained(tmp_path, key_mapping={r"^model\.sam_model\.": "encoder."})
    assert_same_weights(mapped, model)


def test_the_caller_can_opt_in_to_random_weights(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, {"net_3": None})
    loaded, info = AutoModel.from_pretrained(tmp_path, strict=False, output_loading_info=True)
    assert set(info["missing_keys"]) == {"encoder.net_3.weight"}
    assert torch.equal(loaded.encoder.net_2.weight, model.encoder.net_2.weight)


def test_weights_of_another_shape_raise(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"downsample_channels": [12, 24]}))
    message = r"Mismatched weights \(1\): encoder.net_3.weight \(20, 12, 3, 3\) instead of \(24, 12, 3, 3\)"
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert loaded.encoder.net_3.weight.shape == (24, 12, 3, 3)
