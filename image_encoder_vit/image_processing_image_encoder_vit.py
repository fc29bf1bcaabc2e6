"""
Image processors of the encoder, one for each backend of transformers.

`ImageEncoderViTImageProcessorPil` is bit-exact with PIL, the reference of every OCR model that uses this encoder.
`ImageEncoderViTImageProcessor` needs torchvision, gives the same sizes and offsets, and resizes on any device; its
pixels differ slightly from PIL's.
"""

import difflib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling, SizeDict, load_image
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, is_torchvision_available

from .image_geometry_image_encoder_vit import Placement, Size, contain_size, place_on_canvas, place_unpadded

PADDING_POSITIONS = ("center", "bottom_right")
PIL_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


class ImageEncoderViTImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    Arguments beyond those of transformers' processors.

    Args:
        patch_size: With `do_pad=False`, sides become multiples of this many px.
        do_upscale: With `do_pad=False`, whether images smaller than `size` are enlarged to it.
        keep_aspect_ratio: Whether images keep their aspect ratio; GOT-OCR2 stretches them to `size`.
        padding_position: "center" as DeepSeek-OCR, or "bottom_right" of the image as SAM.
        padding_color: RGB colour of the padding, 0 to 255; or "mean" for padding that is 0 after normalising, as SAM.
    """

    patch_size: int
    do_upscale: bool
    keep_aspect_ratio: bool
    padding_position: str
    padding_color: list[int] | tuple[int, ...] | str


class ImageEncoderViTViews(BaseImageProcessor):
    """
    What both backends share: the settings, where each image is placed, and the batch that comes out.

    With `do_pad=True` (the default) each image is resized to fit `size` at its own aspect ratio and centred on a
    canvas of that size, as `PIL.ImageOps.pad` does. With `do_pad=False` it keeps its aspect ratio without padding:
    its longest side is at most that of `size`, its sides are multiples of the patch size, and it is not enlarged
    unless `do_upscale=True`. `size` may be `{"height": ..., "width": ...}`, `{"longest_edge": ...}` or an int, in px.

    The output holds, for B images:

    - `pixel_values` (B, 3, height, width), float32. Images of different sizes (`do_pad=False`) are padded at the
      bottom and right when tensors are asked for, and stay a list otherwise.
    - `pixel_mask` (B, height, width), only for such a batch: 1 for the image, 0 for the padding.
    - `original_sizes` (B, 2): height and width in px of what was given, upright by its EXIF orientation.
    - `valid_regions` (B, 4): top, left, height and width in px of the image on its canvas. `cell_to_pixels` maps a
      feature cell back to the original image with these two.
    """

    valid_kwargs = ImageEncoderViTImageProcessorKwargs
    model_input_names = ["pixel_values"]
    do_resize = True
    size = {"height": 1024, "width": 1024}
    default_to_square = True
    resample = PILImageResampling.BICUBIC
    do_pad = True
    keep_aspect_ratio = True
    padding_position = "center"
    padding_color = [127, 127, 127]
    patch_size = 16
    do_upscale = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_convert_rgb = True

    def __init__(self, **kwargs: Any) -> None:
        # transformers keeps keywords it does not know as attributes, so a misspelt one would change nothing.
        known = self.valid_kwargs.__annotations__
        for keyword in kwargs.keys() - known.keys():
            if closest := difflib.get_close_matches(keyword, known, n=1, cutoff=0.8):
                raise ValueError(f"{type(self).__name__} has no setting {keyword!r}. Did you mean {closest[0]!r}?")
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings as written to preprocessor_config.json, with the code of both backends named for the Hub."""
        settings = super().to_dict()
        if "auto_map" in settings:
            module = type(self).__module__.rpartition(".")[2]
            backends = (ImageEncoderViTImageProcessorPil, ImageEncoderViTImageProcessor)
            settings["auto_map"] = {"AutoImageProcessor": [f"{module}.{backend.__name__}" for backend in backends]}
        return settings

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths and URLs, in lists of any depth; leaves images as they are."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(entry) for entry in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return open_image(image_url_or_urls)
        return image_url_or_urls

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[Any]:
        flat = flatten_images(self.fetch_images(images))
        if not flat:
            raise ValueError("No image given: the list of images is empty.")
        return flat

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        for name in ("do_center_crop", "crop_size", "pad_size"):
            if kwargs.get(name):
                raise ValueError(
                    f"{name} is not supported, got {kwargs[name]}: nothing is cropped; `size` is the canvas."
                )
        color = kwargs["padding_color"]
        if color != "mean" and (len(color) != 3 or not all(v in range(256) for v in color)):
            raise ValueError(f'padding_color must be three integers from 0 to 255, or "mean", got {color!r}.')
        if kwargs["padding_position"] not in PADDING_POSITIONS:
            raise ValueError(
                f"padding_position must be one of {PADDING_POSITIONS}, got {kwargs['padding_position']!r}."
            )
        if kwargs["patch_size"] < 1:
            raise ValueError(f"patch_size must be at least 1 px, got {kwargs['patch_size']}.")
        canvas_size(kwargs["size"])

    def _place(self, image: Size, settings: dict[str, Any]) -> Placement:
        canvas = canvas_size(settings["size"])
        centered = settings["padding_position"] == "center"
        if not settings["do_resize"]:
            return place_as_it_is(image, canvas if settings["do_pad"] else image, centered)
        if not settings["keep_aspect_ratio"]:
            return place_on_canvas(canvas, canvas)
        if settings["do_pad"]:
            return place_on_canvas(contain_size(image, canvas), canvas, centered)
        return place_unpadded(image, canvas, settings["patch_size"], settings["do_upscale"])


class ImageEncoderViTImageProcessorPil(ImageEncoderViTViews, PilBackend):
    __doc__ = ImageEncoderViTViews.__doc__

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> Image.Image:
        """One image in any accepted form as an upright RGB image; see `to_rgb`."""
        return to_rgb(image, do_convert_rgb, input_data_format)

    def _preprocess(
        self,
        images: list[Image.Image],
        *,
        resample: PILImageResampling | int,
        padding_color: Sequence[int] | str,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        return_tensors: str | TensorType | None,
        **settings: Any,
    ) -> BatchFeature:
        original_sizes = [(image.height, image.width) for image in images]
        placements = [self._place(original, settings) for original in original_sizes]
        values = value_table(do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        batch = Batch(placements, values, padding_color, stack=return_tensors is not None)
        for index, (image, placement) in enumerate(zip(images, placements, strict=True)):
            resized_height, resized_width = placement.resized
            if image.size != (resized_width, resized_height):
                image = image.resize((resized_width, resized_height), resample=resample)
            batch.fill(index, np.asarray(image))
        return BatchFeature(batch.outputs(original_sizes), tensor_type=return_tensors)


class ImageEncoderViTImageProcessor(ImageEncoderViTViews, TorchvisionBackend):
    __doc__ = ImageEncoderViTViews.__doc__

    def __init__(self, **kwargs: Any) -> None:
        if not is_torchvision_available():
            raise ImportError(
                "ImageEncoderViTImageProcessor needs torchvision. Install it, or use ImageEncoderViTImageProcessorPil."
            )
        super().__init__(**kwargs)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One image in any accepted form as uint8 RGB (3, height, width) on `device`; see `to_rgb`."""
        if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3:
            pixels = image  # Ready, perhaps on an accelerator: no way through the host.
            check_image_size((image.shape[1], image.shape[2]))
        else:
            pixels = torch.from_numpy(np.array(to_rgb(image, do_convert_rgb, input_data_format))).permute(2, 0, 1)
        return pixels.to(device) if device is not None else pixels

    def _preprocess(
        self,
        images: list[torch.Tensor],
        *,
        resample: Any,
        padding_color: Sequence[int] | str,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        return_tensors: str | TensorType | None,
        **settings: Any,
    ) -> BatchFeature:
        original_sizes = [(image.shape[1], image.shape[2]) for image in images]
        placements = [self._place(original, settings) for original in original_sizes]
        values = value_table(do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        padding = torch.from_numpy(padding_values(padding_color, values))
        canvases = []
        for image, original, placement in zip(images, original_sizes, placements, strict=True):
            if placement.resized != original:
                target = SizeDict(height=placement.resized[0], width=placement.resized[1])
                image = self.resize(image, target, resample=resample)
            image = self.rescale_and_normalize(
                image.to(torch.float32), do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
            canvases.append(paste(image, placement.canvas, placement.offset, padding))

        data: dict[str, Any] = {}
        common = common_canvas(placements)
        if return_tensors is not None and any(placement.canvas != common for placement in placements):
            canvases = [paste(canvas, common, (0, 0), padding) for canvas in canvases]
            data["pixel_mask"] = pixel_masks(placements, common)
        data["pixel_values"] = torch.stack(canvases) if return_tensors is not None else canvases
        data.update(sizes_and_regions(original_sizes, placements))
        return BatchFeature(data, tensor_type=return_tensors)


class Batch:
    """
    The float32 canvases of a batch, filled image by image so that nothing is copied twice: one array (B, 3, height,
    width) when `stack`, else a list of arrays (3, height, width).
    """

    def __init__(
        self, placements: list[Placement], values: np.ndarray, padding_color: Sequence[int] | str, stack: bool
    ) -> None:
        self.placements = placements
        self.values = values
        padding = padding_values(padding_color, values)[:, None, None]
        self.common = common_canvas(placements)
        self.is_mixed = stack and any(placement.canvas != self.common for placement in placements)
        self.canvases: np.ndarray | list[np.ndarray]
        if stack:
            self.canvases = np.empty((len(placements), 3, *self.common), dtype=np.float32)
        else:
            self.canvases = [np.empty((3, *placement.canvas), dtype=np.float32) for placement in placements]
        for canvas, placement in zip(self.canvases, placements, strict=True):
            if placement.resized != canvas.shape[1:]:
                canvas[:] = padding

    def fill(self, index: int, pixels: np.ndarray) -> None:
        """Writes the resized image (height, width, 3), uint8, to its place on canvas `index`."""
        top, left, height, width = self.placements[index].valid_region
        canvas = self.canvases[index]
        for channel in range(3):
            canvas[channel, top : top + height, left : left + width] = self.values[channel].take(pixels[..., channel])

    def outputs(self, original_sizes: list[Size]) -> dict[str, Any]:
        """The processor's outputs by name."""
        data: dict[str, Any] = {"pixel_values": self.canvases}
        if self.is_mixed:
            data["pixel_mask"] = pixel_masks(self.placements, self.common)
        return data | sizes_and_regions(original_sizes, self.placements)


def common_canvas(placements: list[Placement]) -> Size:
    """The smallest size that every canvas fits into."""
    return max(p.canvas[0] for p in placements), max(p.canvas[1] for p in placements)


def pixel_masks(placements: list[Placement], canvas: Size) -> np.ndarray:
    """Masks (B, height, width), int64: 1 where canvas shows the image, 0 on padding."""
    masks = np.zeros((len(placements), *canvas), dtype=np.int64)
    for mask, placement in zip(masks, placements, strict=True):
        top, left, height, width = placement.valid_region
        mask[top : top + height, left : left + width] = 1
    return masks


def sizes_and_regions(original_sizes: list[Size], placements: list[Placement]) -> dict[str, Any]:
    """`original_sizes` (B, 2) and `valid_regions` (B, 4), int64."""
    return {
        "original_sizes": np.array(original_sizes, dtype=np.int64),
        "valid_regions": np.array([placement.valid_region for placement in placements], dtype=np.int64),
    }


def paste(image: torch.Tensor, canvas: Size, offset: tuple[int, int], padding: torch.Tensor) -> torch.Tensor:
    """Lays the image (3, height, width) on a canvas of `padding` (3,), its top left corner at `offset` (top, left)."""
    if tuple(image.shape[1:]) == canvas:
        return image
    pasted = padding.to(image)[:, None, None].repeat(1, *canvas)
    top, left = offset
    pasted[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return pasted


def place_as_it_is(image: Size, canvas: Size, centered: bool) -> Placement:
    """
    The image on the canvas without resizing.

    Raises:
        ValueError: If the image is larger than the canvas.
    """
    if image[0] > canvas[0] or image[1] > canvas[1]:
        raise ValueError(
            f"An image of {image[0]} x {image[1]} px does not fit on the canvas of {canvas[0]} x {canvas[1]} px: "
            "leave do_resize on, or give a larger size."
        )
    return place_on_canvas(image, canvas, centered)


def canvas_size(size: SizeDict) -> Size:
    """
    Height and width in px that `size` stands for: its own, or a square of its longest edge.

    Raises:
        ValueError: For a size given in any other way.
    """
    if size.height and size.width:
        canvas = size.height, size.width
    elif size.longest_edge and not size.shortest_edge:
        canvas = size.longest_edge, size.longest_edge
    else:
        raise ValueError(f"size must be an int, {{'height', 'width'}} or {{'longest_edge'}} in px, got {dict(size)}.")
    if min(canvas) < 1:
        raise ValueError(f"size must be at least 1 px on each side, got {dict(size)}.")
    return canvas


def value_table(
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: float | Sequence[float],
    image_std: float | Sequence[float],
) -> np.ndarray:
    """
    What each of the 256 values of a channel becomes: (3, 256), float32, computed in float32 and in the order that
    torchvision's ToTensor and Normalize use, so that the results are theirs to the last bit.
    """
    values = np.arange(256, dtype=np.float32)
    if do_rescale:
        # 1/255 is no binary fraction: x * (1/255) and x / 255 differ in the last bit for some x.
        values = values / np.float32(1.0 / rescale_factor)
    table = np.repeat(values[None], 3, axis=0)
    if do_normalize:
        mean, std = (np.broadcast_to(np.asarray(v, dtype=np.float32), (3,))[:, None] for v in (image_mean, image_std))
        table = (table - mean) / std
    return table


def padding_values(padding_color: Sequence[int] | str, values: np.ndarray) -> np.ndarray:
    """What the padding colour becomes by the table `values` (3, 256): (3,), float32; zeros for "mean"."""
    if isinstance(padding_color, str):
        return np.zeros(3, dtype=np.float32)
    return values[np.arange(3), np.asarray(padding_color)]


def open_image(source: str | os.PathLike[str]) -> Image.Image:
    """
    Opens an image file, or a URL or base64 string as transformers does, completely decoded; of a file with several
    pages, the first.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no image, is damaged or is too large to decode, naming the file and the reason.
    """
    path = os.fspath(source)
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:image/")):
        return load_image(source)
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise FileNotFoundError(f"No image file at {path!r}.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read {path!r} as an image: {error}") from error


def flatten_images(images: Any) -> list[Any]:
    """A flat list of single images from one image, a batch array with four dimensions, or lists of any depth."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flatten_images(entry)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def to_rgb(
    image: Any, do_convert_rgb: bool | None = True, input_data_format: str | ChannelDimension | None = None
) -> Image.Image:
    """
    One image as an upright 8-bit RGB image.

    - A PIL image is turned upright by its EXIF orientation. Grey, palette and CMYK are converted as PIL converts
      them; an alpha channel is dropped, as in DeepSeek-OCR's own loading and in transformers' pipelines. 16-bit grey
      is scaled to 8 bits.
    - An array or tensor may be (height, width), or have 1, 3 or 4 channels first or last. Integers are 0 to 255
      (uint16: 0 to 65535), booleans black and white. Floats are 0 to 1, or 0 to 255 if any value exceeds 1.

    Raises:
        ValueError: For another shape, an image without pixels, or values out of range; with the value seen.
        TypeError: For anything that is no image.
    """
    if isinstance(image, Image.Image):
        check_image_size((image.height, image.width))
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # Without the check every scan would be copied.
            image = ImageOps.exif_transpose(image)
        if image.mode in PIL_16_BIT_MODES or image.mode in ("I", "F"):
            image = Image.fromarray(to_8_bit(np.asarray(image)))
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else image
        image = Image.fromarray(to_8_bit(to_channels_last(array, input_data_format)))
    else:
        raise TypeError(f"Expected an image (PIL, NumPy, PyTorch), a path or a URL, got {type(image).__name__}.")
    if image.mode == "RGB":
        return image
    if not do_convert_rgb:
        raise ValueError(f"The encoder needs RGB images, got mode {image.mode!r}: leave do_convert_rgb on.")
    return image.convert("RGB")


def to_channels_last(array: np.ndarray, input_data_format: str | ChannelDimension | None) -> np.ndarray:
    """Brings (H, W), (C, H, W) or (H, W, C) to (H, W) or (H, W, 3 or 4); asks `input_data_format` where it is given."""
    if array.ndim == 2:
        check_image_size(array.shape)
        return array
    channels = (1, 3, 4)
    if array.ndim != 3 or not (array.shape[0] in channels or array.shape[2] in channels):
        raise ValueError(
            f"An image array is (height, width), or has 1, 3 or 4 channels first or last, got shape {array.shape}."
        )
    if input_data_format is not None:
        first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
    else:
        first = array.shape[0] in channels
    if first:
        array = np.moveaxis(array, 0, 2)
    if array.shape[2] not in channels:
        raise ValueError(f"Expected 1, 3 or 4 channels by input_data_format={input_data_format}, got {array.shape[2]}.")
    check_image_size(array.shape[:2])
    return array[..., 0] if array.shape[2] == 1 else array


def to_8_bit(array: np.ndarray) -> np.ndarray:
    """Pixel values of any dtype as uint8, by the rules of `to_rgb`."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    lowest, highest = array.min(), array.max()
    is_float = np.issubdtype(array.dtype, np.floating)
    if is_float and lowest >= 0 and highest <= 1:
        return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    if not is_float and lowest >= 0 and (array.dtype == np.uint16 or 255 < highest <= 65535):
        return np.rint(array / 257).astype(np.uint8)  # 65535 = 255 * 257
    if lowest >= 0 and highest <= 255:
        return np.rint(array).astype(np.uint8)
    raise ValueError(
        f"Pixel values must be 0 to 255 (uint16: 0 to 65535, floats also 0 to 1), got {lowest} to {highest} as "
        f"{array.dtype}. Are they normalised already?"
    )


def check_image_size(size: tuple[int, ...]) -> None:
    """Raises a ValueError for an image of (height, width) px that has no pixels."""
    if min(size) < 1:
        raise ValueError(f"An image must have pixels, got {size[0]} x {size[1]} px (height x width).")


__all__ = ["ImageEncoderViTImageProcessor", "ImageEncoderViTImageProcessorPil"]
