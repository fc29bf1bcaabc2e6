"""
What fine-tuning needs beside the encoder: a small classification head, a folder of images as a data set, and the names
of the layers that LoRA adapts. They work in a plain loop, under Accelerate and in transformers' `Trainer`.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..image_processing_image_encoder_vit import ImageEncoderViTImageProcessorPil, open_image, to_rgb
from ..modeling_image_encoder_vit import ImageEncoderViTModel

# For `peft.LoraConfig(target_modules=...)`: every linear layer of the blocks, a DeepEncoder's in both towers, by a
# pattern of the whole name. The list ["qkv", "proj", "lin1", "lin2"] works too, but its "proj" is also the convolution
# `patch_embed.proj`.
LORA_TARGETS = (
    r"(.*\.)?(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(lin1|lin2))"
    r"|layers\.\d+\.(self_attn\.(qkv_proj|out_proj)|mlp\.(fc1|fc2)))"
)
HEAD_FILE, CLASSES_FILE = "head.safetensors", "classes.json"


class ImageEncoderViTClassifier(nn.Module):
    """
    The encoder with a head of one norm and one linear layer on `pooler_output`.

    `encoder` is an `ImageEncoderViTModel`, or PEFT's wrapper of one.
    """

    _no_split_modules = ImageEncoderViTModel._no_split_modules  # FSDP shards by these.

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        channels = [config.output_channels, *config.downsample_channels][-1]
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, num_classes))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """
        Pixels (B, 3, height in px, width in px) to `logits` (B, classes) and, with `labels` (B,), their mean
        cross-entropy as `loss`.
        """
        pooled = self.encoder(pixel_values=pixel_values).pooler_output  # (B, channels)
        logits = self.head(pooled.to(self.head[0].weight.dtype))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class ImageFolder(Dataset[dict[str, Any]]):
    """
    A folder with one subfolder of images for each class, decoded and prepared when asked for.

    Classes and files are in alphabetical order; hidden files are left out, any other file has to be an image.
    `processor` makes the pixels, all of one size.

    Raises:
        ValueError: If there are less than two classes, a class without images, or a file that is no image.
        NotADirectoryError: If there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str], processor: Any) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise NotADirectoryError(f"No folder of images at {str(root)!r}.")
        self.processor = processor
        subfolders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        self.classes = [path.name for path in subfolders]
        if len(self.classes) < 2:
            raise ValueError(
                f"{str(root)!r} has {len(self.classes)} class(es): {self.classes}. It needs at least two subfolders, "
                "one for each class, with images in them."
            )
        self.entries: list[tuple[Path, int]] = []
        for label, subfolder in enumerate(subfolders):
            files = sorted(path for path in subfolder.rglob("*") if path.is_file() and not path.name.startswith("."))
            if not files:
                raise ValueError(f"No image in {str(subfolder)!r}: every class needs at least one.")
            self.entries += [(path, label) for path in files]
        for path, _ in self.entries:
            _check_header(path)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        `pixel_values` (3, height in px, width in px) and `labels`, the number of the class.

        Raises:
            ValueError: If the image cannot be decoded, naming the file.
        """
        path, label = self.entries[index]
        pixels = self.processor(to_rgb(open_image(path)), do_pad=True, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": label}


def _check_header(path: Path) -> None:
    """Finds files that are no images before the training starts; damage further inside shows when they are decoded."""
    try:
        with Image.open(path):
            pass
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read {str(path)!r} as an image: {error}") from error


def save_classifier(
    classifier: ImageEncoderViTClassifier, classes: list[str], processor: Any, folder: str | os.PathLike[str]
) -> None:
    """
    Writes the encoder and the processor as `AutoModel` and `AutoImageProcessor` load them, and beside them the head
    and the names of its classes. Adapters of LoRA are merged into the encoder, which leaves PEFT's wrapper without.

    Raises:
        ValueError: If the head has another number of classes.
    """
    root = Path(folder)
    outputs = classifier.head[-1].out_features
    if len(classes) != outputs:
        raise ValueError(f"The head tells {outputs} classes apart, but {len(classes)} are named: {classes}.")
    encoder: Any = classifier.encoder
    if not isinstance(encoder, ImageEncoderViTModel):
        encoder = encoder.merge_and_unload()
    encoder.save_pretrained(root)
    processor.save_pretrained(root)
    save_file({name: weight.contiguous() for name, weight in classifier.head.state_dict().items()}, root / HEAD_FILE)
    (root / CLASSES_FILE).write_text(json.dumps(classes, indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: str | os.PathLike[str]) -> tuple[ImageEncoderViTClassifier, list[str], Any]:
    """
    The classifier, the names of its classes and its image processor, from a folder of `save_classifier`.

    Raises:
        FileNotFoundError: If the folder has no head.
    """
    root = Path(folder)
    classes = json.loads((root / CLASSES_FILE).read_text(encoding="utf-8"))
    classifier = ImageEncoderViTClassifier(ImageEncoderViTModel.from_pretrained(root), len(classes))
    classifier.head.load_state_dict(load_file(root / HEAD_FILE))
    return classifier.eval(), classes, ImageEncoderViTImageProcessorPil.from_pretrained(root)


def with_lora(encoder: ImageEncoderViTModel, rank: int) -> nn.Module:
    """
    The encoder wrapped by PEFT: it is frozen, and every linear layer of its blocks gets an adapter of this rank.

    Raises:
        ImportError: If PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'image-encoder-vit[finetune]'.") from error
    return get_peft_model(encoder, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS))


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """
    Which of `count` images make up the batch of a step: consecutive ones of an endless row of shuffles. It depends on
    nothing but the arguments, so that an interrupted training goes on with the same images.
    """
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        shuffle, start = divmod(position + len(indices), count)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + shuffle)
        order = torch.randperm(count, generator=generator).tolist()
        indices += order[start : start + batch_size - len(indices)]
    return indices
