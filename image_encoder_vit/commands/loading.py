"""The encoder and its exact image processor, from a folder, from the Hub, or with random weights to try things out."""

from typing import Any

import torch
from transformers import AutoImageProcessor

from ..configuration_image_encoder_vit import ImageEncoderViTConfig
from ..image_processing_image_encoder_vit import ImageEncoderViTImageProcessorPil
from ..modeling_image_encoder_vit import ImageEncoderViTModel

RANDOM_SEED = 0
RANDOM_WEIGHTS_NOTICE = (
    f"No --checkpoint given: using a full-size encoder with RANDOM weights (seed {RANDOM_SEED}).\n"
    "Its features mean nothing until real weights are used; see the README."
)


def load_model(checkpoint: str | None, dtype: torch.dtype | None = None) -> Any:
    """
    The encoder of a model folder or Hub id in eval mode, in the checkpoint's dtype unless one is given; without a
    checkpoint, a full-size one with random weights that are always the same.

    Raises:
        OSError, ValueError: If the checkpoint cannot be loaded as an encoder.
    """
    if checkpoint is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            model = ImageEncoderViTModel(ImageEncoderViTConfig())
        return model.to(dtype or torch.float32).eval()
    kind = ImageEncoderViTConfig.get_config_dict(checkpoint)[0].get("model_type")
    if kind != ImageEncoderViTConfig.model_type:
        raise ValueError(
            f"{checkpoint!r} holds a model of type {kind!r}, not {ImageEncoderViTConfig.model_type!r}. If it has the "
            f"encoder inside, take it out first: scripts/pull_from_hub.py {checkpoint} FOLDER"
        )
    return ImageEncoderViTModel.from_pretrained(checkpoint, dtype=dtype or "auto").eval()


def load_processor(checkpoint: str | None, **settings: Any) -> Any:
    """
    The image processor of a model folder or Hub id, the one that is exact to the bit; without a checkpoint
    DeepSeek-OCR's. `settings` go before its own.

    Raises:
        OSError, ValueError: If there is none.
    """
    if checkpoint is None:
        return ImageEncoderViTImageProcessorPil(**settings)
    return AutoImageProcessor.from_pretrained(checkpoint, backend="pil", **settings)
