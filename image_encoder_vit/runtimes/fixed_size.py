"""
The encoder as a graph for other runtimes: of one image size, with a free batch. Exporters have no antialiased bicubic
resize, so the position tables are resized beforehand and stand in the graph as they are used.

Letters in shapes: B images, H and W the grid in patches, C channels, h and w the grid of the last feature map.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..attention import resize_pos_embed, resize_rel_pos
from ..modeling_image_encoder_vit import (
    ImageEncoderViT,
    ImageEncoderViTAttention,
    ImageEncoderViTModel,
    check_pixel_values,
)

OUTPUT_NAMES = ("last_hidden_state", "pooler_output", "patch_embeds")
EXAMPLE_BATCH = 2  # torch.export takes a batch of 1 for a constant.


class FixedSizeEncoder(nn.Module):
    """
    An encoder in float32 for images of one size (height, width) in px, in eval mode. It shares what it need not change
    with `model`, which stays as it is. `chunked` computes global attention for some queries at a time: runtimes that
    materialise its bias then need 64 MB for an image instead of 805 MB at 1024 x 1024 px.

    Raises:
        ValueError: If the patch size does not divide the size.
    """

    output_names = OUTPUT_NAMES

    def __init__(self, model: ImageEncoderViTModel | ImageEncoderViT, size: tuple[int, int], chunked: bool) -> None:
        super().__init__()
        encoder = model if isinstance(model, ImageEncoderViT) else model.encoder
        check_convertible(encoder)
        with torch.device("meta"):
            check_pixel_values(torch.empty(1, encoder.in_chans, *size), encoder.in_chans, encoder.patch_size)
        self.size = size
        self.encoder = at_size(encoder, (size[0] // encoder.patch_size, size[1] // encoder.patch_size))
        self.attn_implementation = "export_chunked" if chunked else "export"
        self.eval()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (B, 3, *size) to the features (B, C, h, w), their mean (B, C), and them as tokens (B, h * w, C)."""
        features = self.encoder(pixel_values, attn_implementation=self.attn_implementation)
        return features, features.mean(dim=(2, 3)), features.flatten(2).transpose(1, 2)


def check_convertible(encoder: nn.Module) -> None:
    """
    Checks that the weights are plain numbers in memory.

    Raises:
        ValueError: If some are quantised, or offloaded to the disk.
    """
    for name, parameter in encoder.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            raise ValueError(
                f"Weight {name!r} is quantised ({type(parameter.data).__name__}, {parameter.dtype}): export the "
                "encoder before it is quantised, and let the other runtime quantise."
            )
        if parameter.is_meta:
            raise ValueError(f"Weight {name!r} has no data (device 'meta'): load the encoder without offloading.")


def at_size(encoder: ImageEncoderViT, grid: tuple[int, int]) -> ImageEncoderViT:
    """A float32 copy on the CPU with position tables for `grid` = (H, W), over the same weights where they are that."""
    weights = {id(parameter): _float32(parameter) for parameter in encoder.parameters()}
    result = copy.deepcopy(encoder, memo=dict(weights))
    if result.pos_embed is not None:
        result.pos_embed = _constant(resize_pos_embed(result.pos_embed.detach(), grid))
    for attention in (module for module in result.modules() if isinstance(module, ImageEncoderViTAttention)):
        if attention.use_rel_pos and not attention.window_size:
            attention.rel_pos_h = _constant(resize_rel_pos(attention.rel_pos_h.detach(), grid[0]))
            attention.rel_pos_w = _constant(resize_rel_pos(attention.rel_pos_w.detach(), grid[1]))
    return result


def export_program(encoder: Any) -> ExportedProgram:
    """The graph of torch.export of a `FixedSizeEncoder`, or of a whole DeepEncoder's, of any batch from 1."""
    pixels = torch.zeros(EXAMPLE_BATCH, encoder.encoder.in_chans, *encoder.size)
    batch = Dim("batch", min=1)
    with torch.no_grad(), without_exporters_warnings():
        return torch.export.export(encoder, (pixels,), dynamic_shapes=({0: batch},), strict=False)


@contextmanager
def without_exporters_warnings() -> Iterator[None]:
    """Hides the deprecation warnings that torch's exporters cause by calls of their own."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


def _float32(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32 and parameter.device.type == "cpu":
        return parameter
    return _constant(parameter.detach().to("cpu", torch.float32))


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
