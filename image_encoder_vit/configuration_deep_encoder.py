"""Configuration of DeepSeek-OCR's whole DeepEncoder: SAM's encoder, CLIP-L on its features, and the projector."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_image_encoder_vit import ImageEncoderViTConfig, KnownKeywordsConfig


@strict
class DeepEncoderConfig(KnownKeywordsConfig):
    r"""
    Shape of a [`DeepEncoderModel`]; by default DeepSeek-OCR's.

    The width of the CLIP tower is no field: its patches are the cells of SAM's last feature map, so it is the last of
    `sam_config.downsample_channels`.

    Args:
        sam_config: The SAM encoder, an [`ImageEncoderViTConfig`] or its values; its defaults if not given.
        clip_num_hidden_layers: Number of blocks of the CLIP tower.
        clip_num_attention_heads: Heads per block of the CLIP tower; must divide its width.
        clip_intermediate_size: Width of the MLPs of the CLIP tower.
        clip_grid_size: Side in cells of the square grid that CLIP's position table was trained for. Other grids work:
            the table is resized in the forward pass.
        projection_size: Channels of the vision tokens: the width of the decoder they are for. `hidden_size` is another
            name for it.
        initializer_range: Standard deviation of newly initialised weights.

    Raises:
        ValueError: For values that make no encoder, and for keywords that neither this class nor transformers knows.
    """

    model_type = "deep_encoder"
    attribute_map = {"hidden_size": "projection_size"}

    # None of transformers' `sub_configs`: those have a transformers model each, and settings of their own.
    sam_config: Any = None
    clip_num_hidden_layers: int = 24
    clip_num_attention_heads: int = 16
    clip_intermediate_size: int = 4096
    clip_grid_size: int = 16
    projection_size: int = 1280
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_keywords(kwargs)
        if self.sam_config is None:
            self.sam_config = ImageEncoderViTConfig()
        elif isinstance(self.sam_config, Mapping):
            self.sam_config = ImageEncoderViTConfig.from_dict(dict(self.sam_config))
        super().__post_init__(**kwargs)

    @property
    def clip_hidden_size(self) -> int:
        """Width of the CLIP tower: the channels of SAM's last feature map."""
        return self.sam_config.downsample_channels[-1]

    # What images have to be like, by the names of the encoder's own configuration.

    @property
    def image_size(self) -> int:
        """Side in px of the square image that SAM's position tables were trained for."""
        return self.sam_config.image_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in px. Image sides must be multiples of it."""
        return self.sam_config.patch_size

    @property
    def num_channels(self) -> int:
        """Channels of the input image."""
        return self.sam_config.num_channels

    @property
    def window_size(self) -> int:
        """Side in patches of SAM's attention windows."""
        return self.sam_config.window_size

    @property
    def downsample_channels(self) -> list[int]:
        """Output channels of the stride-2 convolutions after SAM's neck."""
        return self.sam_config.downsample_channels

    def validate_architecture(self) -> None:
        """Part of the `@strict` validation: the values must describe an encoder that can be built."""
        if not isinstance(self.sam_config, ImageEncoderViTConfig):
            raise ValueError(f"sam_config must be an ImageEncoderViTConfig or its values, got {self.sam_config!r}.")
        if not self.sam_config.downsample_channels:
            raise ValueError(
                "sam_config.downsample_channels is empty: the CLIP tower reads the last map after the neck, so a "
                "DeepEncoder needs those convolutions; DeepSeek-OCR has (512, 1024)."
            )
        sizes = {
            "clip_num_hidden_layers": self.clip_num_hidden_layers,
            "clip_num_attention_heads": self.clip_num_attention_heads,
            "clip_intermediate_size": self.clip_intermediate_size,
            "clip_grid_size": self.clip_grid_size,
            "projection_size": self.projection_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if self.clip_hidden_size % self.clip_num_attention_heads:
            raise ValueError(
                f"The width of the CLIP tower, the last of sam_config.downsample_channels, must be a multiple of "
                f"clip_num_attention_heads, got {self.clip_hidden_size} and {self.clip_num_attention_heads}."
            )


__all__ = ["DeepEncoderConfig"]
