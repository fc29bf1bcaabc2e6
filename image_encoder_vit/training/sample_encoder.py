"""
Trains the sample encoder: to tell the layout classes of drawn pages in every cell, and a page from others.

Letters in shapes: B views, K classes, C channels of a map, h and w its rows and columns of cells.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ..configuration_image_encoder_vit import ImageEncoderViTConfig
from ..modeling_image_encoder_vit import ImageEncoderViTModel
from .drawn_pages import CLASSES, OUTSIDE
from .page_views import LABELS_IN_CELL, BatchShape, PackedPage, ViewBatches

MAPS = ("neck", "net_3")
CANVAS_PX = 768  # Side of the canvas of the sample's image processor.
# What a square of a class counts: blank paper and padding are everywhere and easy, formulas and headings rare.
CLASS_WEIGHTS = {
    "paper": 0.25,
    "text": 0.5,
    "heading": 1.3,
    "table": 1.3,
    "figure": 1.3,
    "photo": 0.8,
    "formula": 4.0,
    "outside": 0.15,
}
MAP_WEIGHTS = {"neck": 1.0, "net_3": 0.7}
RETRIEVAL_WEIGHT = 0.25
TEMPERATURE = 0.1
REMEMBERED_VIEWS = 512
# Muon for the matrices of the blocks, AdamW for the rest, which alone takes 2.5 times the steps to the same loss.
MUON_LEARNING_RATE, ADAMW_LEARNING_RATE = 1e-2, 2e-3
WEIGHT_DECAY, BETAS, MAX_GRADIENT_NORM = 0.05, (0.9, 0.98), 1.0
WARM_UP_STEPS = 150
FINAL_RATE = 0.02  # Of the highest.


def sample_config() -> ImageEncoderViTConfig:
    return ImageEncoderViTConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=512,
        output_channels=80,
        downsample_channels=(112, 128),
        window_size=8,
        global_attn_indexes=(2,),
    )


class Phase(NamedTuple):
    steps: int
    shape: BatchShape


# Small squares first: attention over the whole page costs with the fourth power of the side.
PHASES = (
    Phase(4500, BatchShape(256, pairs=5, crops=6, scales=(0.35, 2.0))),
    Phase(3000, BatchShape(512, pairs=2, crops=2, scales=(0.5, 2.0))),
)


class LayoutHead(nn.Module):
    """
    Classes of cells by cosine: a prototype for each class, (K, C), and one scale for how sure a cosine makes. So a
    cell's class is that of the nearest prototype, and features of a class come to lie in one direction.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(len(CLASSES), channels) / math.sqrt(channels))
        self.log_scale = nn.Parameter(torch.tensor(math.log(12.0)))

    def forward(self, features: Tensor) -> Tensor:
        """The logits (B, K, h, w) of a map (B, C, h, w)."""
        directions = F.normalize(features.float(), dim=1)
        return self.log_scale.exp() * torch.einsum("bchw,kc->bkhw", directions, F.normalize(self.prototypes, dim=1))


class SampleTrainer(nn.Module):
    """The encoder with what only its training needs: a layout head for each map, and recent pages to tell apart."""

    def __init__(self, config: ImageEncoderViTConfig) -> None:
        super().__init__()
        self.model = ImageEncoderViTModel(config)
        self.heads = nn.ModuleDict(
            {"neck": LayoutHead(config.output_channels), "net_3": LayoutHead(config.downsample_channels[-1])}
        )
        self.memory = torch.zeros(0, 2 * config.downsample_channels[-1])
        self.memory_pages = torch.zeros(0, dtype=torch.long)

    def losses(self, batch: dict[str, Tensor], pairs: int) -> dict[str, Tensor]:
        """The loss of each kind, and how often the other view of a page is the nearest of all."""
        pixels = batch["pixels"].permute(0, 3, 1, 2).float() / 127.5 - 1
        shares = batch["shares"].permute(0, 3, 1, 2).float() / LABELS_IN_CELL  # (B, K, h, w)
        with torch.autocast("cpu", torch.bfloat16):
            maps = dict(zip(MAPS, self.model.encoder(pixels, stages=MAPS), strict=True))
        results = {}
        for name, features in maps.items():
            stride = pixels.shape[-1] // features.shape[-1]
            cells = F.avg_pool2d(shares, stride // 16) if stride > 16 else shares
            results[name] = layout_loss(self.heads[name](features), cells)
        inside = 1 - F.avg_pool2d(shares[: 2 * pairs, OUTSIDE : OUTSIDE + 1], 4)
        vectors = pooled(maps["net_3"][: 2 * pairs].float(), inside)
        results["retrieval"], results["found"] = self._retrieval(vectors, batch["pages"][: 2 * pairs])
        return results

    def _retrieval(self, vectors: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        # Standardised, as a search over a store does it.
        everything = torch.cat([vectors, self.memory])
        mean, deviation = everything.detach().mean(dim=0), everything.detach().std(dim=0) + 1e-4
        directions = F.normalize((everything - mean) / deviation, dim=1)
        logits = directions[: len(vectors)] @ directions.T / TEMPERATURE
        owners = torch.cat([pages, self.memory_pages])
        partner = torch.arange(len(vectors)) ^ 1
        same = owners[None] == pages[:, None]
        same[torch.arange(len(vectors)), partner] = False  # The partner is what is looked for.
        logits = logits.masked_fill(same, -torch.inf)
        self.memory = everything.detach()[:REMEMBERED_VIEWS]
        self.memory_pages = owners[:REMEMBERED_VIEWS]
        return F.cross_entropy(logits, partner), (logits.argmax(dim=1) == partner).float().mean()


def layout_loss(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of the classes' shares (B, K, h, w) in each cell, by their weights."""
    weights = torch.tensor([CLASS_WEIGHTS[name] for name in CLASSES])[:, None, None]
    weighted = shares * weights
    # As probabilities to reach, so that a line of text in a cell is not outvoted by the paper around it.
    targets = weighted / weighted.sum(dim=1, keepdim=True).clamp(min=1e-6)
    importance = weighted.sum(dim=1)
    return -((targets * F.log_softmax(logits, dim=1)).sum(dim=1) * importance).sum() / importance.sum()


def pooled(features: Tensor, weights: Tensor) -> Tensor:
    """Mean and deviation of each channel (B, 2 C) over the cells of (B, C, h, w), weighted (B, 1, h, w)."""
    total = weights.sum(dim=(2, 3)).clamp(min=1e-3)
    mean = (features * weights).sum(dim=(2, 3)) / total
    variance = ((features - mean[:, :, None, None]).square() * weights).sum(dim=(2, 3)) / total
    return torch.cat([mean, (variance + 1e-5).sqrt()], dim=1)


def learning_rate(step: int, steps: int) -> float:
    """As a share of the highest: rising at first, then falling along a cosine."""
    warm_up = min(WARM_UP_STEPS, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def training_steps(
    trainer: SampleTrainer, pages: list[PackedPage], phases: tuple[Phase, ...], seed: int, workers: int
) -> Iterator[dict[str, float]]:
    """Trains in place; after each step gives its losses."""
    shapes = [phase.shape for phase in phases for _ in range(phase.steps)]
    batches = DataLoader(
        ViewBatches(pages, shapes, seed),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=6 if workers else None,
    )
    optimizers = optimizers_of(trainer)
    schedules = [LambdaLR(optimizer, partial(learning_rate, steps=len(shapes))) for optimizer in optimizers]
    trainer.train()
    for step, batch in enumerate(batches):
        shape = shapes[step]
        if step and shape.side_px != shapes[step - 1].side_px:
            trainer.memory, trainer.memory_pages = trainer.memory[:0], trainer.memory_pages[:0]
        losses = trainer.losses(batch, shape.pairs)
        loss = sum(MAP_WEIGHTS[name] * losses[name] for name in MAPS) + RETRIEVAL_WEIGHT * losses["retrieval"]
        trainer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.parameters(), MAX_GRADIENT_NORM)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        yield {name: float(value.detach()) for name, value in losses.items()}


def optimizers_of(trainer: SampleTrainer) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices of the blocks' linear layers, AdamW for everything else."""
    matrices = [m.weight for m in trainer.model.encoder.blocks.modules() if isinstance(m, nn.Linear)]
    hidden = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in trainer.parameters() if id(parameter) not in hidden]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, MUON_LEARNING_RATE, WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, ADAMW_LEARNING_RATE, BETAS),
    ]
