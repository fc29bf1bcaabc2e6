"""
Images with one label each, from any data set that Hugging Face's `datasets` loads: a folder with a subfolder of images
for each class, a folder of Parquet files, what `save_to_disk` wrote, a data set on the Hub.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..image_reading import open_image, to_rgb
from ..support import import_extra, visible

SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")
EVAL_SPLITS = ("validation", "test")  # Taken for the evaluation where none is named.


class LabelledImages(Dataset[dict[str, Any]]):
    """
    Images, decoded and prepared when asked for, and the numbers of their classes.

    `rows` holds images that are not decoded yet, {"path", "bytes"} each, in `column`; `processor` makes the pixels,
    all of one size.
    """

    def __init__(self, rows: Any, column: str, labels: Sequence[int], processor: Any) -> None:
        self.rows = rows
        self.column = column
        self.labels = labels
        self.processor = processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        `pixel_values` (3, height in px, width in px) and `labels`, the number of the class.

        Raises:
            ValueError: If the image cannot be decoded, naming it.
        """
        page = to_rgb(self._open(index))
        pixels = self.processor(page, do_pad=True, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": torch.tensor(self.labels[index])}

    def check_headers(self) -> None:
        """
        Finds files that are no images before hours of training; damage further inside shows when they are decoded.

        Raises:
            ValueError: Naming the first of them.
        """
        for index in range(len(self)):
            entry = self.rows[index][self.column]
            source = io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"]
            try:
                with Image.open(source):
                    pass
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"Cannot read {self._name(index)} as an image: {error}") from None

    def _open(self, index: int) -> Image.Image:
        entry = self.rows[index][self.column]
        if entry["bytes"] is None:
            return open_image(entry["path"])
        try:
            with Image.open(io.BytesIO(entry["bytes"])) as image:
                image.load()
                return image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"Cannot read {self._name(index)} as an image: {error}") from error

    def _name(self, index: int) -> str:
        path = self.rows[index][self.column]["path"]
        return repr(visible(path)) if path else f"image {index}"


class Splits(NamedTuple):
    """What is trained on and evaluated, and the names of the classes in the order of their numbers."""

    train: LabelledImages
    evaluation: LabelledImages | None
    classes: list[str]

    def digest(self) -> str:
        """A digest of which images with which labels there are, as far as that is known without decoding them."""
        content: list[Any] = [self.classes]
        for split in (self.train, self.evaluation):
            if split is not None:
                content.append([split.rows.split and str(split.rows.split), list(split.labels), *_paths(split)])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _paths(split: LabelledImages) -> list[str]:
    """Names of the files; none where the images lie within a table, whose bytes would all have to be read."""
    first = split.rows[0][split.column]
    if first["bytes"] is not None:
        return []
    return [os.path.basename(split.rows[index][split.column]["path"]) for index in range(len(split))]


def load_splits(
    source: str,
    processor: Any,
    *,
    train_split: str = "train",
    eval_split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    seed: int = 0,
) -> Splits:
    """
    The images to train on and those to evaluate on.

    Args:
        source: A folder, or a data set on the Hub.
        processor: Makes the pixels.
        train_split: Name of the split to train on.
        eval_split: Name of the split to evaluate on; or the share of the training split that is held out for it, such
            as "0.2", of each class alike; or "none". By default "validation" or "test", where there is one.
        image_column: Column of the images.
        label_column: Column of their classes: numbers with names, numbers, or names.
        seed: Chooses what is held out.

    Raises:
        ImportError: If `datasets` is not installed.
        OSError: If there is no such data set.
        ValueError: If it has no such splits or columns, less than two classes, or files that are no images.
    """
    with _no_progress_bars():
        splits = _load(source)
    train = _split(splits, train_split, source)
    share = _share(eval_split)
    if share is not None:
        train, held_out = _hold_out(train, label_column, share, seed, source)
    elif eval_split == "none":
        held_out = None
    elif eval_split is not None:
        held_out = _split(splits, eval_split, source)
    else:
        found = [name for name in EVAL_SPLITS if name in splits and name != train_split]
        held_out = splits[found[0]] if found else None
    classes = _classes(train, label_column, source)
    parts = [
        None if rows is None else _labelled(rows, image_column, label_column, classes, processor, source)
        for rows in (train, held_out)
    ]
    assert parts[0] is not None
    return Splits(parts[0], parts[1], classes)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without the bars of `datasets`, which are afterwards shown as before."""
    datasets = import_extra("datasets", "finetune")
    had_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def _load(source: str) -> dict[str, Any]:
    """The splits of a data set by name."""
    datasets = import_extra("datasets", "finetune")
    folder = Path(source)
    if any((folder / name).is_file() for name in SAVED_BY_DATASETS):
        loaded = datasets.load_from_disk(source)
    else:
        try:
            loaded = datasets.load_dataset(source)
        except datasets.exceptions.DatasetNotFoundError:
            raise FileNotFoundError(f"No folder of images and no data set on the Hub at {source!r}.") from None
        except (datasets.exceptions.DatasetGenerationError, datasets.exceptions.DataFilesNotFoundError) as error:
            raise ValueError(f"Cannot read the data set at {source!r}: {error.__cause__ or error}") from None
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _split(splits: dict[str, Any], name: str, source: str) -> Any:
    if name not in splits:
        raise ValueError(f"{source!r} has no split {name!r}: it has {', '.join(map(repr, splits))}.")
    return splits[name]


def _share(eval_split: str | None) -> float | None:
    try:
        share = float(eval_split or "")
    except ValueError:
        return None
    if not 0 < share < 1:
        raise ValueError(f"A share to hold out for the evaluation must be between 0 and 1, got {eval_split}.")
    return share


def _hold_out(rows: Any, label_column: str, share: float, seed: int, source: str) -> tuple[Any, Any]:
    """Splits off a share of each class, at least one image of it and never all."""
    by_label: dict[str, list[int]] = {}
    for index, name in enumerate(_names(rows, label_column, source)):
        by_label.setdefault(name, []).append(index)
    generator = torch.Generator().manual_seed(seed)
    held_out: set[int] = set()
    for name, indices in sorted(by_label.items()):
        if len(indices) < 2:
            raise ValueError(f"The class {name!r} of {source!r} has one image: none can be held out of it.")
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        order = torch.randperm(len(indices), generator=generator).tolist()
        held_out |= {indices[place] for place in order[:count]}
    kept = [index for index in range(len(rows)) if index not in held_out]
    return rows.select(kept), rows.select(sorted(held_out))


def _names(rows: Any, column: str, source: str) -> list[str]:
    """The label of each row as a name."""
    if column not in rows.column_names:
        raise ValueError(
            f"{source!r} has no column {column!r} of labels: it has {', '.join(map(repr, rows.column_names))}. "
            "A folder of images needs at least two subfolders, one for each class, with images in them."
        )
    values = rows[column][:] if len(rows) else []
    feature = rows.features[column]
    for index, value in enumerate(values):
        if not isinstance(value, (int, str)) or (hasattr(feature, "names") and int(value) < 0):
            raise ValueError(
                f"Row {index} of {source!r} has {value!r} in the column {column!r}: a label is a name or a number."
            )
    return [feature.int2str(value) if hasattr(feature, "int2str") else str(value) for value in values]


def _classes(rows: Any, column: str, source: str) -> list[str]:
    names = _names(rows, column, source)
    feature = rows.features[column]
    classes = list(feature.names) if hasattr(feature, "names") else sorted(set(names))
    if len(set(names)) < 2:
        raise ValueError(
            f"{source!r} has {len(set(names))} class(es) to train on, {sorted(set(names))}: two are needed."
        )
    return classes


def _labelled(
    rows: Any, image_column: str, label_column: str, classes: list[str], processor: Any, source: str
) -> LabelledImages:
    datasets = import_extra("datasets", "finetune")
    if not isinstance(rows.features.get(image_column), datasets.Image):
        raise ValueError(
            f"{source!r} has no column {image_column!r} of images: it has {', '.join(map(repr, rows.column_names))}."
        )
    names = _names(rows, label_column, source)
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise ValueError(f"The evaluation split of {source!r} has labels that the training split lacks: {unknown}.")
    numbers = {name: number for number, name in enumerate(classes)}
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    images = LabelledImages(rows, image_column, [numbers[name] for name in names], processor)
    images.check_headers()
    return images
