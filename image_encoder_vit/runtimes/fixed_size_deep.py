"""
The whole DeepEncoder as a graph for other runtimes: the whole view of images of one size, with a free batch. As
`fixed_size` does it for the encoder: CLIP's position table too is resized beforehand.

Letters in shapes: B images, h and w the grid of the view in cells, C the width of the CLIP tower, D the decoder's.
"""

import copy

import torch
from torch import Tensor, nn

from ..attention import resize_pos_embed
from ..modeling_deep_encoder import DeepEncoderClipEmbeddings, DeepEncoderModel
from ..modeling_image_encoder_vit import ImageEncoderViTModel
from .fixed_size import OUTPUT_NAMES, FixedSizeEncoder, check_convertible


class FixedSizeDeepEncoder(nn.Module):
    """
    A DeepEncoder in float32 for whole views of one size (height, width) in px, in eval mode; arguments as in
    `FixedSizeEncoder`.

    Raises:
        ValueError: If the patch size does not divide the size, or weights are quantised or offloaded.
    """

    output_names = (*OUTPUT_NAMES, "vision_tokens")

    def __init__(self, model: DeepEncoderModel, size: tuple[int, int], chunked: bool) -> None:
        super().__init__()
        check_convertible(model)
        self.size = size
        sam = FixedSizeEncoder(model.sam_model, size, chunked)
        self.encoder, self.attn_implementation = sam.encoder, sam.attn_implementation
        stride = model.sam_model.stride
        grid = -(-size[0] // stride), -(-size[1] // stride)
        in_float32 = {
            id(parameter): nn.Parameter(parameter.detach().to("cpu", torch.float32), requires_grad=False)
            for parameter in model.parameters()
        }
        self.vision_model = copy.deepcopy(model.vision_model, memo=dict(in_float32))
        embeddings = FixedSizeClipEmbeddings(self.vision_model.embeddings, grid)
        self.vision_model.add_module("embeddings", embeddings)
        self.projector = copy.deepcopy(model.projector, memo=dict(in_float32))
        self.image_newline = in_float32[id(model.image_newline)]
        self.view_seperator = in_float32[id(model.view_seperator)]
        self.eval()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """
        Pixels (B, 3, *size) to the projected cells (B, D, h, w), their mean (B, D), SAM's cells as tokens
        (B, h * w, C), and the vision tokens (B, h * (w + 1) + 1, D).
        """
        sam_map = self.encoder(pixel_values, attn_implementation=self.attn_implementation)
        sam_tokens = sam_map.flatten(2).transpose(1, 2)
        clip_tokens = self.vision_model(sam_map)
        projected = self.projector(torch.cat((clip_tokens[:, 1:], sam_tokens), dim=2))  # (B, h * w, D)
        rows = projected.unflatten(1, sam_map.shape[2:])
        batch, height = rows.shape[:2]
        lines = torch.cat((rows, self.image_newline.expand(batch, height, 1, -1)), dim=2).flatten(1, 2)
        tokens = torch.cat((lines, self.view_seperator.expand(batch, 1, -1)), dim=1)
        return rows.permute(0, 3, 1, 2), projected.mean(dim=1), sam_tokens, tokens


class FixedSizeClipEmbeddings(nn.Module):
    """CLIP's embeddings for one `grid` = (h, w): from SAM's map (B, C, h, w) to tokens (B, 1 + h * w, C)."""

    def __init__(self, embeddings: DeepEncoderClipEmbeddings, grid: tuple[int, int]) -> None:
        super().__init__()
        table = embeddings.position_embedding.weight.detach()
        side = embeddings.grid_size
        positions = resize_pos_embed(table[1:].reshape(1, side, side, -1), grid).flatten(1, 2)  # (1, h * w, C)
        self.positions = nn.Parameter(positions.contiguous(), requires_grad=False)
        first = embeddings.class_embedding.detach() + table[0]
        self.first = nn.Parameter(first[None, None].contiguous(), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        tokens = features.flatten(2).transpose(1, 2) + self.positions
        return torch.cat((self.first.expand(tokens.shape[0], -1, -1), tokens), dim=1)


def fixed_size_of(
    model: ImageEncoderViTModel | DeepEncoderModel, size: tuple[int, int], chunked: bool
) -> FixedSizeEncoder | FixedSizeDeepEncoder:
    """The graph of either model; see there."""
    if isinstance(model, DeepEncoderModel):
        return FixedSizeDeepEncoder(model, size, chunked)
    return FixedSizeEncoder(model, size, chunked)
