"""The same encoder in transformers' own classes, with the same weights: the peers that parity is measured against."""

from typing import NamedTuple

import pytest
import transformers
from torch import nn
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from image_encoder_vit import ImageEncoderViTConfig, ImageEncoderViTModel

RENAMED = {
    "patch_embed.proj": "patch_embed.projection",
    "blocks": "layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "neck.0": "neck.conv1",
    "neck.1": "neck.layer_norm1",
    "neck.2": "neck.conv2",
    "neck.3": "neck.layer_norm2",
    "net_2": "proj.conv1",
    "net_3": "proj.conv2",
}


class Native(NamedTuple):
    """A native encoder class: its module and prefix in transformers, and its convolutions after the neck."""

    module: str
    prefix: str
    downsample_channels: list[int]


NATIVE = {
    "unlimited_ocr": Native("unlimited_ocr", "UnlimitedOcrSamVision", [512, 1024]),
    "deepseek_ocr2": Native("deepseek_ocr2", "DeepseekOcr2SamVision", [512, 896]),
}


def native_name(name: str) -> str:
    """The native name of one of our parameters."""
    for ours, theirs in RENAMED.items():
        name = f".{name}".replace(f".{ours}.", f".{theirs}.")[1:]
    return name


def native_twin(kind: str, model: ImageEncoderViTModel, attn_implementation: str) -> nn.Module:
    """The native class of that kind with the weights of `model`; skips where transformers is too old to have it."""
    native = NATIVE[kind]
    try:
        module = __import__(f"transformers.models.{native.module}.modeling_{native.module}", fromlist=["_"])
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no {native.module}")
    config_class = getattr(module, f"{native.prefix}Config")
    encoder_class = getattr(module, f"{native.prefix}Encoder")
    config = config_class(**shared_settings(model.config), downsample_channels=model.config.downsample_channels)
    return with_weights(encoder_class._from_config(config, attn_implementation=attn_implementation), model)


def sam_twin(model: ImageEncoderViTModel, attn_implementation: str) -> nn.Module:
    """The SAM encoder of transformers, which stops after the neck, with the weights of `model`."""
    config = SamVisionConfig(**shared_settings(model.config))
    return with_weights(SamVisionEncoder._from_config(config, attn_implementation=attn_implementation), model)


def shared_settings(config: ImageEncoderViTConfig) -> dict[str, object]:
    names = ("hidden_size", "output_channels", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    names += ("window_size", "global_attn_indexes", "qkv_bias", "use_abs_pos", "use_rel_pos")
    return {name: getattr(config, name) for name in names} | {"mlp_dim": int(config.hidden_size * config.mlp_ratio)}


def with_weights(native: nn.Module, model: ImageEncoderViTModel) -> nn.Module:
    native.load_state_dict({native_name(name): value for name, value in model.encoder.state_dict().items()})
    return native.eval()
