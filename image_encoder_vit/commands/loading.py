"""The encoder and its exact image processor, from a folder, from the Hub, or with random weights to try things out."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoImageProcessor

from ..configuration_image_encoder_vit import ImageEncoderViTConfig
from ..image_processing_image_encoder_vit import ImageEncoderViTImageProcessorPil
from ..modeling_deep_encoder import DeepEncoderModel
from ..modeling_image_encoder_vit import ImageEncoderViTModel
from ..support import message_of
from ..weights.sources import check_exists
from .options import PROGRAM

# What the commands encode with, by the `model_type` of config.json: both have maps in `last_hidden_state`.
MODELS: dict[str, Any] = {model.config_class.model_type: model for model in (ImageEncoderViTModel, DeepEncoderModel)}
RANDOM_SEED = 0
NO_TOKENS = (
    "--tokens needs the whole DeepEncoder, whose projector makes them: "
    f"{PROGRAM} pull --part deep-encoder SOURCE FOLDER, then --checkpoint FOLDER."
)
RANDOM_WEIGHTS_NOTICE = (
    f"No --checkpoint given: using a full-size encoder with RANDOM weights (seed {RANDOM_SEED}).\n"
    "Its features mean nothing until real weights are used; see the README."
)


def load_model(checkpoint: str | None, dtype: torch.dtype | None = None, revision: str | None = None) -> Any:
    """
    The encoder of a model folder, or of a Hub id at a `revision`, in eval mode, in the checkpoint's dtype unless one is
    given; without a checkpoint, a full-size one with random weights that are always the same.

    Raises:
        OSError, ValueError: If the checkpoint cannot be loaded as an encoder.
    """
    check_revision(checkpoint, revision)
    if checkpoint is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            model = ImageEncoderViTModel(ImageEncoderViTConfig())
        return model.to(dtype or torch.float32).eval()
    check_exists(checkpoint, revision)
    kind = ImageEncoderViTConfig.get_config_dict(checkpoint, revision=revision or "main")[0].get("model_type")
    if kind not in MODELS:
        raise ValueError(
            f"{checkpoint!r} holds a model of type {kind!r}, not {ImageEncoderViTConfig.model_type!r}. If it has the "
            f"encoder inside, take it out first: {PROGRAM} pull {checkpoint} FOLDER"
        )
    return MODELS[kind].from_pretrained(checkpoint, revision=revision or "main", dtype=dtype or "auto").eval()


def load_processor(checkpoint: str | None, revision: str | None = None, **settings: Any) -> Any:
    """
    The image processor of a model folder, or of a Hub id at a `revision`, the one that is exact to the bit; without a
    checkpoint DeepSeek-OCR's. `settings` go before its own.

    Raises:
        OSError, ValueError: If there is none.
    """
    check_revision(checkpoint, revision)
    if checkpoint is None:
        return ImageEncoderViTImageProcessorPil(**settings)
    check_exists(checkpoint, revision)
    return AutoImageProcessor.from_pretrained(checkpoint, revision=revision or "main", backend="pil", **settings)


def check_revision(checkpoint: str | None, revision: str | None) -> None:
    """
    Raises:
        ValueError: If a revision is asked for of what has none.
    """
    if revision is not None and (checkpoint is None or Path(checkpoint).exists()):
        where = "no --checkpoint is given" if checkpoint is None else f"{checkpoint!r} is on this disk"
        raise ValueError(f"--revision {revision}: revisions are of Hub repositories, and {where}.")


def choose_device(name: str) -> torch.device:
    """
    The device of that name; for "auto" the one that Accelerate chooses, an accelerator before the CPU.

    Raises:
        ValueError: If this machine, or this PyTorch, has no such device.
    """
    if name == "auto":
        return PartialState().device
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"Cannot use --device {name}: {message_of(error)}") from error
