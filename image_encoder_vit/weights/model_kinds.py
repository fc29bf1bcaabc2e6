"""What a model folder may hold: classes of this package, told by `model_type` and `architectures` of config.json."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_image_encoder_vit import ImageEncoderViTConfig
from ..modeling_deep_encoder import DeepEncoderModel
from ..modeling_image_encoder_vit import ImageEncoderViTForImageClassification, ImageEncoderViTModel


class ModelKind(NamedTuple):
    """
    A class of models. In its saved weights the names of the encoder's begin with `weight_prefix`. `outputs` maps the
    classes of transformers that load its folders to the field of their output that counts. `pipeline_tag` is the Hub's
    word for its task, `summary` writes the beginning of its card.
    """

    model: type[PreTrainedModel]
    weight_prefix: str
    outputs: Mapping[str, str]
    pipeline_tag: str
    summary: Callable[[Any], str]


def describe_encoder(config: ImageEncoderViTConfig) -> str:
    """Markdown that says what goes in and what comes out of an encoder."""
    stride_px = config.patch_size * 2 ** len(config.downsample_channels)
    channels = [config.output_channels, *config.downsample_channels][-1]
    cells = -(-config.image_size // stride_px)
    return (
        "# SAM ViT image encoder\n\n"
        f"A page of {config.image_size} x {config.image_size} px becomes a feature map of {channels} channels on a "
        f"grid of {cells} x {cells}, {cells * cells} tokens; other sizes work, a cell stands for {stride_px} x "
        f"{stride_px} px. {config.num_hidden_layers} blocks of width {config.hidden_size}, global attention in blocks "
        f"{', '.join(map(str, config.global_attn_indexes)) or 'none'}."
    )


def describe_deep_encoder(config: Any) -> str:
    """Markdown that says what goes in and what comes out of a DeepEncoder."""
    sam = config.sam_config
    stride_px = sam.patch_size * 2 ** len(sam.downsample_channels)
    cells = -(-sam.image_size // stride_px)
    return (
        "# DeepEncoder\n\n"
        f"A page of {sam.image_size} x {sam.image_size} px becomes {cells * (cells + 1) + 1} vision tokens of "
        f"{config.projection_size} channels, as the decoder reads them: {cells} rows of {cells} cells with a newline "
        f"after each, and a separator; and the cells as a map. Other sizes and tiles work, a cell stands for "
        f"{stride_px} x {stride_px} px. SAM's encoder ({sam.num_hidden_layers} blocks of width {sam.hidden_size}), "
        f"CLIP's tower on its features ({config.clip_num_hidden_layers} blocks of width {config.clip_hidden_size}), "
        "and a linear projector."
    )


ENCODER = ModelKind(
    model=ImageEncoderViTModel,
    weight_prefix=f"{ImageEncoderViTModel.base_model_prefix}.",
    outputs={"AutoModel": "last_hidden_state"},
    pipeline_tag="image-feature-extraction",
    summary=describe_encoder,
)
CLASSIFIER = ENCODER._replace(
    model=ImageEncoderViTForImageClassification,
    outputs={**ENCODER.outputs, "AutoModelForImageClassification": "logits"},
    pipeline_tag="image-classification",
)
DEEP_ENCODER = ModelKind(
    model=DeepEncoderModel,
    weight_prefix="",
    outputs={"AutoModel": "last_hidden_state"},
    pipeline_tag="image-feature-extraction",
    summary=describe_deep_encoder,
)
# The plain model of a type before those with heads: a config.json that names no class means it.
MODEL_KINDS = (ENCODER, CLASSIFIER, DEEP_ENCODER)


def kind_of(config: PreTrainedConfig) -> ModelKind:
    """
    What a model with this configuration is.

    Raises:
        ValueError: If it is none of this package's.
    """
    kinds = [kind for kind in MODEL_KINDS if kind.model.config_class.model_type == config.model_type]
    if not kinds:
        raise ValueError(_unknown_type(config.model_type))
    named = [kind for kind in kinds if kind.model.__name__ in (config.architectures or ())]
    return (named or kinds)[0]


def read_config(folder: Path) -> PreTrainedConfig:
    """
    The configuration of a folder that `save_pretrained` wrote.

    Raises:
        ValueError: If it describes no model of this package.
        OSError: If there is no config.json that can be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    classes = {kind.model.config_class.model_type: kind.model.config_class for kind in MODEL_KINDS}
    if model_type not in classes:
        raise ValueError(f"{str(folder)!r}: {_unknown_type(model_type)}")
    try:
        return classes[model_type].from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {str(error.__cause__ or error).strip().splitlines()[-1].strip()}") from None


def _unknown_type(model_type: object) -> str:
    known = sorted({kind.model.config_class.model_type for kind in MODEL_KINDS})
    return f"config.json is that of a model of type {model_type!r}, not {' or '.join(map(repr, known))}."
