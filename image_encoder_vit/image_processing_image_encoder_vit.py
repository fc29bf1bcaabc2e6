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
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling, SizeDict, load_image
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

T = TypeVar("T")
R = TypeVar("R")
PADDING_POSITIONS = ("center", "bottom_right")
PIL_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


class ImageEncoderViTImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    Arguments beyond those of transformers' processors.

    Args:
        patch_size: With `do_pad=False`, sides become multiples of this many px.
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

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list[Any]:
        flat = in_threads(self.fetch_images, flatten_images(images))
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
        if kwargs["tile_size"] is not None:
            check_tiling(**{name: kwargs[name] for name in ("tile_size", "min_tiles", "max_tiles", "patch_size")})
            if not kwargs["do_resize"]:
                raise ValueError("An image is resized to its tiles: leave do_resize on, or set tile_size=None.")

    def _place(self, image: Size, settings: dict[str, Any]) -> Placement:
        canvas = canvas_size(settings["size"])
        centered = settings["padding_position"] == "center"
        if not settings["do_resize"]:
            return place_as_it_is(image, canvas if settings["do_pad"] else image, centered)
        if not settings["keep_aspect_ratio"]:
            return place_on_canvas(canvas, canvas)
        if settings["do_pad"]:
            resized = contain_size(image, canvas) if centered else longest_side_size(image, canvas)
            return place_on_canvas(resized, canvas, centered)
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
        tile_size: int | None,
        min_tiles: int,
        max_tiles: int,
        **settings: Any,
    ) -> BatchFeature:
        original_sizes = [(image.height, image.width) for image in images]
        placements = [self._place(original, settings) for original in original_sizes]
        values = value_table(do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        batch = Batch(placements, values, padding_color, stack=return_tensors is not None)
        tiles = None
        if tile_size is not None:
            grids = [choose_tile_grid(original, tile_size, min_tiles, max_tiles) for original in original_sizes]
            tiles = Tiles(grids, tile_size, values)

        def fill(index: int) -> None:
            image = images[index]
            batch.fill(index, resized_pixels(image, placements[index].resized, resample))
            if tiles is not None and any(tiles.grids[index]):
                tiles.fill(index, resized_pixels(image, tiles.size(index), resample))

        # Images that are decoded on first use, once each: one may be there twice.
        in_threads(Image.Image.load, {id(image): image for image in images}.values())
        in_threads(fill, range(len(images)))
        data = batch.outputs(original_sizes)
        if tiles is not None:
            data |= tiles.outputs(stack=return_tensors is not None)
        return BatchFeature(data, tensor_type=return_tensors)


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
        tile_size: int | None,
        min_tiles: int,
        max_tiles: int,
        **settings: Any,
    ) -> BatchFeature:
        original_sizes = [(image.shape[1], image.shape[2]) for image in images]
        placements = [self._place(original, settings) for original in original_sizes]
        values = value_table(do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        padding = torch.from_numpy(padding_values(padding_color, values))

        def resized_values(image: torch.Tensor, size: Size) -> torch.Tensor:
            if tuple(image.shape[1:]) != size:
                image = self.resize(image, SizeDict(height=size[0], width=size[1]), resample=resample)
            return self.rescale_and_normalize(
                image.to(torch.float32), do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )

        canvases = [
            paste(resized_values(image, placement.resized), placement.canvas, placement.offset, padding)
            for image, placement in zip(images, placements, strict=True)
        ]

        data: dict[str, Any] = {}
        common = common_canvas(placements)
        if return_tensors is not None and any(placement.canvas != common for placement in placements):
            canvases = [paste(canvas, common, (0, 0), padding) for canvas in canvases]
            data["pixel_mask"] = pixel_masks(placements, common)
        data["pixel_values"] = torch.stack(canvases) if return_tensors is not None else canvases
        data.update(sizes_and_regions(original_sizes, placements))
        if tile_size is not None:
            grids = [choose_tile_grid(original, tile_size, min_tiles, max_tiles) for original in original_sizes]
            local = [canvases[0].new_empty(0, 3, tile_size, tile_size)]
            for image, (rows, columns) in zip(images, grids, strict=True):
                if rows:
                    local.append(cut_tiles(resized_values(image, (rows * tile_size, columns * tile_size)), tile_size))
            tiles = torch.cat(local)
            data["pixel_values_local"] = tiles if return_tensors is not None else list(tiles)
            data["tile_grids"] = np.array(grids, dtype=np.int64)
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
        fill_values(self.canvases[index][:, top : top + height, left : left + width], pixels, self.values)

    def outputs(self, original_sizes: list[Size]) -> dict[str, Any]:
        """The processor's outputs by name."""
        data: dict[str, Any] = {"pixel_values": self.canvases}
        if self.is_mixed:
            data["pixel_mask"] = pixel_masks(self.placements, self.common)
        return data | sizes_and_regions(original_sizes, self.placements)


class Tiles:
    """
    The tiles of a batch, (N, 3, tile_size, tile_size), filled image by image. `grids` holds the rows and columns of
    each image's tiles, 0 and 0 for none; `values` what each pixel value becomes.
    """

    def __init__(self, grids: list[Size], tile_size: int, values: np.ndarray) -> None:
        self.grids = grids
        self.tile_size = tile_size
        self.values = values
        self.starts = np.cumsum([0] + [rows * columns for rows, columns in grids]).tolist()
        self.pixels = np.empty((self.starts[-1], 3, tile_size, tile_size), dtype=np.float32)

    def size(self, index: int) -> Size:
        """The size in px of all tiles of image `index` together."""
        rows, columns = self.grids[index]
        return rows * self.tile_size, columns * self.tile_size

    def fill(self, index: int, pixels: np.ndarray) -> None:
        """Cuts the resized image (height, width, 3), uint8, into the tiles of image `index`."""
        tiles = self.pixels[self.starts[index] : self.starts[index + 1]]
        for tile, (rows, columns) in zip(tiles, tile_slices(self.size(index), self.tile_size), strict=True):
            fill_values(tile, pixels[rows, columns], self.values)

    def outputs(self, stack: bool) -> dict[str, Any]:
        """The processor's outputs by name; the tiles are one array when `stack`, else a list."""
        grids = np.array(self.grids, dtype=np.int64)
        return {"pixel_values_local": self.pixels if stack else list(self.pixels), "tile_grids": grids}


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
