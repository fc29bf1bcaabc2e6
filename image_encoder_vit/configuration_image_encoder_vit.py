"""Configuration of the SAM-ViT image encoder. By default SAM-B with DeepSeek-OCR's two convolutions."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Keywords that transformers itself accepts or writes into config.json although they are no dataclass fields.
TRANSFORMERS_KEYWORDS = frozenset(
    {
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "torch_dtype",
        "torchscript",
        "use_cache",
    }
)


# The choice of a backbone's feature maps: no dataclass fields, for the two settle each other.
BACKBONE_KEYWORDS = ("out_features", "out_indices")


class KnownKeywordsConfig(PreTrainedConfig):
    """
    A configuration that refuses keywords which neither it nor transformers knows: transformers turns each of them into
    an attribute, so that a misspelt one would change nothing and say nothing.
    """

    # Keywords beyond the dataclass fields.
    _extra_keywords: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def _check_keywords(cls, keywords: Mapping[str, Any]) -> None:
        for keyword, value in keywords.items():
            if not cls._is_known(keyword):
                raise ValueError(cls._describe_unknown(keyword, value))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        Builds the configuration from the content of a config.json. Keys from newer libraries are left out with a
        warning instead of an error, so that a model saved by a later transformers still loads; near misses of our own
        names stay an error.

        Raises:
            ValueError: If it is the configuration of another model.
        """
        theirs = config_dict.get("model_type", cls.model_type)
        if theirs != cls.model_type:
            raise ValueError(
                f"This is a configuration of model_type {theirs!r}, not {cls.model_type!r}: AutoModel and AutoConfig "
                "load it with the class that it belongs to."
            )
        known = {}
        for key, value in config_dict.items():
            if cls._is_known(key) or cls._closest_keyword(key) is not None:
                known[key] = value
            else:
                logger.warning("Ignoring %r in the configuration: unknown to this version of %s.", key, cls.__name__)
        return super().from_dict(known, **kwargs)

    @classmethod
    def _known_keywords(cls) -> set[str]:
        return (
            {field.name for field in fields(cls)}
            | set(cls.attribute_map)
            | {*cls._extra_keywords}
            | TRANSFORMERS_KEYWORDS
        )

    @classmethod
    def _is_known(cls, keyword: str) -> bool:
        return keyword in cls._known_keywords()

    @classmethod
    def _closest_keyword(cls, keyword: str) -> str | None:
        # "out_features" resembles any name with "feature" in it, such as a newer library's.
        candidates = sorted(cls._known_keywords() - {*cls._extra_keywords})
        matches = difflib.get_close_matches(keyword, candidates, n=1, cutoff=0.75)
        return matches[0] if matches else None

    @classmethod
    def _describe_unknown(cls, keyword: str, value: Any) -> str:
        closest = cls._closest_keyword(keyword)
        hint = f"Did you mean {closest!r}?" if closest else f"Known: {', '.join(sorted(cls._own_keywords()))}."
        return f"{cls.__name__} has no keyword {keyword!r} (got {keyword}={value!r}). {hint}"

    @classmethod
    def _own_keywords(cls) -> set[str]:
        own = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)}
        return own | set(cls.attribute_map) | {*cls._extra_keywords}


@strict
class ImageEncoderViTConfig(BackboneConfigMixin, KnownKeywordsConfig):
    r"""
    Shape of an [`ImageEncoderViTModel`]. The names published with the encoder are accepted for the same fields:
    `embed_dim`, `depth`, `num_heads`, `in_chans`, `img_size`, `out_chans`.

    Args:
        hidden_size: Width of the transformer blocks (768 in ViT-B, 1024 in ViT-L, 1280 in ViT-H).
        num_hidden_layers: Number of blocks.
        num_attention_heads: Heads per block; must divide `hidden_size`.
        num_channels: Channels of the input image.
        image_size: Side in px of the square image that `pos_embed` and the global relative positions were trained
            for. Other sizes work: the position tables are resized in the forward pass.
        patch_size: Side of a patch in px. Image sides must be multiples of it.
        mlp_ratio: Width of the MLP as a multiple of `hidden_size`.
        output_channels: Channels after the neck.
        downsample_channels: Output channels of the stride-2 convolutions after the neck: `(512, 1024)` in
            DeepSeek-OCR, GOT-OCR2, Vary and Unlimited-OCR, `(512, 896)` in DeepSeek-OCR-2, `()` in plain SAM.
        window_size: Side in patches of the attention windows.
        global_attn_indexes: Blocks that attend over the whole grid instead of windows.
        qkv_bias: Whether the joint query, key and value projection has a bias.
        use_abs_pos: Whether the absolute position table `pos_embed` exists.
        use_rel_pos: Whether the decomposed relative position tables exist.
        initializer_range: Standard deviation of newly initialised weights.
        out_features: Feature maps that an [`ImageEncoderViTBackbone`] returns: some of `stage_names`, in their order;
            the last one by default. Models do not use it.
        out_indices: The same by index into `stage_names`.

    Raises:
        ValueError: For values that make no encoder, and for keywords that neither this class nor transformers knows.

    Example:
        >>> config = ImageEncoderViTConfig(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=[1])
        >>> config.hidden_size, config.downsample_channels
        (32, [512, 1024])
    """

    model_type = "image_encoder_vit"
    _extra_keywords = BACKBONE_KEYWORDS
    attribute_map = {
        "embed_dim": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "in_chans": "num_channels",
        "img_size": "image_size",
        "out_chans": "output_channels",
    }

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 1024
    patch_size: int = 16
    mlp_ratio: float | int = 4.0
    output_channels: int = 256
    downsample_channels: list[int] | tuple[int, ...] = (512, 1024)
    window_size: int = 14
    global_attn_indexes: list[int] | tuple[int, ...] = (2, 5, 8, 11)
    qkv_bias: bool = True
    use_abs_pos: bool = True
    use_rel_pos: bool = True
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_keywords(kwargs)
        self.set_output_features_output_indices(*(kwargs.pop(keyword, None) for keyword in BACKBONE_KEYWORDS))
        # JSON knows no tuples: lists keep a config equal to itself after a round trip.
        self.global_attn_indexes = list(self.global_attn_indexes)
        self.downsample_channels = list(self.downsample_channels)
        super().__post_init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        """Names of a backbone's feature maps: "stem", "stage1" to "stage12", "neck", "net_2", "net_3"."""
        return [
            "stem",
            *(f"stage{index + 1}" for index in range(self.num_hidden_layers)),
            "neck",
            *(f"net_{index + 2}" for index in range(len(self.downsample_channels))),
        ]

    @property
    def out_features(self) -> list[str]:
        """The feature maps chosen, by name: the last one, as long as none is."""
        return self.stage_names[-1:] if self._out_features is None else self._out_features

    @out_features.setter
    def out_features(self, out_features: list[str] | None) -> None:
        self.set_output_features_output_indices(out_features, None)

    @property
    def out_indices(self) -> list[int]:
        """The feature maps chosen, by index into `stage_names`: the last one, as long as none is."""
        return [len(self.stage_names) - 1] if self._out_indices is None else self._out_indices

    @out_indices.setter
    def out_indices(self, out_indices: list[int] | tuple[int, ...] | None) -> None:
        self.set_output_features_output_indices(None, out_indices)

    def set_output_features_output_indices(
        self, out_features: list[str] | None, out_indices: list[int] | tuple[int, ...] | None
    ) -> None:
        """
        Chooses the feature maps of a backbone by name, by index, or by both if they agree. Without either, the choice
        is left open instead of fixed to a name, so that it follows the number of stages and leaves no trace in
        config.json.

        Raises:
            ValueError: If they are no lists of stages in their order, or do not agree.
        """
        check_out_features(self.stage_names, out_features, out_indices)
        if out_features is None and out_indices is None:
            self._out_features, self._out_indices = None, None
        else:
            super().set_output_features_output_indices(
                None if out_features is None else list(out_features), None if out_indices is None else list(out_indices)
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-friendly values; the choice of feature maps only where one was made."""
        values = super().to_dict()
        chosen = self._out_features is not None
        return {name: value for name, value in values.items() if chosen or name not in BACKBONE_KEYWORDS}

    def validate_architecture(self) -> None:
        """Part of the `@strict` validation: the numbers must describe an encoder, or the error names the one."""
        sizes = {
            "hidden_size (embed_dim)": self.hidden_size,
            "num_hidden_layers (depth)": self.num_hidden_layers,
            "num_attention_heads (num_heads)": self.num_attention_heads,
            "num_channels (in_chans)": self.num_channels,
            "image_size (img_size)": self.image_size,
            "patch_size": self.patch_size,
            "output_channels (out_chans)": self.output_channels,
            "window_size": self.window_size,
            **{f"downsample_channels[{i}]": channels for i, channels in enumerate(self.downsample_channels)},
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size (embed_dim) must be a multiple of num_attention_heads (num_heads), "
                f"got {self.hidden_size} and {self.num_attention_heads}."
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size (img_size) must be a multiple of patch_size, got {self.image_size} px and "
                f"{self.patch_size} px."
            )
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(
                f"mlp_ratio must leave the MLP at least one channel, got {self.mlp_ratio} x {self.hidden_size}."
            )
        indexes = list(self.global_attn_indexes)
        outside = [index for index in indexes if not 0 <= index < self.num_hidden_layers]
        if outside:
            raise ValueError(
                f"global_attn_indexes must name blocks 0 to {self.num_hidden_layers - 1}, got {outside} in {indexes}."
            )
        if len(set(indexes)) != len(indexes):
            raise ValueError(f"global_attn_indexes names a block twice: {indexes}.")


def checked_config(**fields: Any) -> ImageEncoderViTConfig:
    """
    A configuration of these fields.

    Raises:
        ValueError: If they make no encoder; what huggingface_hub's strict dataclasses raise is none.
    """
    try:
        return ImageEncoderViTConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error).strip().splitlines()[-1].strip()) from None


def check_out_features(stage_names: list[str], out_features: Any, out_indices: Any) -> None:
    """
    Checks that the feature maps chosen by name or index exist; transformers checks their order and agreement.

    Raises:
        ValueError: Naming the values seen and the stages there are.
    """
    stages = ", ".join(f"{index} {name}" for index, name in enumerate(stage_names))
    for keyword, chosen, kind in (("out_features", out_features, str), ("out_indices", out_indices, int)):
        if chosen is None:
            continue
        if not isinstance(chosen, (list, tuple)) or not chosen or any(type(entry) is not kind for entry in chosen):
            raise ValueError(f"{keyword} must be a list of some of the stages {stages}; got {chosen!r}.")
    unknown: list[Any] = [name for name in out_features or () if name not in stage_names]
    unknown += [index for index in out_indices or () if not -len(stage_names) <= index < len(stage_names)]
    if unknown:
        raise ValueError(f"There are no stages {unknown}. A backbone of this configuration has {stages}.")


__all__ = ["ImageEncoderViTConfig"]
