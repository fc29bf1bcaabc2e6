"""
What fine-tuning adds to transformers' `Trainer`: which layers LoRA adapts, what stays frozen, learning rates that fall
towards the first layers, and the figures of an evaluation.
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, Trainer

from ..modeling_image_encoder_vit import ImageEncoderViTForImageClassification
from ..support import import_extra

# For `peft.LoraConfig(target_modules=...)`: every linear layer of the blocks, a DeepEncoder's in both towers, by a
# pattern of the whole name. The list ["qkv", "proj", "lin1", "lin2"] works too, but its "proj" is also the convolution
# `patch_embed.proj`.
LORA_TARGETS = (
    r"(.*\.)?(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(lin1|lin2))"
    r"|layers\.\d+\.(self_attn\.(qkv_proj|out_proj)|mlp\.(fc1|fc2)))"
)


def with_lora(model: nn.Module, rank: int) -> Any:
    """
    The model wrapped by PEFT: every linear layer of its blocks gets an adapter of this rank, and nothing else is
    trained but the head, where it has one.

    Raises:
        ImportError: If PEFT is not installed.
    """
    peft = import_extra("peft", "finetune")
    head = ["layernorm", "classifier"] if isinstance(model, ImageEncoderViTForImageClassification) else None
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, modules_to_save=head)
    return peft.get_peft_model(model, config)


def freeze(encoder: Any, blocks: int | None = None) -> None:
    """
    Keeps the weights of an encoder as they are: all of them, or the patches, the positions and the first `blocks`.

    Raises:
        ValueError: If it has no more blocks than that.
    """
    if blocks is None:
        encoder.requires_grad_(False)
        return
    if blocks >= len(encoder.blocks):
        raise ValueError(f"Cannot freeze {blocks} of {len(encoder.blocks)} blocks: freeze the whole encoder instead.")
    encoder.patch_embed.requires_grad_(False)
    if encoder.pos_embed is not None:
        encoder.pos_embed.requires_grad_(False)
    encoder.blocks[:blocks].requires_grad_(False)


def layer_of(name: str, num_blocks: int) -> int:
    """
    The layer of a parameter, by which its learning rate falls: 0 for patches and positions, 1 to `num_blocks` for the
    blocks, and one more for all that follows.
    """
    if re.search(r"(^|\.)(patch_embed|pos_embed)(\.|$)", name):
        return 0
    block = re.search(r"(^|\.)blocks\.(\d+)\.", name)
    return int(block.group(2)) + 1 if block else num_blocks + 1


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.Tensor]],
    *,
    num_blocks: int,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float,
) -> list[dict[str, Any]]:
    """
    Groups for an optimizer of the parameters that are trained. Each layer learns `layer_decay` times as fast as the
    next one, as ViTDet (arXiv 2203.16527) and SAM's fine-tuners do; biases, norms and positions do not decay.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, num_blocks)
        decays = parameter.ndim > 1 and "pos_embed" not in name and "rel_pos" not in name
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "lr": learning_rate * layer_decay ** (num_blocks + 1 - layer),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


class FineTuner(Trainer):
    """A `Trainer` whose learning rate falls by `layer_decay` from layer to layer towards the first."""

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, layer_decay: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_decay = layer_decay

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments, over `parameter_groups`."""
        if self.optimizer is None:
            optimized = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, optimized)
            groups = parameter_groups(
                optimized.named_parameters(),
                num_blocks=self.model.config.num_hidden_layers,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                layer_decay=self.layer_decay,
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer


def accuracy_and_macro_f1(prediction: EvalPrediction) -> dict[str, float]:
    """
    The share of right labels, and the mean over classes of F1, the harmonic mean of precision and recall; classes that
    neither occur nor are predicted do not count.
    """
    labels = np.asarray(prediction.label_ids)
    predicted = np.asarray(prediction.predictions).argmax(axis=-1)
    count = prediction.predictions.shape[-1]
    hits = np.bincount(labels[labels == predicted], minlength=count)
    seen = np.bincount(labels, minlength=count) + np.bincount(predicted, minlength=count)
    f1 = 2 * hits[seen > 0] / seen[seen > 0]
    return {"accuracy": float((labels == predicted).mean()), "macro_f1": float(f1.mean())}
