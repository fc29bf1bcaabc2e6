"""
Image processors of the encoder, one for each backend of transformers.

`ImageEncoderViTImageProcessorPil` is bit-exact with PIL, the reference of every OCR model that uses this encoder.
`ImageEncoderViTImageProcessor` needs torchvision, gives the same sizes and offsets, and resizes on any device; its
pixels differ slightly from PIL's.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, is_torchvision_available

from .feature_maps import ImageFeatureMaps, batch_feature_maps
from .image_geometry import (
    Placement,
    Size,
    choose_tile_grid,
    contain_size,
    longest_side_size,
    place_on_canvas,
    place_unpadded,
)
from .image_presets import preset_name, preset_settings
from .image_reading import ImageTypeError, RgbImage, check_image_size, is_channels_first, open_image, to_rgb_image

T = TypeVar("T")
R = TypeVar("R")
PADDING_POSITIONS = ("center", "bottom_right")


class ImageEncoderViTImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    Arguments beyond those of transformers' processors.

    Args:
        patch_size: Sides are multiples of this many px: `size` has to be one, and with `do_pad=False` they become so.
        do_upscale: With `do_pad=False`, whether images smaller than `size` are enlarged to it.
        keep_aspect_ratio: Whether images keep their aspect ratio; GOT-OCR2 stretches them to `size`.
        padding_position: "center" as DeepSeek-OCR, or "bottom_right" of the image as SAM, whose rounding goes with it.
        padding_color: RGB colour of the padding, 0 to 255; or "mean" for padding that is 0 after normalising, as SAM.
        tile_size: Side in px of the tiles that an image larger than one is cut into besides; None for no tiles.
        min_tiles: Fewest tiles of an image that is cut.
        max_tiles: Most tiles of an image.
    """

    patch_size: int
    do_upscale: bool
    keep_aspect_ratio: bool
    padding_position: str
    padding_color: list[int] | tuple[int, ...] | str
    tile_size: int | None
    min_tiles: int
    max_tiles: int


class ImageEncoderViTViews(BaseImageProcessor):
    """
    What both backends share: the settings, where each image is placed, and the batch that comes out.

    With `do_pad=True` (the default) each image is resized to fit `size` at its own aspect ratio and centred on a
    canvas of that size, as `PIL.ImageOps.pad` does. With `do_pad=False` it keeps its aspect ratio without padding:
    its longest side is at most that of `size`, its sides are multiples of the patch size, and it is not enlarged
    unless `do_upscale=True`. `size` may be `{"height": ..., "width": ...}`, `{"longest_edge": ...}` or an int, in px.

    With `tile_size`, an image with a side longer than that is also stretched to a grid of tiles and cut into them, row
    by row: DeepSeek-OCR's "Gundam" mode. The grid is the nearest in aspect ratio with `min_tiles` to `max_tiles` tiles.

    `preset` names a set of all these settings, as in `from_preset`; others given with it override it. It is taken by
    the constructor, by `from_pretrained` and by a call.

    The output holds, for B images:

    - `pixel_values` (B, 3, height, width), float32. Images of different sizes (`do_pad=False`) are padded at the
      bottom and right when tensors are asked for, and stay a list otherwise.
    - `pixel_mask` (B, height, width), only for such a batch: 1 for the image, 0 for the padding.
    - `original_sizes` (B, 2): height and width in px of what was given, upright by its EXIF orientation.
    - `valid_regions` (B, 4): top, left, height and width in px of the image on its canvas. `cell_to_pixels` maps a
      feature cell back to the original image with these two.
    - `pixel_values_local` (N, 3, tile_size, tile_size), only with `tile_size`: the N tiles of all images in order.
    - `tile_grids` (B, 2), only with `tile_size`: rows and columns of each image's tiles; 0 and 0 where it has none.

    Example:
        >>> page = np.full((300, 200, 3), 255, dtype=np.uint8)
        >>> inputs = ImageEncoderViTImageProcessorPil(size=512)(page, return_tensors="pt")
        >>> inputs.pixel_values.shape, inputs.valid_regions.tolist()  # centred, as wide as its aspect ratio
        (torch.Size([1, 3, 512, 512]), [[0, 86, 512, 341]])
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
    tile_size = None
    min_tiles = 2
    max_tiles = 6

    def __init__(self, preset: str | None = None, **kwargs: Unpack[ImageEncoderViTImageProcessorKwargs]) -> None:
        if preset is not None:
            kwargs = preset_settings(preset) | kwargs
        # transformers keeps keywords it does not know as attributes, so a misspelt one would change nothing.
        known = self.valid_kwargs.__annotations__
        for keyword in kwargs.keys() - known.keys():
            if closest := difflib.get_close_matches(keyword, known, n=1, cutoff=0.8):
                raise ValueError(f"{type(self).__name__} has no setting {keyword!r}. Did you mean {closest[0]!r}?")
        super().__init__(**kwargs)

    @classmethod
    def from_preset(cls, preset: str, **settings: Unpack[ImageEncoderViTImageProcessorKwargs]) -> Any:
        """
        A processor with the settings of that name: "tiny", "small", "base", "large", "gundam", "unlimited-ocr",
        "deepseek-ocr-2", "sam" or "got-ocr2". `settings` override single ones.

        Raises:
            ValueError: For another name.
        """
        return cls(preset=preset, **settings)

    @property
    def preset(self) -> str | None:
        """The preset that the settings are those of, None if they are no preset's."""
        return preset_name(super().to_dict())

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A processor of stored settings. The preset that they name gives those that they lack; one given here, all."""
        stored = dict(image_processor_dict)
        if (name := stored.pop("preset", None)) is not None:
            stored = preset_settings(name) | stored
        if (name := kwargs.pop("preset", None)) is not None:
            stored |= preset_settings(name)
        return super().from_dict(stored, **kwargs)

    def preprocess(self, images: ImageInput, *args: Any, preset: str | None = None, **kwargs: Any) -> BatchFeature:
        """The batch of these images, with the settings given here in place of the processor's own."""
        if preset is not None:
            kwargs = preset_settings(preset) | kwargs
        return super().preprocess(images, *args, **kwargs)

    def post_process_feature_maps(self, outputs: Any, inputs: Any, *, stride: int = 64) -> list[ImageFeatureMaps]:
        """
        The feature maps of each image without padding, of the whole view and of its tiles, whose cells can be traced to
        px of the original image and back.

        Args:
            outputs: The model's output, with `last_hidden_state` and, for tiles, `local_feature_maps`.
            inputs: What this processor gave to the model, as tensors.
            stride: Side in px of the image area that one cell stands for, `model.encoder.stride`.

        Raises:
            ValueError: If outputs and inputs are not of the same images, or the stride is another.
        """
        return batch_feature_maps(outputs, inputs, stride)

    def to_dict(self) -> dict[str, Any]:
        """The settings as written to preprocessor_config.json, with the code of both backends named for the Hub."""
        settings = super().to_dict()
        if (name := preset_name(settings)) is not None:
            settings["preset"] = name
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

    def _prepare_image_like_inputs(self, images: ImageInput, *args: Any, **kwargs: Any) -> list[Any]:
        """
        Every image of lists of any depth as `process_image` gives it.

        Raises:
            ValueError, FileNotFoundError: For an image that cannot be used, naming its file or its index.
        """
        entries = flatten_images(images)
        if not entries:
            raise ValueError("No image given: the list of images is empty.")
        # One image may be there twice; files that PIL decodes on first use allow one thread.
        first_of = {id(entry): index for index, entry in reversed(list(enumerate(entries)))}

        def prepare(index: int) -> Any:
            return of_image(index, self.process_image, entries[index], *args, **kwargs)

        distinct = list(first_of.values())
        prepared = dict(zip(distinct, in_threads(prepare, distinct), strict=True))
        return [prepared[first_of[id(entry)]] for entry in entries]

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
        height, width = canvas_size(kwargs["size"])
        patch = kwargs["patch_size"]
        if kwargs["do_pad"] and (height % patch or width % patch):
            nearest = [max(patch, round(side / patch) * patch) for side in (height, width)]
            raise ValueError(
                f"size must be a multiple of patch_size={patch} px on each side, got {height} x {width}: "
                f"{nearest[0]} x {nearest[1]} is near."
            )
        if kwargs["tile_size"] is not None:
            check_tiling(**{name: kwargs[name] for name in ("tile_size", "min_tiles", "max_tiles", "patch_size")})
            if not kwargs["do_resize"]:
                raise ValueError("An image is resized to its tiles: leave do_resize on, or set tile_size=None.")

    def _preprocess(
        self, images: list[Any], *, return_tensors: str | TensorType | None, **settings: Any
    ) -> BatchFeature:
        batch = Batch(
            [pixels_size(image) for image in images],
            [image.is_unit for image in images],
            settings,
            stack=return_tensors is not None,
        )
        pixels = self._batch_pixels([image.image for image in images], batch)
        return BatchFeature(pixels | batch.outputs(), tensor_type=return_tensors)

    def _batch_pixels(self, images: list[Any], batch: "Batch") -> dict[str, Any]:
        """`pixel_values` and, with tiles, `pixel_values_local` of the images on the places that `batch` tells."""
        raise NotImplementedError


class ImageEncoderViTImageProcessorPil(ImageEncoderViTViews, PilBackend):
    __doc__ = ImageEncoderViTViews.__doc__

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> RgbImage:
        """One image in any accepted form as an upright RGB image; see `to_rgb`."""
        rgb = to_rgb_image(image, do_convert_rgb, input_data_format)
        rgb.image.load()
        return rgb

    def _batch_pixels(self, images: list[Image.Image], batch: "Batch") -> dict[str, Any]:
        # Filled image by image, so that nothing is copied twice.
        canvases, tiles = batch.new_canvases(), batch.new_tiles()

        def fill(index: int) -> None:
            image, placement, values = images[index], batch.placements[index], batch.values(index)
            canvas = canvases[index]
            if placement.resized != canvas.shape[1:]:
                canvas[:] = batch.padding(index)[:, None, None]
            top, left, height, width = placement.valid_region
            pixels = resized_pixels(image, placement.resized, batch.resample)
            fill_values(canvas[:, top : top + height, left : left + width], pixels, values)
            if any(batch.grids[index]):
                pixels = resized_pixels(image, batch.tiled_size(index), batch.resample)
                for tile, (rows, columns) in zip(
                    tiles[batch.tiles_of(index)], tile_slices(batch.tiled_size(index), batch.tile_size), strict=True
                ):
                    fill_values(tile, pixels[rows, columns], values)

        in_threads(fill, range(len(images)))
        return batch.pixels(canvases, tiles)


class ImageEncoderViTImageProcessor(ImageEncoderViTViews, TorchvisionBackend):
    __doc__ = ImageEncoderViTViews.__doc__

    def __init__(self, **kwargs: Unpack[ImageEncoderViTImageProcessorKwargs]) -> None:
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
    ) -> "RgbTensor":
        """One image in any accepted form as uint8 RGB (3, height, width) on `device`; see `to_rgb`."""
        is_unit = False
        if is_ready(image, input_data_format):
            pixels = image  # Perhaps on an accelerator: no way through the host.
            check_image_size((image.shape[1], image.shape[2]))
        else:
            rgb, is_unit = to_rgb_image(image, do_convert_rgb, input_data_format)
            pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
        return RgbTensor(pixels.to(device) if device is not None else pixels, is_unit)

    def _batch_pixels(self, images: list[torch.Tensor], batch: "Batch") -> dict[str, Any]:
        def resized_values(index: int, size: Size) -> torch.Tensor:
            image = images[index]
            if tuple(image.shape[1:]) != size:
                image = self.resize(image, SizeDict(height=size[0], width=size[1]), resample=batch.resample)
            return self.rescale_and_normalize(image.to(torch.float32), **batch.arithmetic(index)._asdict())

        canvases, local = [], [images[0].new_empty(0, 3, batch.tile_size, batch.tile_size, dtype=torch.float32)]
        for index, placement in enumerate(batch.placements):
            padding = torch.from_numpy(batch.padding(index))
            pixels = resized_values(index, placement.resized)
            canvases.append(paste(pixels, batch.canvas(index), placement.offset, padding))
            if any(batch.grids[index]):
                local.append(cut_tiles(resized_values(index, batch.tiled_size(index)), batch.tile_size))
        return batch.pixels(torch.stack(canvases) if batch.stack else canvases, torch.cat(local))


class RgbTensor(NamedTuple):
    """An upright image as uint8 RGB (3, height, width), and whether its pixels were given as floats from 0 to 1."""

    image: torch.Tensor
    is_unit: bool


class Arithmetic(NamedTuple):
    """What becomes of pixel values 0 to 255."""

    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | Sequence[float]
    image_std: float | Sequence[float]

    def table(self) -> np.ndarray:
        """
        What each of the 256 values of a channel becomes: (3, 256), float32, computed in float32 and in the order that
        torchvision's ToTensor and Normalize use, so that the results are theirs to the last bit.
        """
        values = np.arange(256, dtype=np.float32)
        if self.do_rescale:
            # 1/255 is no binary fraction: x * (1/255) and x / 255 differ in the last bit for some x.
            values = values / np.float32(1.0 / self.rescale_factor)
        table = np.repeat(values[None], 3, axis=0)
        if self.do_normalize:
            mean, std = (
                np.broadcast_to(np.asarray(value, dtype=np.float32), (3,))[:, None]
                for value in (self.image_mean, self.image_std)
            )
            table = (table - mean) / std
        return table


class Batch:
    """
    Where the images of a batch go, and what becomes of their pixel values.

    Args:
        sizes: Their heights and widths in px.
        are_unit: Whether each was given as floats from 0 to 1; these need no rescaling, so without it they stay so.
        settings: The processor's.
        stack: Whether the outputs are arrays of all images, else lists.

    Raises:
        ValueError: If an image does not fit on its canvas, naming its index.
    """

    def __init__(self, sizes: list[Size], are_unit: list[bool], settings: dict[str, Any], stack: bool) -> None:
        self.sizes, self.are_unit, self.stack = sizes, are_unit, stack
        self.resample = settings["resample"]
        self.padding_color: Sequence[int] | str = settings["padding_color"]
        self.given = Arithmetic(**{name: settings[name] for name in Arithmetic._fields})
        self.placements = [of_image(index, place, size, settings) for index, size in enumerate(sizes)]
        self.common = common_canvas(self.placements)
        self.has_tiles = settings["tile_size"] is not None
        self.tile_size: int = settings["tile_size"] or 0
        tiling = (self.tile_size, settings["min_tiles"], settings["max_tiles"])
        self.grids = [choose_tile_grid(size, *tiling) if self.has_tiles else (0, 0) for size in sizes]
        self.tile_starts = np.cumsum([0] + [rows * columns for rows, columns in self.grids]).tolist()

    def arithmetic(self, index: int) -> Arithmetic:
        """What becomes of the pixel values of an image."""
        return self._unit if self.are_unit[index] and not self.given.do_rescale else self.given

    def values(self, index: int) -> np.ndarray:
        """What each pixel value of an image becomes: (3, 256), float32."""
        return self._tables[self.arithmetic(index) is self._unit]

    def padding(self, index: int) -> np.ndarray:
        """What the padding of an image is: (3,), float32; zeros for "mean"."""
        if isinstance(self.padding_color, str):
            return np.zeros(3, dtype=np.float32)
        padding: np.ndarray = self.values(index)[np.arange(3), np.asarray(self.padding_color)]
        return padding

    def canvas(self, index: int) -> Size:
        """The size in px that an image's pixels have in the output."""
        return self.common if self.stack else self.placements[index].canvas

    def tiled_size(self, index: int) -> Size:
        """The size in px of all tiles of an image together."""
        rows, columns = self.grids[index]
        return rows * self.tile_size, columns * self.tile_size

    def tiles_of(self, index: int) -> slice:
        """Which of all tiles are an image's."""
        return slice(self.tile_starts[index], self.tile_starts[index + 1])

    def new_canvases(self) -> Any:
        """Arrays for the pixel values, (3, height, width) float32 each, not filled."""
        if self.stack:
            return np.empty((len(self.sizes), 3, *self.common), dtype=np.float32)
        return [np.empty((3, *placement.canvas), dtype=np.float32) for placement in self.placements]

    def new_tiles(self) -> np.ndarray:
        """An array for the tiles of all images, (N, 3, tile_size, tile_size) float32, not filled."""
        return np.empty((self.tile_starts[-1], 3, self.tile_size, self.tile_size), dtype=np.float32)

    def pixels(self, canvases: Any, tiles: Any) -> dict[str, Any]:
        """The outputs that hold pixels, by name."""
        if not self.has_tiles:
            return {"pixel_values": canvases}
        return {"pixel_values": canvases, "pixel_values_local": tiles if self.stack else list(tiles)}

    def outputs(self) -> dict[str, Any]:
        """The outputs that tell where pixels are, by name."""
        data = {
            "original_sizes": np.array(self.sizes, dtype=np.int64),
            "valid_regions": np.array([placement.valid_region for placement in self.placements], dtype=np.int64),
        }
        if self.stack and any(placement.canvas != self.common for placement in self.placements):
            data["pixel_mask"] = pixel_masks(self.placements, self.common)
        if self.has_tiles:
            data["tile_grids"] = np.array(self.grids, dtype=np.int64)
        return data

    @cached_property
    def _unit(self) -> Arithmetic:
        return self.given._replace(do_rescale=True, rescale_factor=1 / 255)

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        return self.given.table(), self._unit.table()


def of_image(index: int, function: Callable[..., R], image: Any, *args: Any, **kwargs: Any) -> R:
    """
    What the function makes of the image at `index` of a batch. Whatever is wrong with it is a ValueError that names
    the index, or a FileNotFoundError; errors about files name these already.
    """
    try:
        return function(image, *args, **kwargs)
    except Exception as error:  # PIL decodes what it has opened when its pixels are asked for.
        if isinstance(image, (str, os.PathLike)):
            raise
        kind = ImageTypeError if isinstance(error, ImageTypeError) else ValueError
        raise kind(f"Image {index} of the batch: {str(error) or type(error).__name__}") from error


def flatten_images(images: Any) -> list[Any]:
    """A flat list of single images from one image, a batch array with four dimensions, or lists of any depth."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flatten_images(entry)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def pixels_size(pixels: RgbImage | RgbTensor) -> Size:
    """Height and width in px."""
    if isinstance(pixels, RgbTensor):
        return pixels.image.shape[1], pixels.image.shape[2]
    return pixels.image.height, pixels.image.width


def is_ready(image: Any, input_data_format: str | ChannelDimension | None) -> bool:
    """Whether the image is a uint8 tensor (3, height, width) already."""
    return (
        isinstance(image, torch.Tensor)
        and image.dtype == torch.uint8
        and image.ndim == 3
        and image.shape[0] == 3
        and is_channels_first(tuple(image.shape), input_data_format)
    )


def place(image: Size, settings: dict[str, Any]) -> Placement:
    """Where an image of (height, width) px goes on its canvas by the processor's settings."""
    canvas = canvas_size(settings["size"])
    centered = settings["padding_position"] == "center"
    if not settings["do_resize"]:
        return place_as_it_is(image, canvas if settings["do_pad"] else None, centered, settings["patch_size"])
    if not settings["keep_aspect_ratio"]:
        return place_on_canvas(canvas, canvas)
    if settings["do_pad"]:
        resized = contain_size(image, canvas) if centered else longest_side_size(image, canvas)
        return place_on_canvas(resized, canvas, centered)
    return place_unpadded(image, canvas, settings["patch_size"], settings["do_upscale"])


def tile_slices(size: Size, tile_size: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns in px of each square tile of an image of that size, row by row."""
    height, width = size
    for top in range(0, height, tile_size):
        for left in range(0, width, tile_size):
            yield slice(top, top + tile_size), slice(left, left + tile_size)


def cut_tiles(image: torch.Tensor, tile_size: int) -> torch.Tensor:
    """The tiles (tiles, 3, tile_size, tile_size) of an image (3, height, width), row by row."""
    return torch.stack(
        [image[:, rows, columns] for rows, columns in tile_slices((image.shape[1], image.shape[2]), tile_size)]
    )


def fill_values(target: np.ndarray, pixels: np.ndarray, values: np.ndarray) -> None:
    """Writes what each of the pixels (height, width, 3), uint8, becomes by `values` (3, 256) to (3, height, width)."""
    for channel in range(3):
        target[channel] = values[channel].take(pixels[..., channel])


def resized_pixels(image: Image.Image, size: Size, resample: PILImageResampling | int) -> np.ndarray:
    """The pixels (height, width, 3), uint8, of an image resized by PIL, or as it is where it has that size."""
    height, width = size
    return np.asarray(image if image.size == (width, height) else image.resize((width, height), resample=resample))


def in_threads(function: Callable[[T], R], arguments: Iterable[T]) -> list[R]:
    """
    Calls a function with each argument, in as many threads as PyTorch uses: PIL and NumPy let others run while they
    work. So `torch.set_num_threads` counts here too, and in a DataLoader's worker process it is one thread.
    """
    arguments = list(arguments)
    threads = min(len(arguments), torch.get_num_threads())
    if threads < 2:
        return [function(argument) for argument in arguments]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, arguments))


def check_tiling(tile_size: int, min_tiles: int, max_tiles: int, patch_size: int) -> None:
    """
    Checks the settings of tiles.

    Raises:
        ValueError: If no tile can be cut or encoded with them.
    """
    if tile_size < 1 or tile_size % patch_size:
        raise ValueError(f"tile_size must be a multiple of patch_size={patch_size} px, got {tile_size}.")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"1 <= min_tiles <= max_tiles must hold, got min_tiles={min_tiles}, max_tiles={max_tiles}.")


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


def paste(image: torch.Tensor, canvas: Size, offset: tuple[int, int], padding: torch.Tensor) -> torch.Tensor:
    """Lays the image (3, height, width) on a canvas of `padding` (3,), its top left corner at `offset` (top, left)."""
    if tuple(image.shape[1:]) == canvas:
        return image
    pasted = padding.to(image)[:, None, None].repeat(1, *canvas)
    top, left = offset
    pasted[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return pasted


def place_as_it_is(image: Size, canvas: Size | None, centered: bool, patch_size: int) -> Placement:
    """
    The image without resizing, on the canvas or, with None, alone.

    Raises:
        ValueError: If the image is larger than the canvas, or alone no multiple of patches.
    """
    if canvas is None:
        if image[0] % patch_size or image[1] % patch_size:
            raise ValueError(
                f"{image[0]} x {image[1]} px are no multiples of patch_size={patch_size}: leave do_resize or do_pad on."
            )
        canvas = image
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


__all__ = ["ImageEncoderViTImageProcessor", "ImageEncoderViTImageProcessorPil"]
