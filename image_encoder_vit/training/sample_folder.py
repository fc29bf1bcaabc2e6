"""The sample encoder as a model folder: weights in bfloat16, settings, layout head, measures and card."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..configuration_image_encoder_vit import ImageEncoderViTConfig
from ..image_processing_image_encoder_vit import ImageEncoderViTImageProcessorPil
from ..modeling_image_encoder_vit import ImageEncoderViTModel
from ..storage.atomic_file import atomic_file
from ..weights.layout_head import LAYOUT_HEAD_FILE, LayoutHead
from ..weights.model_folder import WEIGHTS_FILE
from .drawn_pages import CLASSES
from .sample_encoder import CANVAS_PX, SampleTrainer

MEASURES_FILE = "measures.json"
CARD = """\
---
library_name: image-encoder-vit
license: apache-2.0
pipeline_tag: image-feature-extraction
tags: [vit, ocr, image-encoder, demonstration]
---

# A sample encoder, to try things out

A small `ImageEncoderViTModel` ({parameters:.1f} million parameters, {channels} channels at stride 64 instead of 1024)
that the package brings, so that its commands have something to show without a checkpoint. It was trained on nothing
but {pages} pages that its training draws itself: to tell layout classes apart ({classes}),
and to find a page again.

It is **not** DeepSeek-OCR's encoder and no OCR encoder at all: it knows no letters and no language, and of real pages
it has seen none. Use it to look at pictures and to test programs.

`{head_file}` holds a direction for each class in the feature map after the neck: the class of a cell is
that of the nearest one by cosine. `{measures_file}` has what was measured, on drawn pages of another seed.

| layout class of a cell by its nearest neighbour, mean of classes | stride 16 | stride 64 |
|---|---|---|
{rows}

`python -m image_encoder_vit.commands.train_sample` makes it again; the repository's page on the sample encoder tells
how, and what it is worth on real pages.
"""
MEASURED_NAMES = {"sample": "this encoder", "random": "the same shape, random weights", "colors": "the cells' colours"}


def sample_processor() -> ImageEncoderViTImageProcessorPil:
    return ImageEncoderViTImageProcessorPil(size={"height": CANVAS_PX, "width": CANVAS_PX})


def write_sample(trainer: SampleTrainer, folder: Path, training: dict[str, Any], measures: dict[str, Any]) -> None:
    """
    Writes the folder.

    Raises:
        OSError: If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.model
    # Not by save_pretrained, which puts the code of registered classes beside the weights: the package has it.
    config = ImageEncoderViTConfig.from_dict(model.config.to_dict())
    config.architectures, config.dtype = [ImageEncoderViTModel.__name__], "bfloat16"
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(sample_processor().to_json_string(), encoding="utf-8")
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})
    prototypes = trainer.heads["neck"].get_parameter("prototypes").detach().float()
    LayoutHead(CLASSES, prototypes, "neck").save(folder)
    with atomic_file(folder / MEASURES_FILE) as partial:
        partial.write_text(json.dumps({"training": training, **measures}, indent=1) + "\n", encoding="utf-8")
    with atomic_file(folder / "README.md") as partial:
        partial.write_text(card(model, training, measures), encoding="utf-8")


def card(model: Any, training: dict[str, Any], measures: dict[str, Any]) -> str:
    rows = [
        f"| {shown} | {measures[name]['16']['mean']:.2f} | {measures[name]['64']['mean']:.2f} |"
        for name, shown in MEASURED_NAMES.items()
        if name in measures
    ]
    return CARD.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        channels=model.config.downsample_channels[-1],
        pages=training["pages"],
        classes=", ".join(CLASSES),
        head_file=LAYOUT_HEAD_FILE,
        measures_file=MEASURES_FILE,
        rows="\n".join(rows),
    )
