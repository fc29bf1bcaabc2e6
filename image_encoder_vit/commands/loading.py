"""The encoder and its exact image processor: from a folder, from the Hub, the package's sample, or random weights."""

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
from ..weights.layout_head import LayoutHead, load_layout_head
from ..weights.sources import check_exists
from .options import PROGRAM

# What the commands encode with, by the `model_type` of config.json: both have maps in `last_hidden_state`.
MODELS: dict[str, Any] = {model.config_class.model_type: model for model in (ImageEncoderViTModel, DeepEncoderModel)}
NO_TOKENS = (
    "--tokens needs the whole DeepEncoder, whose projector makes them: "
    f"{PROGRAM} pull --part deep-encoder SOURCE FOLDER, then --checkpoint FOLDER."
)
# What --checkpoint takes besides folders and Hub ids.
SAMPLE, RANDOM = "sample", "random"
SAMPLE_FOLDER = Path(__file__).parent.parent / "sample"
RANDOM_SEED = 0
NOTICES = {
    SAMPLE: "Using the package's small sample encoder, not DeepSeek-OCR's; --checkpoint chooses another.",
    RANDOM: (
        f"Using a full-size encoder with RANDOM weights (seed {RANDOM_SEED}).\n"
        "Its features mean nothing until real weights are used; see the README."
    ),
}
SHOWN_NAMES = {
    SAMPLE: "the package's sample encoder (not DeepSeek-OCR's)",
    RANDOM: f"a full-size encoder with random weights, seed {RANDOM_SEED}",
}


def load_model(checkpoint: str, dtype: torch.dtype | None = None, revision: str | None = None) -> Any:
    """
    The encoder of a model folder, or of a Hub id at a `revision`, in eval mode, in the checkpoint's dtype unless one is
    given; or the sample, or a full-size one with random weights that are always the same, in float32 unless another is
    given.

    Raises:
        OSError, ValueError: If the checkpoint cannot be loaded as an encoder.
    """
    check_revision(checkpoint, revision)
    if checkpoint == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            model = ImageEncoderViTModel(ImageEncoderViTConfig())
        return model.to(dtype or torch.float32).eval()
    if checkpoint == SAMPLE:
        # bfloat16 halves its file; CPUs without its instructions compute faster in float32.
        return ImageEncoderViTModel.from_pretrained(SAMPLE_FOLDER, dtype=dtype or torch.float32).eval()
    check_exists(checkpoint, revision)
    kind = ImageEncoderViTConfig.get_config_dict(checkpoint, revision=revision or "main")[0].get("model_type")
    if kind not in MODELS:
        raise ValueError(
            f"{checkpoint!r} holds a model of type {kind!r}, not {ImageEncoderViTConfig.model_type!r}. If it has the "
            f"encoder inside, take it out first: {PROGRAM} pull {checkpoint} FOLDER"
        )
    return MODELS[kind].from_pretrained(checkpoint, revision=revision or "main", dtype=dtype or "auto").eval()


def load_processor(checkpoint: str, revision: str | None = None, **settings: Any) -> Any:
    """
    The image processor of a model folder, or of a Hub id at a `revision`, the one that is exact to the bit; for random
    weights DeepSeek-OCR's. `settings` go before its own.

    Raises:
        OSError, ValueError: If there is none.
    """
    check_revision(checkpoint, revision)
    if checkpoint == RANDOM:
        return ImageEncoderViTImageProcessorPil(**settings)
    if checkpoint == SAMPLE:
        return ImageEncoderViTImageProcessorPil.from_pretrained(SAMPLE_FOLDER, **settings)
    check_exists(checkpoint, revision)
    return AutoImageProcessor.from_pretrained(checkpoint, revision=revision or "main", backend="pil", **settings)


def check_tokens(model: Any, are_wanted: bool) -> None:
    """
    Raises:
        ValueError: If tokens are wanted of a model that makes none.
    """
    if are_wanted and not isinstance(model, DeepEncoderModel):
        raise ValueError(NO_TOKENS)


def encoder_config(model: Any) -> ImageEncoderViTConfig:
    """The configuration of SAM's encoder in a model, which a whole DeepEncoder has inside."""
    config: ImageEncoderViTConfig = getattr(model.config, "sam_config", model.config)
    return config


def load_head(checkpoint: str) -> LayoutHead | None:
    """The layout head that the sample or a model folder brings; None where there is none."""
    if checkpoint == RANDOM:
        return None
    return load_layout_head(SAMPLE_FOLDER if checkpoint == SAMPLE else Path(checkpoint))


def print_notice(checkpoint: str) -> None:
    """Tells a user who chose no weights of their own what they are working with."""
    if checkpoint in NOTICES:
        print(NOTICES[checkpoint])


def warning_of(checkpoint: str) -> str:
    """What a picture says in large letters."""
    return "RANDOM WEIGHTS: these pictures mean nothing" if checkpoint == RANDOM else ""


def shown_name(checkpoint: str) -> str:
    """The checkpoint as pictures and the metadata of files name it."""
    return SHOWN_NAMES.get(checkpoint, checkpoint)


def check_revision(checkpoint: str, revision: str | None) -> None:
    """
    Raises:
        ValueError: If a revision is asked for of what has none.
    """
    if revision is None:
        return
    if checkpoint in NOTICES:
        raise ValueError(f"--revision {revision}: revisions are of Hub repositories, and {checkpoint!r} is none.")
    if Path(checkpoint).exists():
        raise ValueError(
            f"--revision {revision}: revisions are of Hub repositories, and {checkpoint!r} is on this disk."
        )


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
