"""
DeepSeek-OCR's whole DeepEncoder (arXiv 2510.18234), from pixels to the vision tokens that its decoder reads: SAM's
encoder, CLIP-L on the cells of its last feature map, a linear projector, and the layout of the tokens. In plain PyTorch
as `DeepEncoder`, and wrapped for transformers as `DeepEncoderModel`.

Letters in shapes: B images, N tiles of all of them, h and w the grid of a view in cells of 64 px, C the width of the
CLIP tower (1024), D that of the decoder (1280).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import eager_attention, resize_pos_embed
from .configuration_deep_encoder import DeepEncoderConfig
from .cpu_inference import linear
from .feature_maps import stitch_tiles
from .modeling_image_encoder_vit import (
    ImageEncoderViT,
    ImageEncoderViTAttention,
    ImageEncoderViTBlock,
    StrictPreTrainedModel,
    check_tiles,
    encoder_of,
    init_encoder_positions,
    mean_over_cells,
)

CLIP_LAYER_NORM_EPS = 1e-5
# What checkpoints hold of CLIP although nothing reads it: SAM's cells take the place of its patches.
STRANGERS = r"(^|\.)vision_model\.embeddings\.(patch_embedding\.weight|position_ids)$"


def quick_gelu(values: Tensor) -> Tensor:
    """CLIP's own approximation of GELU."""
    return values * torch.sigmoid(1.702 * values)


def with_newlines(cells: Tensor, newline: Tensor) -> Tensor:
    """The cells of a view (D, h, w) as tokens row by row, each row followed by `newline` (D,): (h * (w + 1), D)."""
    rows = cells.permute(1, 2, 0)  # (h, w, D)
    return torch.cat((rows, newline.expand(rows.shape[0], 1, -1)), dim=1).flatten(0, 1)


class DeepEncoderClipEmbeddings(nn.Module):
    """SAM's last map (B, C, h, w) as CLIP's patches: the class token, then the cells, with positions (B, Q, C)."""

    def __init__(self, width: int, grid_size: int) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Embedding(1 + grid_size**2, width)

    def forward(self, features: Tensor) -> Tensor:
        batch, _, height, width = features.shape
        tokens = features.flatten(2).transpose(1, 2)
        # Called rather than read, so that Accelerate's hooks bring the weights of an offloaded module.
        table = self.position_embedding(torch.arange(1 + self.grid_size**2, device=features.device))
        grid = table[1:].unflatten(0, (self.grid_size, self.grid_size))[None]
        positions = torch.cat((table[None, :1], resize_pos_embed(grid, (height, width)).flatten(1, 2)), dim=1)
        return torch.cat((self.class_embedding.expand(batch, 1, -1), tokens), dim=1) + positions


class DeepEncoderClipAttention(nn.Module):
    """Multi-head attention over all tokens (B, Q, C), without a mask."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor, attn_implementation: str = "sdpa") -> tuple[Tensor, Tensor | None]:
        by_head = linear(self.qkv_proj, hidden).unflatten(2, (3, self.num_heads, -1))
        query, key, value = by_head.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, Q, C / heads) each
        weights = None
        if attn_implementation == "eager":
            attended, weights = eager_attention(query, key, value, None)
        else:  # FlexAttention is for SAM's relative positions; there are none here.
            attended = F.scaled_dot_product_attention(query, key, value)
        return linear(self.out_proj, attended.transpose(1, 2).flatten(2)), weights


class DeepEncoderClipMLP(nn.Module):
    """Two linear layers with `quick_gelu` between them."""

    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(self.fc2, quick_gelu(linear(self.fc1, hidden)))


class DeepEncoderClipBlock(GradientCheckpointingLayer):
    """Transformer block on (B, Q, C): attention, then the MLP."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=CLIP_LAYER_NORM_EPS)
        self.self_attn = DeepEncoderClipAttention(width, num_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=CLIP_LAYER_NORM_EPS)
        self.mlp = DeepEncoderClipMLP(width, mlp_dim)

    def forward(self, hidden: Tensor, attn_implementation: str = "sdpa") -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), attn_implementation)[0]
        return hidden + self.mlp(self.layer_norm2(hidden))


class DeepEncoderClipTransformer(nn.Module):
    """The blocks of the CLIP tower."""

    def __init__(self, depth: int, width: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeepEncoderClipBlock(width, num_heads, mlp_dim) for _ in range(depth))

    def forward(self, hidden: Tensor, attn_implementation: str = "sdpa") -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, attn_implementation=attn_implementation)
        return hidden


class DeepEncoderClip(nn.Module):
    """
    CLIP's vision tower as the DeepEncoder uses it: from SAM's last map (B, C, h, w) to tokens (B, 1 + h * w, C).

    It has neither patches of its own nor a norm or projection at the end; its first norm is spelt as published.
    """

    def __init__(self, depth: int, width: int, num_heads: int, mlp_dim: int, grid_size: int) -> None:
        super().__init__()
        self.embeddings = DeepEncoderClipEmbeddings(width, grid_size)
        self.pre_layrnorm = nn.LayerNorm(width, eps=CLIP_LAYER_NORM_EPS)
        self.transformer = DeepEncoderClipTransformer(depth, width, num_heads, mlp_dim)

    def forward(self, features: Tensor, attn_implementation: str = "sdpa") -> Tensor:
        return self.transformer(self.pre_layrnorm(self.embeddings(features)), attn_implementation)


class DeepEncoderProjector(nn.Module):
    """One linear layer from both towers' channels to the decoder's."""

    def __init__(self, channels: int, projection_size: int) -> None:
        super().__init__()
        self.layers = nn.Linear(channels, projection_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(self.layers, hidden)


class DeepEncoderTowers(nn.Module):
    """
    What the plain module and the transformers model share: both towers, the projector and the two learned tokens, under
    the names of DeepSeek-OCR's checkpoint, and the steps from pixels to vision tokens.
    """

    def _add_towers(
        self,
        sam_model: ImageEncoderViT,
        *,
        clip_depth: int,
        clip_heads: int,
        clip_mlp_dim: int,
        clip_grid_size: int,
        projection_size: int,
    ) -> None:
        width = getattr(sam_model, sam_model.downsample_names[-1]).out_channels
        self.sam_model = sam_model
        self.vision_model = DeepEncoderClip(clip_depth, width, clip_heads, clip_mlp_dim, clip_grid_size)
        self.projector = DeepEncoderProjector(2 * width, projection_size)
        self.image_newline = nn.Parameter(torch.zeros(projection_size))
        self.view_seperator = nn.Parameter(torch.zeros(projection_size))  # Spelt as published.

    @property
    def encoder(self) -> ImageEncoderViT:
        """SAM's encoder by the name that the plain model has for it: its `stride`, 64 px, is that of the cells here."""
        return self.sam_model

    def encode_views(self, pixel_values: Tensor, attn_implementation: str = "sdpa") -> tuple[Tensor, Tensor]:
        """
        From pixels (B, 3, height in px, width in px) to the projected cells (B, D, h, w) and SAM's last map
        (B, C, h, w); h = ceil(height / 64), w likewise.
        """
        sam_map = self.sam_model(pixel_values, attn_implementation)
        clip_tokens = self.vision_model(sam_map, attn_implementation)
        both = torch.cat((clip_tokens[:, 1:], sam_map.flatten(2).transpose(1, 2)), dim=-1)  # (B, h * w, 2 * C)
        cells = self.projector(both).transpose(1, 2).contiguous().unflatten(2, sam_map.shape[2:])
        return cells, sam_map

    def encode_tiles(
        self,
        tiles: Tensor | None,
        tile_grids: Tensor,
        tile_batch_size: int | None = None,
        attn_implementation: str = "sdpa",
    ) -> tuple[Tensor | None, ...]:
        """
        From tiles (N, 3, side in px, side in px) to the projected cells of each image's tiles, stitched: (D, rows,
        columns), None for an image without tiles.
        """
        if tiles is None or not len(tiles):
            return (None,) * len(tile_grids)
        cells = [self.encode_views(some, attn_implementation)[0] for some in tiles.split(tile_batch_size or len(tiles))]
        return stitch_tiles(torch.cat(cells), tile_grids)

    def lay_out_tokens(self, cells: Tensor, local_cells: Tensor | None) -> Tensor:
        """
        The vision tokens of one image (n, D) in the decoder's order: the rows of the stitched tiles, the rows of the
        whole view, each row followed by the newline, and the separator.
        """
        # Accelerate may place a module's own parameters apart from its children.
        newline = self.image_newline.to(cells.device)
        separator = self.view_seperator.to(cells.device)
        views = [cells] if local_cells is None else [local_cells, cells]
        return torch.cat([*(with_newlines(view, newline) for view in views), separator[None]])


class DeepEncoder(DeepEncoderTowers):
    """
    The DeepEncoder in plain PyTorch, with the published parameter names. `DeepEncoder()` is DeepSeek-OCR's: 400,770,048
    parameters in 475 tensors. `sam_model` is by default `ImageEncoderViT()`; `DeepEncoderConfig` documents the rest.
    """

    def __init__(
        self,
        sam_model: ImageEncoderViT | None = None,
        *,
        clip_depth: int = 24,
        clip_heads: int = 16,
        clip_mlp_dim: int = 4096,
        clip_grid_size: int = 16,
        projection_size: int = 1280,
    ) -> None:
        super().__init__()
        self._add_towers(
            ImageEncoderViT() if sam_model is None else sam_model,
            clip_depth=clip_depth,
            clip_heads=clip_heads,
            clip_mlp_dim=clip_mlp_dim,
            clip_grid_size=clip_grid_size,
            projection_size=projection_size,
        )

    def forward(
        self,
        pixel_values: Tensor,
        pixel_values_local: Tensor | None = None,
        tile_grids: Tensor | None = None,
        attn_implementation: str = "sdpa",
    ) -> tuple[Tensor, ...]:
        """
        The vision tokens of each image, (n, 1280). Arguments as in `DeepEncoderModel.forward`.

        Raises:
            ValueError: If the pixels or tiles are no such batch.
        """
        check_views(pixel_values, pixel_values_local, tile_grids, None)
        local_maps: tuple[Tensor | None, ...] = (None,) * len(pixel_values)
        if tile_grids is not None:
            local_maps = self.encode_tiles(pixel_values_local, tile_grids, None, attn_implementation)
        cells, _ = self.encode_views(pixel_values, attn_implementation)
        return tuple(map(self.lay_out_tokens, cells, local_maps))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a state dict with or without DeepSeek's `model.`, without the weights that nothing reads."""
        return super().load_state_dict(published_names(state_dict), strict=strict, assign=assign)


def published_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights by name without DeepSeek-OCR's `model.`, and without those that nothing reads."""
    return {name.removeprefix("model."): value for name, value in state_dict.items() if not re.search(STRANGERS, name)}


def check_views(
    pixel_values: Tensor, tiles: Tensor | None, tile_grids: Tensor | None, tile_batch_size: int | None
) -> None:
    """
    Checks that a batch of images and its tiles, if any, belong together.

    Raises:
        ValueError: Naming what does not fit.
    """
    if tile_grids is not None:
        check_tiles(len(pixel_values), tiles, tile_grids, tile_batch_size)
    elif tiles is not None:
        raise ValueError("pixel_values_local needs tile_grids, the rows and columns of each image's tiles.")


@dataclass
class DeepEncoderModelOutput(ModelOutput):
    """
    Output of [`DeepEncoderModel`].

    Args:
        last_hidden_state: The projected cells of the whole view as a map (B, 1280, h, w): h = ceil(height in px / 64).
        pooler_output: Mean of that map over its cells (B, 1280).
        patch_embeds: SAM's last map as tokens (B, h * w, 1024), row by row: what the CLIP tower reads.
        hidden_states: On request, SAM's patch embedding with positions and the output of each of its blocks.
        attentions: On request, the attention weights of SAM's blocks.
        local_feature_maps: With tiles, the projected cells of each image's tiles stitched to one map, (1280, rows,
            columns) in cells; None for an image without tiles.
        vision_tokens: What the decoder reads, one (n, 1280) an image: the rows of the stitched tiles, the rows of the
            whole view, each row followed by the newline token, and the separator token.
        sam_feature_map: SAM's last map (B, 1024, h, w), the output of an [`ImageEncoderViTModel`] of the same weights.
        clip_hidden_states: With `hidden_states`, the CLIP tower's tokens after its first norm and after each block,
            (B, 1 + h * w, 1024) each, the class token first.
        clip_attentions: With `attentions`, the attention weights of the CLIP tower's blocks.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    patch_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    local_feature_maps: tuple[Tensor | None, ...] | None = None
    vision_tokens: tuple[Tensor, ...] | None = None
    sam_feature_map: Tensor | None = None
    clip_hidden_states: tuple[Tensor, ...] | None = None
    clip_attentions: tuple[Tensor, ...] | None = None


class DeepEncoderModel(StrictPreTrainedModel, DeepEncoderTowers):
    """
    The DeepEncoder as a transformers model.

    The weights carry DeepSeek-OCR's names without `model.`; a checkpoint or state dict with it loads too.
    """

    config: DeepEncoderConfig
    config_class = DeepEncoderConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    # SAM's bias depends on the query, which no flash attention kernel takes.
    _supports_flash_attn = False
    _no_split_modules = ["ImageEncoderViTBlock", "DeepEncoderClipEmbeddings", "DeepEncoderClipBlock"]
    _keys_to_ignore_on_load_unexpected = [STRANGERS]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(ImageEncoderViTBlock, index=0),
        "attentions": OutputRecorder(ImageEncoderViTAttention, index=1),
        "clip_hidden_states": [
            OutputRecorder(nn.LayerNorm, layer_name="pre_layrnorm"),
            OutputRecorder(DeepEncoderClipBlock, index=0),
        ],
        "clip_attentions": OutputRecorder(DeepEncoderClipAttention, index=1),
    }
    _auto_classes = {"AutoModel": "modeling_deep_encoder.DeepEncoderModel"}

    def __init__(self, config: DeepEncoderConfig) -> None:
        super().__init__(config)
        self._add_towers(
            encoder_of(config.sam_config),
            clip_depth=config.clip_num_hidden_layers,
            clip_heads=config.clip_num_attention_heads,
            clip_mlp_dim=config.clip_intermediate_size,
            clip_grid_size=config.clip_grid_size,
            projection_size=config.projection_size,
        )
        self.post_init()  # type: ignore[operator]

    def get_input_embeddings(self) -> nn.Module:
        return self.sam_model.patch_embed

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        init_encoder_positions(module, std)
        if isinstance(module, DeepEncoderClipEmbeddings):
            init.normal_(module.class_embedding, std=std)
        elif isinstance(module, DeepEncoderModel):
            token_std = self.config.projection_size**-0.5
            init.normal_(module.image_newline, std=token_std)
            init.normal_(module.view_seperator, std=token_std)

    @classmethod
    def _explain_unexpected(cls, names: list[str]) -> str | None:
        if "model.embed_tokens.weight" not in names:
            return None
        return "It holds a decoder too: `image-encoder-vit pull --part deep-encoder` takes this part out of it."

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a state dict with or without DeepSeek's `model.`, without the weights that nothing reads."""
        return super().load_state_dict(published_names(state_dict), strict=strict, assign=assign)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        pixel_values_local: Tensor | None = None,
        tile_grids: Tensor | None = None,
        tile_batch_size: int | None = None,
        **kwargs: Any,
    ) -> DeepEncoderModelOutput:
        """
        Encodes a batch of images, and their tiles where they have any.

        Args:
            pixel_values: (B, 3, height in px, width in px), both sides multiples of the patch size; cast to the dtype
                of the weights.
            pixel_mask: (B, height in px, width in px), 1 for the image and 0 for padding. Only `pooler_output` uses
                it, averaging the cells that hold a part of the image; the decoder reads padding too.
            pixel_values_local: The tiles of all images, (N, 3, side in px, side in px), image by image and row by row.
            tile_grids: (B, 2), each image's rows and columns of tiles, 0 and 0 for none.
            tile_batch_size: How many tiles are encoded at once; all by default. Fewer need less memory.
            kwargs: `output_hidden_states`, `output_attentions`, which are those of `pixel_values` in both towers, and
                `return_dict`. The image processor's other outputs are accepted and not used.

        Raises:
            ValueError: If `pixel_values` or the tiles are not such a batch, `pixel_mask` has another size, or
                `tile_grids` do not hold as many tiles as there are.
        """
        check_views(pixel_values, pixel_values_local, tile_grids, tile_batch_size)
        local_maps = None
        if tile_grids is not None:
            # No one sees the attention weights of tiles, so they need not be made.
            attn_implementation = self._attention_of_call(pixel_values, {"output_attentions": False})
            local_maps = self.encode_tiles(pixel_values_local, tile_grids, tile_batch_size, attn_implementation)
        for recorded in ("hidden_states", "attentions"):
            wanted = kwargs.get(f"output_{recorded}", getattr(self.config, f"output_{recorded}"))
            kwargs[f"output_clip_{recorded}"] = bool(wanted)
        return self._encode_images(pixel_values, pixel_mask, local_maps, **kwargs)

    # Apart from the tiles, whose blocks' outputs would be recorded too.
    @capture_outputs(tie_last_hidden_states=False)
    def _encode_images(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None,
        local_maps: tuple[Tensor | None, ...] | None,
        **kwargs: Any,
    ) -> DeepEncoderModelOutput:
        cells, sam_map = self.encode_views(pixel_values, self._attention_of_call(pixel_values, kwargs))
        return DeepEncoderModelOutput(
            last_hidden_state=cells,
            pooler_output=mean_over_cells(cells, pixel_values, pixel_mask, self.sam_model.stride),
            patch_embeds=sam_map.flatten(2).transpose(1, 2),
            local_feature_maps=local_maps,
            vision_tokens=tuple(map(self.lay_out_tokens, cells, local_maps or (None,) * len(cells))),
            sam_feature_map=sam_map,
        )


__all__ = ["DeepEncoder", "DeepEncoderModel", "DeepEncoderModelOutput"]
