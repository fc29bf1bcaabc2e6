"""Feature maps as pictures."""

import torch
from PIL import Image
from torch import Tensor

from .image_geometry_image_encoder_vit import Region


def pca_to_rgb(features: Tensor) -> Tensor:
    """
    Reduces a feature map (C, h, w) to its three principal components as colours: (3, h, w), uint8. Each component is
    stretched so that all but its lowest and highest 2 % lie within 0..255.

    The sign of each component, which PCA leaves open, is chosen so that its largest value is positive: the same
    features always give the same colours.
    """
    channels, height, width = features.shape
    cells = features.detach().to("cpu", torch.float64).reshape(channels, -1).T  # (h * w, C)
    cells = cells - cells.mean(dim=0)
    left, scale, _ = torch.linalg.svd(cells, full_matrices=False)
    components = torch.zeros(cells.shape[0], 3, dtype=torch.float64)
    count = min(3, scale.shape[0])
    components[:, :count] = left[:, :count] * scale[:count]
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)
    low, high = components.quantile(torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    spread = (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    colors = ((components - low) / spread).clamp(0, 1) * 255
    return colors.round().to(torch.uint8).T.reshape(3, height, width)


def page_beside_features(page: Image.Image, features: Tensor, valid_region: Region, stride: int) -> Image.Image:
    """
    A picture of the page at the left and its feature map (C, h, w) in PCA colours at the right, equally large.

    The feature map is cropped to the cells that `valid_region` touches, in px of the canvas; `stride` is the side of
    a cell in px.
    """
    top, left, height, width = valid_region
    rows = slice(top // stride, -(-(top + height) // stride))
    columns = slice(left // stride, -(-(left + width) // stride))
    colors = pca_to_rgb(features[:, rows, columns]).permute(1, 2, 0).numpy()
    # Whole cells cover a little more than the page where it ends inside one: cut that off, to keep cells in place.
    cells = Image.fromarray(colors).resize(
        (colors.shape[1] * stride, colors.shape[0] * stride), Image.Resampling.NEAREST
    )
    offset_top, offset_left = top - rows.start * stride, left - columns.start * stride
    cells = cells.crop((offset_left, offset_top, offset_left + width, offset_top + height))
    gap_px = max(8, width // 50)
    picture = Image.new("RGB", (2 * width + gap_px, height), (255, 255, 255))
    picture.paste(page.resize((width, height), Image.Resampling.BICUBIC), (0, 0))
    picture.paste(cells, (width + gap_px, 0))
    return picture
