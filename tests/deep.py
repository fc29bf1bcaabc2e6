"""A small random DeepEncoder, and the same in transformers' own Unlimited-OCR."""

import pytest
import torch
import transformers
from builders import randomize
from native import native_name, shared_settings
from small import SMALL
from torch import nn

from image_encoder_vit import DeepEncoderConfig, DeepEncoderModel, ImageEncoderViTConfig

SMALL_CLIP = {
    "clip_num_hidden_layers": 3,
    "clip_num_attention_heads": 4,
    "clip_intermediate_size": 48,
    "clip_grid_size": 2,  # That of the small encoder's training size, 128 px.
    "projection_size": 24,
}


def small_deep_config(sam_changes: dict[str, object] | None = None, **changes: object) -> DeepEncoderConfig:
    return DeepEncoderConfig(
        sam_config=ImageEncoderViTConfig(**{**SMALL, **(sam_changes or {})}), **SMALL_CLIP | changes
    )


def small_deep_encoder(
    seed: int = 0, sam_changes: dict[str, object] | None = None, **changes: object
) -> DeepEncoderModel:
    """A small random model in eval mode; `sam_changes` go to the configuration of its SAM encoder."""
    return randomize(DeepEncoderModel(small_deep_config(sam_changes, **changes)), seed).eval()


def unlimited_ocr(model: DeepEncoderModel, **text: object) -> nn.Module:
    """
    The whole Unlimited-OCR of transformers, with the weights of `model` on its vision side and a small random decoder,
    whose settings `text` changes; skips where transformers is too old to have it.
    """
    try:
        from transformers.models.unlimited_ocr import configuration_unlimited_ocr as configurations
        from transformers.models.unlimited_ocr import modeling_unlimited_ocr as models
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no Unlimited-OCR")
    config = model.config
    sam = config.sam_config
    grid_px = 14 * config.clip_grid_size
    vision = configurations.UnlimitedOcrVisionConfig(
        sam_config=configurations.UnlimitedOcrSamVisionConfig(
            **shared_settings(sam), downsample_channels=sam.downsample_channels
        ),
        encoder_config=configurations.UnlimitedOcrVisionEncoderConfig(
            hidden_size=config.clip_hidden_size,
            intermediate_size=config.clip_intermediate_size,
            num_hidden_layers=config.clip_num_hidden_layers,
            num_attention_heads=config.clip_num_attention_heads,
            image_size=grid_px,
            patch_size=14,
        ),
    )
    small_text = {
        "vocab_size": 64,
        "hidden_size": config.projection_size,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "eos_token_id": 63,
    }
    whole = configurations.UnlimitedOcrConfig(
        vision_config=vision,
        text_config=configurations.UnlimitedOcrTextConfig(**small_text | text),
        image_token_id=62,
    )
    native = randomize(models.UnlimitedOcrForConditionalGeneration(whole), seed=1).eval()
    named = {f"model.{name}": value for name, value in unlimited_ocr_weights(model).items()}
    rest = {
        name: value for name, value in native.state_dict().items() if ".language_model." in name or "lm_head" in name
    }
    native.load_state_dict(named | rest)
    return native


def unlimited_ocr_weights(model: DeepEncoderModel) -> dict[str, torch.Tensor]:
    """The weights under the names that transformers holds them by, queries, keys and values apart."""
    renamed = {}
    for name, value in model.state_dict().items():
        if name.startswith("sam_model."):
            renamed["vision_tower.sam_encoder." + native_name(name.removeprefix("sam_model."))] = value
        elif ".qkv_proj." in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                split = name.replace("vision_model.transformer.", "vision_tower.vision_encoder.encoder.")
                renamed[split.replace("qkv_proj", f"{part}_proj")] = rows
        elif name.startswith("vision_model."):
            renamed[
                name.replace("vision_model.transformer.", "vision_tower.vision_encoder.encoder.").replace(
                    "vision_model.", "vision_tower.vision_encoder."
                )
            ] = value
        else:
            native = name.replace("projector.layers", "multi_modal_projector").replace("seperator", "separator")
            renamed[native] = value
    return renamed
