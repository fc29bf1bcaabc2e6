"""
A folder that transformers.js loads: the encoder as ONNX files in float32, float16 and with 8-bit weights, what its
processors need to know, and a module for the browser that prepares pages exactly as the image processor here does.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.image_utils import PILImageResampling

from ..modeling_image_encoder_vit import ImageEncoderViTModel
from ..storage.output_folder import discard, publish, unfinished_folder
from ..support import import_extra
from .fixed_size import OUTPUT_NAMES, FixedSizeEncoder
from .onnx_export import CHECKED_BATCHES, SEED, data_file, expected_outputs, export_onnx, relative_error

PAGE_MODULE = "prepare_page.mjs"
# The names that transformers.js gives to its dtypes "fp32", "fp16" and "q8".
ONNX_FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "q8": "model_quantized.onnx"}
JS_CONFIG = {"transformers.js_config": {"dtype": "fp32"}}  # What is loaded where no dtype is asked for.
QUANTIZED_OPERATORS = ["MatMul", "Gemm"]  # 8-bit convolutions are slower than those in float32 on most CPUs.
FILTERS = (PILImageResampling.BILINEAR, PILImageResampling.BICUBIC)


class Variant(NamedTuple):
    """One ONNX file: its size in bytes and its relative error ||onnx - pytorch|| / ||pytorch|| by output."""

    dtype: str
    size_bytes: int
    errors: dict[str, float]


def export_transformers_js(
    model: ImageEncoderViTModel,
    processor: Any,
    output_folder: str | Path,
    size: tuple[int, int],
    source: dict[str, Any] | None = None,
) -> list[Variant]:
    """
    Writes the folder, for pages on a canvas of `size` = (height, width) in px, and returns what it holds. It appears
    complete or not at all; the file in float32 has passed the check of `export_onnx`.

    Raises:
        FileExistsError: If the folder exists.
        ImportError, ValueError, ArithmeticError: As `export_onnx`; ValueError for a processor whose filter is neither
            bilinear nor bicubic, or weights that need a second file.
    """
    output = Path(output_folder)
    settings = page_settings(processor, size)
    with unfinished_folder(output) as folder:
        try:
            discard_contents(folder)
            (folder / "onnx").mkdir()
            full = folder / "onnx" / ONNX_FILES["fp32"]
            export_onnx(model, full, size, source)
            if data_file(full).exists():
                raise ValueError("The weights are too large for transformers.js: they need more than 2 GB.")
            write_float16(full, folder / "onnx" / ONNX_FILES["fp16"])
            write_8_bit(full, folder / "onnx" / ONNX_FILES["q8"])
            variants = measure(folder / "onnx", model, size)
            write_json(folder / "config.json", json.loads(model.config.to_json_string(use_diff=False)) | JS_CONFIG)
            write_json(folder / "preprocessor_config.json", preprocessor_config(settings))
            shutil.copyfile(Path(__file__).with_name(PAGE_MODULE), folder / PAGE_MODULE)
            (folder / "README.md").write_text(readme(model, settings, variants, source), encoding="utf-8")
            publish(folder, output)
        except BaseException:
            discard(folder)
            raise
    return variants


def discard_contents(folder: Path) -> None:
    """Empties what a killed export has left."""
    for path in folder.iterdir():
        discard(path) if path.is_dir() else path.unlink()


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def page_settings(processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """
    What `prepare_page.mjs` needs to know to do as the processor does, on a canvas of `size`.

    Raises:
        ValueError: If the processor's filter is neither bilinear nor bicubic.
    """
    if processor.resample not in FILTERS:
        raise ValueError(f"Pages are resized by the filters 2 (bilinear) or 3 (bicubic), got {processor.resample}.")
    color = processor.padding_color
    return {
        "canvas": {"height": size[0], "width": size[1]},
        "keep_aspect_ratio": bool(processor.keep_aspect_ratio),
        "padding_position": processor.padding_position,
        "padding_color": color if isinstance(color, str) else list(color),
        "resample": int(processor.resample),
        "rescale_factor": processor.rescale_factor,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
    }


def preprocessor_config(settings: dict[str, Any]) -> dict[str, Any]:
    """
    Settings for transformers.js' own processor, which does not know padding around a page: it lays square pages into
    the top left corner, and stretches others to the canvas.
    """
    canvas = settings["canvas"]
    fits = settings["keep_aspect_ratio"] and canvas["height"] == canvas["width"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": canvas["height"]} if fits else canvas,
        "do_pad": fits,
        "pad_size": canvas,
        "do_rescale": True,
        "do_normalize": True,
        **{name: settings[name] for name in ("resample", "rescale_factor", "image_mean", "image_std")},
        "page_settings": settings,
    }


def write_float16(source: Path, target: Path) -> None:
    """The same graph in float16; inputs and outputs stay in float32."""
    onnx, float16 = import_extra("onnx", "export"), import_extra("onnxruntime.transformers.float16", "export")
    with quiet():
        converted = float16.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
    onnx.save(converted, str(target))


def write_8_bit(source: Path, target: Path) -> None:
    """The same graph with the matrices of its linear layers in 8 bits, one scale for each column."""
    quantization = import_extra("onnxruntime.quantization", "export")
    with quiet():
        quantization.quantize_dynamic(
            source,
            target,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=QUANTIZED_OPERATORS,
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what the converters say about values they round and models they would rather have prepared."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@torch.inference_mode()
def measure(folder: Path, model: ImageEncoderViTModel, size: tuple[int, int]) -> list[Variant]:
    """Size and errors of every file, by ONNX Runtime on random pixels."""
    onnxruntime = import_extra("onnxruntime", "export")
    encoder = FixedSizeEncoder(model, size, chunked=True)
    shape = (max(CHECKED_BATCHES), encoder.encoder.in_chans, *size)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(SEED)) * 2 - 1
    expected = expected_outputs(model, encoder, pixels)
    variants = []
    for dtype, name in ONNX_FILES.items():
        session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        actual = session.run(list(OUTPUT_NAMES), {"pixel_values": pixels.numpy()})
        errors = {
            output: relative_error(torch.from_numpy(values), wanted)
            for output, values, wanted in zip(OUTPUT_NAMES, actual, expected, strict=True)
        }
        variants.append(Variant(dtype, (folder / name).stat().st_size, errors))
    return variants


README = """---
library_name: transformers.js
pipeline_tag: image-feature-extraction
---

# An image encoder for pages, for transformers.js

SAM's ViT image encoder, exported from PyTorch{origin}. It takes pages on a canvas of {height} x {width} px and gives
`last_hidden_state` (batch, {channels}, {rows}, {columns}), its mean over the cells as `pooler_output`
(batch, {channels}), and the cells as tokens, `patch_embeds` (batch, {cells}, {channels}).

## With pages prepared as for the original

Processors of transformers.js cannot place a page on its canvas as the model saw it in training, and browsers shrink
images with other filters. `prepare_page.mjs` gives the same numbers as the Python package:

```js
import {{ AutoModel, RawImage, Tensor }} from "@huggingface/transformers";
import {{ preparePage }} from "./prepare_page.mjs";
import config from "./preprocessor_config.json" with {{ type: "json" }};

const model = await AutoModel.from_pretrained("PATH_OR_ID", {{ dtype: "fp32" }});
const page = preparePage(await RawImage.read("page.png"), config.page_settings);
const {{ last_hidden_state }} = await model({{ pixel_values: new Tensor("float32", page.data, page.dims) }});
```

`page.validRegion` is the part of the canvas that shows the page: top, left, height and width in px. One cell of
`last_hidden_state` stands for {stride} x {stride} px.

## In a pipeline

```js
import {{ pipeline, Tensor }} from "@huggingface/transformers";
import {{ pageProcessor }} from "./prepare_page.mjs";
import config from "./preprocessor_config.json" with {{ type: "json" }};

const extract = await pipeline("image-feature-extraction", "PATH_OR_ID", {{ dtype: "q8" }});
extract.processor = pageProcessor(config.page_settings, Tensor);
const features = await extract("page.png");
```

Without the line that sets `extract.processor` it works too, but the page is {approximation}:
these features must not be compared with features from Python.

transformers.js does not know this kind of model, says so when it loads it, and goes on. A folder on the disk is given
by a path that begins with "/" or "./".

## Files

Relative errors ||onnx - pytorch|| / ||pytorch|| of ONNX Runtime on the CPU, for random pixels:

| dtype | file | MB | {outputs} |
|---|---|---:|{rules}|
{table}

In `fp16` inputs and outputs stay in float32. In `q8` the matrices of linear layers have 8 bits, with a scale for each
column, and what they are multiplied with is rounded to 8 bits as it comes.
"""


def readme(
    model: ImageEncoderViTModel, settings: dict[str, Any], variants: list[Variant], source: dict[str, Any] | None
) -> str:
    """The folder's README: how it is used, what it holds, and how exact that is."""
    canvas, stride = settings["canvas"], model.encoder.stride
    rows, columns = -(-canvas["height"] // stride), -(-canvas["width"] // stride)
    lines = [
        f"| `{variant.dtype}` | onnx/{ONNX_FILES[variant.dtype]} | {variant.size_bytes / 1e6:.1f} | "
        + " | ".join(f"{variant.errors[name]:.1e}" for name in OUTPUT_NAMES)
        + " |"
        for variant in variants
    ]
    fits = preprocessor_config(settings)["do_pad"]
    named = (source or {}).get("source")
    return README.format(
        origin=f" (weights: {named}, commit {source.get('commit')})" if source and named else "",
        height=canvas["height"],
        width=canvas["width"],
        channels=[model.config.output_channels, *model.config.downsample_channels][-1],
        rows=rows,
        columns=columns,
        cells=rows * columns,
        stride=stride,
        approximation="in the top left corner and resized differently" if fits else "stretched to the canvas",
        outputs=" | ".join(f"`{name}`" for name in OUTPUT_NAMES),
        rules="---:|" * (len(OUTPUT_NAMES) - 1) + "---:",
        table="\n".join(lines),
    )
