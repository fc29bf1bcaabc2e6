"""Small synthetic checkpoints in every layout that public ones of the family have, with random weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from small import SMALL

from image_encoder_vit import ImageEncoderViTConfig
from image_encoder_vit.modeling_image_encoder_vit import encoder_of

SOURCE_CONFIG_SECTION = {
    "layers": 4,
    "heads": 2,
    "width": 32,
    "global_attn_indexes": [1, 3],
    "downsample_channels": [12, 20],
}


class Recipe(NamedTuple):
    """
    How a checkpoint is laid out. `names` are (ours, theirs) parts of names; `files` is "odd" (one file of an unusual
    name, and its index), "sharded", "single" (model.safetensors), or the name of a pickle.
    """

    layout: str
    prefix: str
    names: tuple[tuple[str, str], ...] = ()
    files: str = "single"
    downsample_channels: tuple[int, ...] = (12, 20)
    dtype: torch.dtype = torch.bfloat16
    siblings: tuple[str, ...] = ()
    is_channels_last: bool = False
    projector: str | None = None


# Written out by hand, each as its public checkpoint has it, and not with the functions under test.
IN_TRANSFORMERS = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("neck.0.", "neck.conv1."),
    ("neck.1.", "neck.layer_norm1."),
    ("neck.2.", "neck.conv2."),
    ("neck.3.", "neck.layer_norm2."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    ("blocks.", "layers."),
    ("net_2.", "proj.conv1."),
    ("net_3.", "proj.conv2."),
)
CLIP_AND_TEXT = (
    "model.vision_model.embeddings.patch_embedding.weight",
    "model.vision_model.embeddings.position_embedding.weight",
    "model.vision_model.transformer.layers.0.self_attn.qkv_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.projector.layers.weight",
    "lm_head.weight",
)
RECIPES = {
    "deepseek-ocr": Recipe("deepseek-ocr", "model.sam_model.", files="odd", siblings=CLIP_AND_TEXT),
    "deepseek-ocr-2": Recipe(
        "deepseek-ocr-2",
        "model.sam_model.",
        files="sharded",
        siblings=("model.qwen2_model.model.model.layers.0.self_attn.q_proj.weight", *CLIP_AND_TEXT[3:]),
    ),
    "deepseek-ocr-2-896": Recipe(
        "deepseek-ocr-2", "model.sam_model.", downsample_channels=(12, 896), siblings=CLIP_AND_TEXT[3:]
    ),
    "unlimited-ocr-native": Recipe(
        "unlimited-ocr-transformers",
        "model.vision_tower.sam_encoder.",
        IN_TRANSFORMERS,
        siblings=("model.vision_tower.vision_encoder.embeddings.patch_embedding.weight",),
    ),
    "got-ocr2": Recipe("got-ocr2", "model.vision_tower_high.", siblings=("model.mm_projector_vary.weight",)),
    "got-ocr2-hf": Recipe(
        "got-ocr2-transformers",
        "vision_tower.",
        IN_TRANSFORMERS,
        projector="multi_modal_projector.",
        siblings=("multi_modal_projector.multimodal_projector.weight", "language_model.lm_head.weight"),
    ),
    "got-ocr2-hf-v5": Recipe(
        "got-ocr2-transformers",
        "model.vision_tower.",
        IN_TRANSFORMERS,
        projector="model.multi_modal_projector.",
        siblings=("model.multi_modal_projector.multimodal_projector.weight",),
    ),
    "sam-pth": Recipe(
        "sam",
        "image_encoder.",
        files="sam_vit_b_01ec64.pth",
        downsample_channels=(),
        dtype=torch.float32,
        siblings=("mask_decoder.iou_token.weight", "prompt_encoder.no_mask_embed.weight"),
    ),
    "sam-hf": Recipe(
        "sam-transformers",
        "vision_encoder.",
        IN_TRANSFORMERS,
        downsample_channels=(),
        dtype=torch.float32,
        siblings=("mask_decoder.iou_token.weight",),
    ),
    "vary": Recipe(
        "got-ocr2",
        "transformer.vision_tower_high.",
        files="pytorch_model.bin",
        siblings=("transformer.vision_tower.vision_model.post_layernorm.weight", "transformer.mm_projector.weight"),
    ),
    "vary-tiny": Recipe("vary-tiny", "model.vision_tower.", files="pytorch_model.bin"),
    "onechart": Recipe(
        "onechart", "model.vision_tower.", siblings=("num_decoder.0.weight", "model.mm_projector.weight")
    ),
    "deepseek-vl": Recipe(
        "deepseek-vl",
        "vision_model.vision_tower_high.vision_tower.",
        (("net_2.", "downsamples.0."), ("net_3.", "downsamples.1.")),
        files="sharded",
        siblings=(
            "vision_model.vision_tower_high.vision_tower.neck_hd.0.weight",
            "vision_model.vision_tower_high.vision_tower.hd_alpha_downsamples",
            "vision_model.vision_tower_low.vision_tower.pos_embed",
            "vision_model.vision_tower_low.vision_tower.patch_embed.proj.weight",
        ),
    ),
    "timm": Recipe(
        "timm", "", (("mlp.lin1.", "mlp.fc1."), ("mlp.lin2.", "mlp.fc2.")), downsample_channels=(), dtype=torch.float32
    ),
    "mlx": Recipe("deepseek-ocr", "sam_model.", is_channels_last=True, siblings=("language_model.lm_head.weight",)),
}


def encoder_weights(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> tuple[ImageEncoderViTConfig, dict[str, torch.Tensor]]:
    """A small configuration and random weights for it by published name, of a trained model's size."""
    config = ImageEncoderViTConfig(**{**SMALL, **changes})
    encoder = encoder_of(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in encoder.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:
            noise = 0.2 * noise + (1 if name.endswith("weight") else 0)
        elif "pos" in name:
            noise = 0.5 * noise
        else:
            noise = noise / value[0].numel() ** 0.5
        weights[name] = noise.to(dtype)
    return config, weights


def laid_out(recipe: Recipe, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under a recipe's names, with the siblings that its checkpoints have."""
    tensors = {}
    for published, value in weights.items():
        if recipe.is_channels_last and value.ndim == 4 and published != "pos_embed":
            value = value.permute(0, 2, 3, 1).contiguous()
        if recipe.projector and published.startswith("net_"):
            number = int(published[4]) - 1
            tensors[f"{recipe.projector}conv_upsampler{number}.weight"] = value
            continue
        name = published
        for ours, theirs in recipe.names:
            name = name.replace(ours, theirs)
        tensors[recipe.prefix + name] = value
    generator = torch.Generator().manual_seed(99)
    for sibling in recipe.siblings:
        # A ViT's position table has three dimensions: the one that is no encoder of this kind.
        shape = (1, 4, 8) if sibling.endswith("pos_embed") else (8, 3, 4, 4) if "patch_embed" in sibling else (4, 6)
        tensors[sibling] = torch.randn(shape, generator=generator).to(recipe.dtype)
    return tensors


def write_checkpoint(
    folder: Path, recipe: Recipe, *, seed: int = 0, **changes: object
) -> tuple[ImageEncoderViTConfig, dict[str, torch.Tensor]]:
    """
    Writes a checkpoint's files to a folder, config.json included; returns the encoder's configuration and weights.
    """
    changes = {"downsample_channels": recipe.downsample_channels, **changes}
    config, weights = encoder_weights(seed=seed, dtype=recipe.dtype, **changes)
    write_tensors(folder, laid_out(recipe, weights), recipe.files)
    return config, weights


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], files: str) -> None:
    """Writes tensors in one of the ways that `Recipe.files` names."""
    folder.mkdir(parents=True, exist_ok=True)
    if files == "single":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif files in ("odd", "sharded"):
        shards = 1 if files == "odd" else 3
        digits = 6 if files == "odd" else 5
        weight_map = {}
        names = sorted(tensors)
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:0{digits}d}.safetensors"
            part = {name: tensors[name] for name in names[shard::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, folder / files)


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder as a repository has them."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
