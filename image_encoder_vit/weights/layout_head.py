"""The layout class of each cell, for encoders whose folder brings a layout head."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LAYOUT_HEAD_FILE = "layout_head.safetensors"


class LayoutHead(NamedTuple):
    """
    Classes by name, and a prototype (classes, C) of each: what the cells of a class have in common in the feature map
    `stage` (one of the configuration's `stage_names`), as directions of length 1.
    """

    classes: tuple[str, ...]
    prototypes: Tensor
    stage: str

    def classify(self, features: Tensor) -> Tensor:
        """The number of the class (h, w) whose prototype is nearest, by cosine, to each cell of a map (C, h, w)."""
        return torch.einsum("chw,kc->khw", F.normalize(features.float(), dim=0), self.prototypes).argmax(dim=0)

    def save(self, folder: Path) -> None:
        metadata = {"classes": json.dumps(self.classes), "stage": self.stage}
        save_file({"prototypes": self.prototypes.contiguous()}, folder / LAYOUT_HEAD_FILE, metadata)


def load_layout_head(folder: Path) -> LayoutHead | None:
    """The layout head in a model folder; None for one that has none."""
    path = folder / LAYOUT_HEAD_FILE
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        prototypes = F.normalize(file.get_tensor("prototypes").float(), dim=1)
    return LayoutHead(tuple(json.loads(metadata["classes"])), prototypes, metadata["stage"])
