"""
A DeepEncoder as transformers itself loads it (from 5.20 on): a folder of its Unlimited-OCR without a decoder, whose
`get_image_features` gives the vision tokens.
"""

import json
from pathlib import Path
from typing import Any

import torch

from ..configuration_deep_encoder import DeepEncoderConfig
from ..storage.output_folder import discard, publish, unfinished_folder
from .export import open_model_weights
from .layouts import export_names
from .model_folder import WEIGHTS_FILE, write_weights
from .model_kinds import read_config


def export_native_folder(model_dir: str | Path, output_dir: str | Path) -> dict[str, str]:
    """
    Writes config.json and model.safetensors for `AutoModel` of transformers: the folder's weights under DeepSeek-OCR's
    names, bit by bit the same, and of a decoder what its class cannot do without, one embedding and one norm. Returns
    each published name's name in the file. The folder appears complete, or not at all.

    Raises:
        ValueError: If the folder does not hold a DeepEncoder.
        FileExistsError: If `output_dir` exists.
    """
    config = read_config(Path(model_dir))
    if not isinstance(config, DeepEncoderConfig):
        raise ValueError(f"{str(model_dir)!r} holds no DeepEncoder, but a model of type {config.model_type!r}.")
    tensors = open_model_weights(Path(model_dir))
    names = export_names(config, "deepseek-ocr")
    dtypes = {tensors.dtype(name) for name in names}
    if len(dtypes) != 1:
        raise ValueError(f"The weights have several dtypes, {sorted(map(str, dtypes))}: save the model in one.")
    dtype = dtypes.pop()
    width = config.projection_size
    stubs = {"model.embed_tokens.weight": torch.zeros(1, width), "model.norm.weight": torch.ones(width)}
    published = {theirs: ours for ours, theirs in names.items()}
    shapes = {theirs: tensors.shapes[ours] for ours, theirs in names.items()}
    output = Path(output_dir).absolute()
    settings = native_config(config) | {"dtype": str(dtype).removeprefix("torch.")}
    with unfinished_folder(output, "exporting") as folder:
        try:
            write_weights(
                folder / WEIGHTS_FILE,
                shapes | {name: tuple(stub.shape) for name, stub in stubs.items()},
                lambda name: stubs[name] if name in stubs else tensors.read(published[name]),
                dtype,
            )
            (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            publish(folder, output)
        except BaseException:
            discard(folder)
            raise
    return names


def native_config(config: DeepEncoderConfig) -> dict[str, Any]:
    """The content of config.json for transformers' Unlimited-OCR with this vision side and no decoder layer."""
    sam = config.sam_config
    shared = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size", "patch_size"),
        *("output_channels", "downsample_channels", "window_size", "global_attn_indexes"),
        *("qkv_bias", "use_abs_pos", "use_rel_pos"),
    )
    clip_patch_px = 14
    return {
        "model_type": "unlimited_ocr",
        "architectures": ["UnlimitedOcrModel"],
        "vision_config": {
            "model_type": "unlimited_ocr_vision",
            "sam_config": {
                "model_type": "unlimited_ocr_sam_vision_model",
                "mlp_dim": int(sam.hidden_size * sam.mlp_ratio),
                **{name: getattr(sam, name) for name in shared},
            },
            "encoder_config": {
                "model_type": "unlimited_ocr_vision_encoder",
                "hidden_size": config.clip_hidden_size,
                "intermediate_size": config.clip_intermediate_size,
                "num_hidden_layers": config.clip_num_hidden_layers,
                "num_attention_heads": config.clip_num_attention_heads,
                "image_size": clip_patch_px * config.clip_grid_size,
                "patch_size": clip_patch_px,
            },
        },
        "text_config": {
            "model_type": "unlimited_ocr_text",
            "hidden_size": config.projection_size,
            "num_hidden_layers": 0,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "vocab_size": 1,
        },
    }
