"""Writes the encoder's weights under another family's names, so that they go back into the model they came from."""

from pathlib import Path

from ..storage.atomic_file import atomic_file
from .files import LocalTensors, select_checkpoint
from .layouts import export_names, find_deep_layout, find_layout
from .model_folder import WEIGHTS_FILE, write_weights
from .model_kinds import DEEP_ENCODER, kind_of, read_config


def open_model_weights(model_dir: Path) -> LocalTensors:
    """
    The weights of a folder that `save_pretrained` or `pull` wrote.

    Raises:
        ValueError: If it has none.
    """
    names = [path.name for path in model_dir.iterdir() if path.suffix == ".safetensors"]
    select_checkpoint(names, WEIGHTS_FILE, repr(model_dir.name))
    return LocalTensors.open([model_dir / WEIGHTS_FILE])


def export_weights(model_dir: str | Path, output_file: str | Path, layout: str) -> dict[str, str]:
    """
    Writes the weights of a model folder to a safetensors file in another layout, "deepseek-ocr", "sam" or
    "transformers" (see `layouts.export_names`), bit by bit the same; returns each published name's name in
    the file. The file is complete or not there.

    Raises:
        ValueError: If the layout cannot hold this encoder, or the folder does not hold one.
        FileExistsError: If the file exists.
    """
    output = Path(output_file)
    if output.exists():
        raise FileExistsError(f"{str(output)!r} exists already: remove it, or choose another name.")
    config = read_config(Path(model_dir))
    tensors = open_model_weights(Path(model_dir))
    names = export_names(config, layout)
    kind = kind_of(config)
    missing = sorted(kind.weight_prefix + name for name in names if kind.weight_prefix + name not in tensors.shapes)
    if missing:
        raise ValueError(f"{str(model_dir)!r} lacks weights of its configuration: {', '.join(missing[:8])}.")
    published = {theirs: ours for ours, theirs in names.items()}
    dtypes = {tensors.dtype(kind.weight_prefix + name) for name in names}
    if len(dtypes) != 1:
        raise ValueError(f"The weights have several dtypes, {sorted(map(str, dtypes))}: save the model in one.")
    with atomic_file(output) as partial:
        write_weights(
            partial,
            {theirs: tensors.shapes[kind.weight_prefix + ours] for theirs, ours in published.items()},
            lambda theirs: tensors.read(kind.weight_prefix + published[theirs]),
            dtypes.pop(),
        )
        find = find_deep_layout if kind == DEEP_ENCODER else find_layout
        found = find(LocalTensors.open([partial]).shapes, source_config=config.to_dict())
        if found.sources != names:
            raise AssertionError(f"the layout {layout!r} is not found again in what was written")
    return names
