"""
Pulls out of whole models that transformers itself has built and saved: the encoder gives what the source's own class
gives, and its weights go back into it.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import relative_error
from safetensors.torch import load_file
from small import SMALL
from torch import nn

from image_encoder_vit import ImageEncoderViTModel
from image_encoder_vit.weights.export import export_weights
from image_encoder_vit.weights.pull import pull

ENCODER = {name: value for name, value in SMALL.items() if name != "downsample_channels"} | {"mlp_dim": 128}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "mlp_layer_types": ["dense"],
}
CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
QWEN = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def classes(kind: str) -> Any:
    """The module with a model's classes; skips where transformers is too old to have it."""
    try:
        return importlib.import_module(f"transformers.models.{kind}")
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")


def unlimited_ocr() -> nn.Module:
    module = classes("unlimited_ocr")
    vision = {"sam_config": {**ENCODER, "downsample_channels": [12, 20]}, "encoder_config": {**CLIP, "patch_size": 14}}
    config = module.UnlimitedOcrConfig(vision_config=vision, text_config=TEXT)
    return module.UnlimitedOcrForConditionalGeneration(config)


def deepseek_ocr2() -> nn.Module:
    module = classes("deepseek_ocr2")
    sam = {**ENCODER, "downsample_channels": [12, 896]}
    vision = {"sam_config": sam, "encoder_config": {**QWEN, "hidden_size": 896, "num_attention_heads": 14}}
    config = module.DeepseekOcr2Config(vision_config=vision, text_config=TEXT)
    return module.DeepseekOcr2ForConditionalGeneration(config)


def got_ocr2() -> nn.Module:
    module = classes("got_ocr2")
    config = module.GotOcr2Config(vision_config=ENCODER, text_config={**QWEN, "model_type": "qwen2"})
    return module.GotOcr2ForConditionalGeneration(config)


def sam() -> nn.Module:
    module = classes("sam")
    vision = {**ENCODER, "output_channels": 256}
    config = module.SamConfig(
        vision_config=vision, prompt_encoder_config={"image_size": 128, "image_embedding_size": 8}
    )
    return module.SamModel(config)


def sam_hq() -> nn.Module:
    module = classes("sam_hq")
    config = module.SamHQConfig(
        vision_config={**ENCODER, "output_channels": 256},
        prompt_encoder_config={"image_size": 128, "image_embedding_size": 8},
        mask_decoder_config={"vit_dim": ENCODER["hidden_size"]},
    )
    return module.SamHQModel(config)


def sam_features(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return model.vision_encoder(pixels).last_hidden_state


def got_features(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    projector = model.model.multi_modal_projector
    features = model.model.vision_tower(pixels).last_hidden_state
    return projector.conv_upsampler2(projector.conv_upsampler1(features))


def tower_features(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return model.model.vision_tower.sam_encoder(pixels).last_hidden_state


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, torch.Tensor], torch.Tensor], str]] = {
    "unlimited_ocr": (unlimited_ocr, tower_features, "deepseek-ocr"),
    "deepseek_ocr2": (deepseek_ocr2, tower_features, "deepseek-ocr-2"),
    "got_ocr2": (got_ocr2, got_features, "got-ocr2-transformers"),
    "sam": (sam, sam_features, "sam-transformers"),
    "sam_hq": (sam_hq, sam_features, "sam-transformers"),
}


def built(kind: str) -> nn.Module:
    """A small random model of a kind, of values as training leaves them."""
    torch.manual_seed(0)
    model = KINDS[kind][0]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if "pos" in name else parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape) * scale + (parameter.ndim == 1 and name.endswith("weight")))
    return model


@pytest.mark.parametrize("shard_size", ["50GB", "200KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_gives_what_its_source_gives(kind: str, shard_size: str, tmp_path: Path) -> None:
    native = built(kind)
    native.save_pretrained(tmp_path / "source", max_shard_size=shard_size)
    pulled = pull(tmp_path / "source", tmp_path / "model")
    assert pulled.layout == KINDS[kind][2]
    assert not pulled.notices
    ours = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    assert isinstance(ours, ImageEncoderViTModel)
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected = KINDS[kind][1](native, pixels)
        actual = ours(pixels).last_hidden_state
    if expected.shape != actual.shape:  # Channels last in some of them.
        expected = expected.permute(0, 3, 1, 2)
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("kind", ["unlimited_ocr", "deepseek_ocr2", "sam"])
def test_changed_weights_go_back_into_the_model_they_came_from(kind: str, tmp_path: Path) -> None:
    native = built(kind)
    native.save_pretrained(tmp_path / "source")
    pull(tmp_path / "source", tmp_path / "model")
    ours = ImageEncoderViTModel.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(0.9)
    ours.save_pretrained(tmp_path / "tuned")
    export_weights(tmp_path / "tuned", tmp_path / "out.safetensors", "transformers")
    result = native.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=False)
    assert not result.unexpected_keys
    assert not any("sam_encoder" in name or "vision_encoder.layers.0.attn" in name for name in result.missing_keys)
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        expected, actual = KINDS[kind][1](native, pixels), ours(pixels).last_hidden_state
    assert relative_error(actual, expected) <= 1e-5
