"""
The SAM-ViT image encoder ("Segment Anything", arXiv 2304.02643) as DeepSeek-OCR uses it (arXiv 2510.18234): in plain
PyTorch as `ImageEncoderViT`, and wrapped for transformers as `ImageEncoderViTModel`, with a head as
`ImageEncoderViTForImageClassification`, and for the heads of detection and segmentation models as
`ImageEncoderViTBackbone`.

Letters in shapes: B images, H and W the grid in patches, C channels, h and w the grid of the last feature map.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from os import PathLike
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.utils import ModelOutput, logging
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import RelativeTables, attend, resize_pos_embed
from .configuration_image_encoder_vit import ImageEncoderViTConfig, checked_config
from .cpu_inference import (
    convolve,
    cpu_linear,
    fits_cpu_linear,
    is_hooked,
    is_plain_linear,
    is_watched,
    linear,
    takes_cpu_path,
)
from .feature_maps import checked_tile_grids, stitch_tiles
from .recomputation import gelu_linear, is_trained, norm_linear

logger = logging.get_logger(__name__)

LAYER_NORM_EPS = 1e-6  # In every norm, LayerNorm2d included.
MAX_NAMES_IN_ERROR = 12
HEAD_PREFIXES = ("layernorm.", "classifier.")
TOKENS_PER_BAND = 1792  # At most, where a row of windows has fewer: two rows of windows of 14 at 1024 x 1024 px.


class ImageEncoderViTLayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ImageEncoderViTPatchEmbed(nn.Module):
    """Pixels (B, 3, height in px, width in px) to patches (B, H, W, C), in the dtype of the weights."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = convolve(self.proj, pixel_values.to(self.proj.weight.dtype)).permute(0, 2, 3, 1)
        return patches.contiguous()  # Channels last in memory too: every layer up to the neck works on channels.


class ImageEncoderViTLinear(nn.Linear):
    """A linear layer (..., C) to (..., D) that takes the CPU's path by itself, inside of modules that call it."""

    def forward(self, input: Tensor) -> Tensor:
        return cpu_linear(input, self.weight, self.bias) if fits_cpu_linear(self, input) else super().forward(input)


class ImageEncoderViTAttention(nn.Module):
    """
    Multi-head attention with decomposed relative positions over a grid (B, H, W, C): in windows of `window_size`
    patches, or over the whole grid where it is 0.

    Windows that stick out of the grid are filled with padding tokens, zeros before the projection, which take part in
    the attention, as in the published weights' training. `table_size` is the side in patches that the relative
    position tables are made for: the window, or the whole grid of the training size in global blocks.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, qkv_bias: bool, use_rel_pos: bool, window_size: int, table_size: int
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            head_dim = embed_dim // num_heads
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_size - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_size - 1, head_dim))

    def forward(self, hidden: Tensor, attn_implementation: str = "sdpa") -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) to the same and, with "eager", the attention weights (B * windows, heads, Q, K)."""
        height, width = hidden.shape[1:3]
        if self.window_size and not self._fills_after_projection():
            hidden = F.pad(hidden, (0, 0, 0, -width % self.window_size, 0, -height % self.window_size))
        attended, weights = self.attend(linear(self.qkv, hidden), attn_implementation)
        return linear(self.proj, attended[:, :height, :width]), weights

    def attend(self, qkv: Tensor, attn_implementation: str) -> tuple[Tensor, Tensor | None]:
        """Attention between the projections: (B, H, W, 3 * C) to (B, H, W, C) and, with "eager", the weights."""
        padding = None
        if self.window_size and self._fills_after_projection():  # Of zeros, `qkv` makes its bias.
            padding = qkv.new_zeros(qkv.shape[3]) if self.qkv.bias is None else self.qkv.bias.to(qkv.dtype)
        tables = RelativeTables(self.rel_pos_h, self.rel_pos_w) if self.use_rel_pos else None
        return attend(qkv, padding, tables, self.num_heads, self.window_size, attn_implementation)

    def _fills_after_projection(self) -> bool:
        """Whether only real tokens go through `qkv`: unless somebody watches or changes it, or keeps its bias away."""
        return type(self.qkv) is nn.Linear and not is_hooked(self.qkv)


class ImageEncoderViTMLP(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, embed_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(embed_dim, mlp_dim)
        self.lin2 = nn.Linear(mlp_dim, embed_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        if self._keeps_no_gelu(hidden):
            return gelu_linear(linear(self.lin1, hidden), self.lin2.weight, self.lin2.bias)
        return linear(self.lin2, linear(self.lin1, hidden, gelu=True))

    def _keeps_no_gelu(self, hidden: Tensor) -> bool:
        is_plain = is_plain_linear(self.lin2) and type(self.lin2.weight) is nn.Parameter
        return is_plain and is_trained(chain((hidden,), self.parameters()))


class ImageEncoderViTBlock(GradientCheckpointingLayer):
    """Transformer block on (B, H, W, C): attention, in windows or over the whole grid, then the MLP."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        use_rel_pos: bool,
        window_size: int,
        grid_size: int,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.attn = ImageEncoderViTAttention(
            embed_dim, num_heads, qkv_bias, use_rel_pos, window_size, table_size=window_size or grid_size
        )
        self.norm2 = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.mlp = ImageEncoderViTMLP(embed_dim, int(embed_dim * mlp_ratio))

    def forward(self, hidden: Tensor, attn_implementation: str = "sdpa") -> Tensor:
        if attn_implementation != "eager" and takes_cpu_path(hidden, modules=self.children(), calls_layers=True):
            return self._forward_in_bands(hidden, attn_implementation)
        if attn_implementation != "eager" and self._keeps_no_norms(hidden):
            qkv = norm_linear(hidden, self.norm1, self.attn.qkv)
            hidden = hidden + linear(self.attn.proj, self.attn.attend(qkv, attn_implementation)[0])
            inner = norm_linear(hidden, self.norm2, self.mlp.lin1)
            return hidden + gelu_linear(inner, self.mlp.lin2.weight, self.mlp.lin2.bias)
        hidden = hidden + self.attn(self.norm1(hidden), attn_implementation)[0]
        return hidden + self.mlp(self.norm2(hidden))

    def _keeps_no_norms(self, hidden: Tensor) -> bool:
        """Whether this is training of the layers as they were made, so that nobody can tell how they are computed."""
        if type(self.attn) is not ImageEncoderViTAttention or type(self.mlp) is not ImageEncoderViTMLP:
            return False
        layers = [self.norm1, self.attn.qkv, self.attn.proj, self.norm2, self.mlp.lin1, self.mlp.lin2]
        return (
            is_trained(chain((hidden,), self.parameters()))
            and not any(is_watched(child) for child in self.children())
            and all(type(layer) in (nn.LayerNorm, nn.Linear) for layer in layers)
            and all(type(weight) is nn.Parameter for layer in layers for weight in layer.parameters())
            and all(norm.weight is not None and norm.weight.ndim == 1 for norm in (self.norm1, self.norm2))
        )

    def _forward_in_bands(self, hidden: Tensor, attn_implementation: str) -> Tensor:
        """
        The same, a band of rows or a few small images at a time, for inference on the CPU: temporaries of a band fit
        into the cache and are reused, where those of a whole page are fetched from the operating system page by page.
        """
        height, width = hidden.shape[1:3]
        step = self.window_size or 1  # Windows stay whole.
        images = max(1, TOKENS_PER_BAND // (height * width))
        rows = height if images > 1 else max(step, TOKENS_PER_BAND // width // step * step)
        result = torch.empty(hidden.shape, dtype=hidden.dtype)
        if not self.window_size:
            torch.add(hidden, self.attn(self.norm1(hidden), attn_implementation)[0], out=result)
        for images_in, images_out in zip(hidden.split(images), result.split(images), strict=True):
            for band, output in zip(images_in.split(rows, dim=1), images_out.split(rows, dim=1), strict=True):
                if self.window_size:
                    torch.add(band, self.attn(self.norm1(band), attn_implementation)[0], out=output)
                output += self.mlp(self.norm2(output))
        return result


class ImageEncoderViTNeck(nn.Sequential):
    """Convolutions over (B, C, H, W), each with its norm."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = convolve(layer, input) if isinstance(layer, nn.Conv2d) else layer(input)
        return input


class ImageEncoderViT(nn.Module):
    """
    The encoder in plain PyTorch, with the published signature and parameter names. `ImageEncoderViT()` is SAM-B as
    DeepSeek-OCR uses it: 95,569,152 parameters in 179 tensors.

    The keyword-only options are what real checkpoints need: `downsample_channels=()` is plain SAM, `(512, 896)` is
    DeepSeek-OCR-2. `ImageEncoderViTConfig` documents every argument.

    Example:
        >>> encoder = ImageEncoderViT(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,)).eval()
        >>> with torch.inference_mode():
        ...     encoder(torch.zeros(1, 3, 64, 128)).shape
        torch.Size([1, 1024, 1, 2])
    """

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        out_chans: int = 256,
        global_attn_indexes: tuple[int, ...] | list[int] = (2, 5, 8, 11),
        *,
        window_size: int = 14,
        qkv_bias: bool = True,
        use_abs_pos: bool = True,
        use_rel_pos: bool = True,
        downsample_channels: tuple[int, ...] | list[int] = (512, 1024),
    ) -> None:
        super().__init__()
        # The configuration knows the published names, and what makes no encoder.
        checked_config(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            out_chans=out_chans,
            downsample_channels=downsample_channels,
            window_size=window_size,
            global_attn_indexes=global_attn_indexes,
        )
        self.patch_size = patch_size
        self.in_chans = in_chans
        grid_size = img_size // patch_size

        self.patch_embed = ImageEncoderViTPatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid_size, grid_size, embed_dim)) if use_abs_pos else None
        self.blocks = nn.ModuleList(
            ImageEncoderViTBlock(
                embed_dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                use_rel_pos=use_rel_pos,
                window_size=0 if index in global_attn_indexes else window_size,
                grid_size=grid_size,
            )
            for index in range(depth)
        )
        self.neck = ImageEncoderViTNeck(
            nn.Conv2d(embed_dim, out_chans, kernel_size=1, bias=False),
            ImageEncoderViTLayerNorm2d(out_chans, eps=LAYER_NORM_EPS),
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            ImageEncoderViTLayerNorm2d(out_chans, eps=LAYER_NORM_EPS),
        )
        # net_2, net_3, ... halve the grid each; the published names start at 2.
        self.downsample_names = [f"net_{index + 2}" for index in range(len(downsample_channels))]
        channels = [out_chans, *downsample_channels]
        for name, before, after in zip(self.downsample_names, channels[:-1], channels[1:], strict=True):
            self.add_module(name, nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False))

    @property
    def stride(self) -> int:
        """Side in px of the image area that one cell of the output stands for: 64 with net_2 and net_3, else 16."""
        return self.patch_size * 2 ** len(self.downsample_names)

    def forward(
        self, x: Tensor, attn_implementation: str = "sdpa", stages: Collection[str] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """
        Encodes pixels (B, 3, height in px, width in px) to features (B, 1024, ceil(height / 64), ceil(width / 64)),
        or (B, 256, height / 16, width / 16) without downsampling.

        `attn_implementation` is "sdpa", "eager", or "flex_attention", which is for GPUs and runs unfused elsewhere.
        Pixels are cast to the dtype of the weights. With `stages`, some of the configuration's `stage_names`, it
        returns their feature maps in the order of computation, (B, C, h, w) each, and computes nothing after the last
        one.

        Raises:
            ValueError: If x is not a non-empty batch of floating-point images whose sides the patch size divides.
        """
        check_pixel_values(x, self.in_chans, self.patch_size)
        hidden = self.patch_embed(x)  # (B, H, W, C)
        if self.pos_embed is not None:
            positions = resize_pos_embed(self.pos_embed, (hidden.shape[1], hidden.shape[2]))
            # Accelerate places a module's own parameters apart from its children, and moves only inputs of modules.
            # Asked first, so that exported graphs name no device.
            if positions.device != hidden.device:
                positions = positions.to(hidden.device)
            hidden = hidden + positions
        if stages is not None:
            return self._feature_maps(hidden, attn_implementation, stages)
        for block in self.blocks:
            hidden = block(hidden, attn_implementation=attn_implementation)
        features = self.neck(hidden.permute(0, 3, 1, 2))  # (B, 256, H, W)
        for name in self.downsample_names:
            features = convolve(getattr(self, name), features)
        return features

    def _feature_maps(self, hidden: Tensor, attn_implementation: str, stages: Collection[str]) -> tuple[Tensor, ...]:
        """The feature maps of `stages` from the embedded patches (B, H, W, C)."""
        wanted = len(stages)
        maps = []
        if "stem" in stages:
            maps.append(hidden.permute(0, 3, 1, 2).contiguous())
        for index, block in enumerate(self.blocks):
            if len(maps) == wanted:
                return tuple(maps)
            hidden = block(hidden, attn_implementation=attn_implementation)
            if f"stage{index + 1}" in stages:
                maps.append(hidden.permute(0, 3, 1, 2).contiguous())
        features = hidden.permute(0, 3, 1, 2)
        for name in ["neck", *self.downsample_names]:
            if len(maps) == wanted:
                break
            features = self.neck(features) if name == "neck" else convolve(getattr(self, name), features)
            if name in stages:
                maps.append(features)
        return tuple(maps)


def encoder_of(config: ImageEncoderViTConfig) -> ImageEncoderViT:
    """The plain encoder that a configuration describes: it answers to the published names too."""
    return ImageEncoderViT(**{name: getattr(config, name) for name in signature(ImageEncoderViT).parameters})


@dataclass
class ImageEncoderViTModelOutput(ModelOutput):
    """
    Output of [`ImageEncoderViTModel`].

    Args:
        last_hidden_state: The feature map (B, 1024, h, w): h = ceil(height in px / 64), w likewise.
        pooler_output: Mean of the feature map over its cells (B, 1024).
        patch_embeds: The same features as tokens (B, h * w, 1024), row by row: what DeepSeek-OCR feeds to CLIP-L.
        hidden_states: On request, the patch embedding with positions and the output of each block, (B, H, W, C) each.
        attentions: On request, the attention weights of each block: (B * windows, heads, 196, 196) in windowed blocks,
            (B, heads, H * W, H * W) in global ones.
        local_feature_maps: With tiles, the last feature maps of each image's tiles stitched to one, (1024, rows,
            columns) in cells; None for an image without tiles.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    patch_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    local_feature_maps: tuple[Tensor | None, ...] | None = None


class StrictPreTrainedModel(PreTrainedModel):
    """
    What all models with this encoder share: strict loading, attention chosen in each forward pass, and saved code that
    names its classes.
    """

    # Which classes of the saved code the Auto classes load, as "module.Class".
    _auto_classes: ClassVar[dict[str, str]] = {}

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers guesses this from the source: it looks for its own attention interface, which has no room for a
        # bias made chunk by chunk. Ours is chosen in each forward pass, so it can be set at any time.
        return True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *model_args: Any,
        strict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """
        Loads a model as `PreTrainedModel.from_pretrained` does, but refuses a checkpoint that does not fit: where
        transformers leaves missing weights random with a warning, this raises.

        `strict=False` allows missing and unexpected weights, `ignore_mismatched_sizes=True` weights of another shape.
        The head of a classifier is an exception: a checkpoint with none of it leaves it random, with transformers'
        warning, and for the other classes a checkpoint may have one.

        Raises:
            ValueError: Naming the weights that are missing, unexpected or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        allows_mismatches = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # All that does not fit is reported together below.
            **kwargs,
        )
        head = {name for name in model.state_dict() if name.startswith(HEAD_PREFIXES)}
        new_head = head if head <= set(info["missing_keys"]) else set()
        misfit = Misfit(
            missing=sorted(set(info["missing_keys"]) - new_head) if strict else [],
            unexpected=sorted(info["unexpected_keys"]) if strict else [],
            mismatched=[] if allows_mismatches else sorted(info["mismatched_keys"]),
        )
        if any(misfit):
            hint = cls._explain_unexpected(misfit.unexpected)
            raise ValueError(describe_misfit(str(pretrained_model_name_or_path), misfit, hint))
        return (model, info) if wants_info else model

    @classmethod
    def _explain_unexpected(cls, names: list[str]) -> str | None:
        """A sentence for the error message where the names of unexpected weights tell what the checkpoint is."""
        return None

    def _attention_of_call(self, pixel_values: Tensor, options: Mapping[str, Any]) -> str:
        """The attention implementation for a forward pass with these options."""
        # Only the eager path has attention weights to return, so a call that asks for them takes it.
        if options.get("output_attentions", self.config.output_attentions):
            return "eager"
        chosen = self.config._attn_implementation
        if chosen == "flex_attention" and pixel_values.device.type != "cuda":
            if not torch.compiler.is_compiling():
                logger.warning_once(
                    f"attn_implementation='flex_attention' is for CUDA GPUs: on {pixel_values.device.type!r} this "
                    "encoder computes the same through 'sdpa'."
                )
            return "sdpa"
        return chosen

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """
        Saves as `PreTrainedModel.save_pretrained` does. Where the code is saved too, the configuration names the
        classes for all of the Auto classes alike, whichever of them is saved.
        """
        if self._auto_class is not None:
            name_auto_classes(self.config, type(self))
        super().save_pretrained(save_directory, *args, **kwargs)


def name_auto_classes(config: PreTrainedConfig, model_class: type[StrictPreTrainedModel]) -> None:
    """Writes into the configuration which classes of the saved code the Auto classes load."""
    known = getattr(config, "auto_map", None) or {}
    config.auto_map = known | model_class._auto_classes


def init_encoder_positions(module: nn.Module, std: float) -> None:
    """
    Initialises the encoder's own parameters: random rather than zero positions, as ViTDet starts from, since zeros
    would hide a mistake in their handling.
    """
    if isinstance(module, ImageEncoderViT) and module.pos_embed is not None:
        init.trunc_normal_(module.pos_embed, std=std)
    elif isinstance(module, ImageEncoderViTAttention) and module.use_rel_pos:
        init.trunc_normal_(module.rel_pos_h, std=std)
        init.trunc_normal_(module.rel_pos_w, std=std)


class ImageEncoderViTPreTrainedModel(StrictPreTrainedModel):
    """
    What the model, the classifier and the backbone share: one encoder, its initialisation, and strict loading.

    The weights carry the published names below the one prefix `encoder.`; state dicts without the prefix load too. So
    a folder saved by one class loads into the others: the head of a classifier is left out, or made anew.
    """

    config: ImageEncoderViTConfig
    config_class = ImageEncoderViTConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    # The bias depends on the query, which no flash attention kernel takes.
    _supports_flash_attn = False
    _no_split_modules = ["ImageEncoderViTBlock"]
    _keys_to_ignore_on_load_unexpected = [rf"^{re.escape(prefix)}" for prefix in HEAD_PREFIXES]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(ImageEncoderViTBlock, index=0),
        "attentions": OutputRecorder(ImageEncoderViTAttention, index=1),
    }
    _auto_classes = {
        "AutoModel": "modeling_image_encoder_vit.ImageEncoderViTModel",
        "AutoModelForImageClassification": "modeling_image_encoder_vit.ImageEncoderViTForImageClassification",
        "AutoBackbone": "modeling_image_encoder_vit.ImageEncoderViTBackbone",
    }

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.patch_embed

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_encoder_positions(module, self.config.initializer_range)

    @classmethod
    def _explain_unexpected(cls, names: list[str]) -> str | None:
        patch_embed = "patch_embed.proj.weight"
        prefixes = [name.removesuffix(patch_embed) for name in names if name.endswith("." + patch_embed)]
        if not prefixes:
            return None
        return (
            f"It holds an encoder under {' and '.join(map(repr, prefixes))}: load it with "
            f'key_mapping={{r"^{re.escape(prefixes[0])}": "encoder."}}, or extract those weights.'
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a state dict, the encoder's with or without its prefix; otherwise as `nn.Module.load_state_dict`."""
        prefix = f"{self.base_model_prefix}."
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict = {
                name if name.startswith(HEAD_PREFIXES) else prefix + name: value for name, value in state_dict.items()
            }
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


class ImageEncoderViTModel(ImageEncoderViTPreTrainedModel):
    """
    The encoder as a transformers model.

    Example:
        >>> config = ImageEncoderViTConfig(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=[1])
        >>> model = ImageEncoderViTModel(config).eval()  # `from_pretrained(folder)` for one with trained weights
        >>> with torch.inference_mode():
        ...     outputs = model(torch.zeros(1, 3, 64, 128))
        >>> outputs.last_hidden_state.shape, outputs.patch_embeds.shape, outputs.pooler_output.shape
        (torch.Size([1, 1024, 1, 2]), torch.Size([1, 2, 1024]), torch.Size([1, 1024]))
    """

    def __init__(self, config: ImageEncoderViTConfig) -> None:
        super().__init__(config)
        self.encoder = encoder_of(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        pixel_values_local: Tensor | None = None,
        tile_grids: Tensor | None = None,
        tile_batch_size: int | None = None,
        **kwargs: Any,
    ) -> ImageEncoderViTModelOutput:
        """
        Encodes a batch of images, and their tiles where they have any.

        Args:
            pixel_values: (B, 3, height in px, width in px), both sides multiples of the patch size; cast to the dtype
                of the weights.
            pixel_mask: (B, height in px, width in px), 1 for the image and 0 for padding. Only `pooler_output` uses
                it, averaging the cells that hold a part of the image; padding is attended to, as in training.
            pixel_values_local: The tiles of all images, (N, 3, side in px, side in px), image by image and row by row.
            tile_grids: (B, 2), each image's rows and columns of tiles, 0 and 0 for none.
            tile_batch_size: How many tiles are encoded at once; all by default. Fewer need less memory.
            kwargs: `output_hidden_states`, `output_attentions`, which are those of `pixel_values`, and `return_dict`.
                The image processor's other outputs are accepted and not used.

        Raises:
            ValueError: If `pixel_values` or the tiles are not such a batch, `pixel_mask` has another size, or
                `tile_grids` do not hold as many tiles as there are.
        """
        if pixel_values_local is not None and tile_grids is None:
            raise ValueError("pixel_values_local needs tile_grids, the rows and columns of each image's tiles.")
        local_feature_maps = None
        if tile_grids is not None:
            check_tiles(len(pixel_values), pixel_values_local, tile_grids, tile_batch_size)
            local_feature_maps = self._encode_tiles(pixel_values_local, tile_grids, tile_batch_size)
        return self._encode_images(pixel_values, pixel_mask, local_feature_maps, **kwargs)

    def _encode_tiles(
        self, tiles: Tensor | None, tile_grids: Tensor, tile_batch_size: int | None
    ) -> tuple[Tensor | None, ...]:
        if tiles is None or not len(tiles):
            return (None,) * len(tile_grids)
        # No one sees the attention weights of tiles, so they need not be made.
        attn_implementation = self._attention_of_call(tiles, {"output_attentions": False})
        features = [
            self.encoder(some, attn_implementation=attn_implementation)
            for some in tiles.split(tile_batch_size or len(tiles))
        ]
        return stitch_tiles(torch.cat(features), tile_grids)

    # Apart from the tiles, whose blocks' outputs would be recorded too.
    @capture_outputs(tie_last_hidden_states=False)
    def _encode_images(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None,
        local_feature_maps: tuple[Tensor | None, ...] | None,
        **kwargs: Any,
    ) -> ImageEncoderViTModelOutput:
        features = self.encoder(pixel_values, attn_implementation=self._attention_of_call(pixel_values, kwargs))
        return ImageEncoderViTModelOutput(
            last_hidden_state=features,
            pooler_output=mean_over_cells(features, pixel_values, pixel_mask, self.encoder.stride),
            patch_embeds=features.flatten(2).transpose(1, 2),
            local_feature_maps=local_feature_maps,
        )


class ImageEncoderViTForImageClassification(ImageEncoderViTPreTrainedModel):
    """
    The encoder with a head on its pooled features, a norm and a linear layer: one logit for each of `config.id2label`.

    Example:
        >>> config = ImageEncoderViTConfig(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=[1], num_labels=3)
        >>> model = ImageEncoderViTForImageClassification(config).eval()
        >>> with torch.inference_mode():
        ...     model(torch.zeros(2, 3, 64, 64)).logits.shape
        torch.Size([2, 3])
    """

    def __init__(self, config: ImageEncoderViTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = encoder_of(config)
        channels = [config.output_channels, *config.downsample_channels][-1]
        # Features of an encoder are of any size, hundreds in some: without it a new head would start out saturated.
        self.layernorm = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.classifier = nn.Linear(channels, config.num_labels)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """
        Classifies a batch of images.

        Args:
            pixel_values: (B, 3, height in px, width in px), both sides multiples of the patch size; cast to the dtype
                of the weights.
            pixel_mask: (B, height in px, width in px), 1 for the image and 0 for padding, which the mean over the
                feature map leaves out.
            labels: The numbers of the classes (B,); one number (B,) for a regression; ones and zeros (B, labels) where
                an image may have several labels. `config.problem_type` says which; left open, it is
                told by the number of labels and their dtype. With them, the output has a `loss`.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and what transformers' loss takes. The
                image processor's other outputs are accepted and not used.

        Raises:
            ValueError: If `pixel_values` is not such a batch, or `pixel_mask` has another size.
        """
        features = self.encoder(pixel_values, attn_implementation=self._attention_of_call(pixel_values, kwargs))
        pooled = mean_over_cells(features, pixel_values, pixel_mask, self.encoder.stride)  # (B, channels)
        logits = self.classifier(self.layernorm(pooled))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits)


class ImageEncoderViTBackbone(BackboneMixin, ImageEncoderViTPreTrainedModel):
    """
    The encoder as a backbone for transformers' detection and segmentation models: the feature maps that
    `config.out_features` names, each (B, C, h, w).

    "stem" (patches with positions) and "stage1" to "stage12" (the blocks) have 768 channels at stride 16, "neck" 256 at
    stride 16, "net_2" 512 at stride 32 and "net_3" 1024 at stride 64. It holds the weights of all stages, asked for or
    not, so the folders of [`ImageEncoderViTModel`] load as they are.

    Example:
        >>> config = ImageEncoderViTConfig(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=[1])
        >>> config.out_features = ["stage2", "net_3"]
        >>> with torch.inference_mode():
        ...     maps = ImageEncoderViTBackbone(config).eval()(torch.zeros(1, 3, 64, 128)).feature_maps
        >>> [tuple(feature_map.shape) for feature_map in maps]
        [(1, 32, 4, 8), (1, 1024, 1, 2)]
    """

    def __init__(self, config: ImageEncoderViTConfig) -> None:
        super().__init__(config)
        self.num_features = [
            *[config.hidden_size] * (1 + config.num_hidden_layers),
            config.output_channels,
            *config.downsample_channels,
        ]
        self.encoder = encoder_of(config)
        self.post_init()

    @property
    def out_features(self) -> list[str]:
        """The names of the feature maps, in the order in which they are returned."""
        return self.config.out_features

    @out_features.setter
    def out_features(self, out_features: list[str] | None) -> None:
        self.config.out_features = out_features

    @property
    def out_indices(self) -> list[int]:
        """The same as indices into `stage_names`."""
        return self.config.out_indices

    @out_indices.setter
    def out_indices(self, out_indices: list[int] | tuple[int, ...] | None) -> None:
        self.config.out_indices = out_indices

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput:
        """
        Computes the feature maps of a batch of images, up to the last one asked for.

        Args:
            pixel_values: (B, 3, height in px, width in px), both sides multiples of the patch size; cast to the dtype
                of the weights.
            kwargs: `output_hidden_states`, `output_attentions` (of the blocks computed), `return_dict`. The image
                processor's other outputs are accepted and not used.

        Raises:
            ValueError: If `pixel_values` is not such a batch.
        """
        attn_implementation = self._attention_of_call(pixel_values, kwargs)
        return BackboneOutput(feature_maps=self.encoder(pixel_values, attn_implementation, stages=self.out_features))


def check_tiles(num_images: int, tiles: Tensor | None, tile_grids: Tensor, tile_batch_size: int | None) -> None:
    """
    Checks that tiles and the grids of `num_images` images hold together.

    Raises:
        ValueError: Naming what does not fit.
    """
    if len(tile_grids) != num_images:
        raise ValueError(f"tile_grids must have a row for each of {num_images} images, got {len(tile_grids)}.")
    checked_tile_grids(tile_grids, 0 if tiles is None else len(tiles))
    if tile_batch_size is not None and tile_batch_size < 1:
        raise ValueError(f"tile_batch_size must be at least 1, got {tile_batch_size}.")


def check_pixel_values(pixel_values: Tensor, in_chans: int, patch_size: int) -> None:
    """
    Checks that `pixel_values` is a batch (B, in_chans, height in px, width in px) that can be cut into patches.

    Raises:
        ValueError: Naming the shape or dtype seen and what to do.
    """
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values must be (batch, {in_chans}, height, width), got {pixel_values.ndim} dimensions: {shape}. "
            "A single image needs a batch dimension: pixel_values[None]."
        )
    batch, channels, height, width = shape
    if channels != in_chans:
        raise ValueError(f"pixel_values must have {in_chans} channels in dimension 1, got {channels}: {shape}.")
    if batch == 0:
        raise ValueError(f"pixel_values holds no image: {shape}.")
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(
            f"The sides of pixel_values must be multiples of patch_size={patch_size} px, got {height} x {width} px. "
            "Resize or pad the images; ImageEncoderViT's image processor does."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values must be floating point and normalised, got {pixel_values.dtype}. "
            "Use the image processor, or rescale and normalise the pixels first."
        )


def mean_over_cells(features: Tensor, pixel_values: Tensor, pixel_mask: Tensor | None, stride: int) -> Tensor:
    """Mean of `features` (B, C, h, w) over the cells that hold a part of the image by `pixel_mask`: (B, C)."""
    if pixel_mask is None:
        return features.mean(dim=(2, 3))
    expected = (pixel_values.shape[0], *pixel_values.shape[2:])
    if tuple(pixel_mask.shape) != expected:
        raise ValueError(f"pixel_mask must be (batch, height, width) = {expected}, got {tuple(pixel_mask.shape)}.")
    cells = F.max_pool2d(pixel_mask[:, None].to(features.dtype), stride, ceil_mode=True)  # (B, 1, h, w)
    return (features * cells).sum(dim=(2, 3)) / cells.sum(dim=(2, 3)).clamp(min=1)


class Misfit(NamedTuple):
    """The weights of a checkpoint that are not the encoder's: names, and shapes where they differ (theirs, ours)."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


def describe_misfit(source: str, misfit: Misfit, hint: str | None = None) -> str:
    """The error message for a checkpoint `source` whose weights are not exactly the encoder's."""
    shapes = [f"{name} {tuple(theirs)} instead of {tuple(ours)}" for name, theirs, ours in misfit.mismatched]
    lines = [f"The checkpoint {source!r} does not fit this encoder."]
    for what, entries in (("Missing", misfit.missing), ("Unexpected", misfit.unexpected), ("Mismatched", shapes)):
        if entries:
            more = f", and {len(entries) - MAX_NAMES_IN_ERROR} more" if len(entries) > MAX_NAMES_IN_ERROR else ""
            lines.append(f"{what} weights ({len(entries)}): {', '.join(entries[:MAX_NAMES_IN_ERROR])}{more}.")
    if hint:
        lines.append(hint)
    lines.append(
        "strict=False loads what fits and leaves the rest newly initialised; ignore_mismatched_sizes=True allows "
        "other shapes."
    )
    return "\n".join(lines)


__all__ = [
    "ImageEncoderViT",
    "ImageEncoderViTBackbone",
    "ImageEncoderViTForImageClassification",
    "ImageEncoderViTModel",
    "ImageEncoderViTModelOutput",
]
