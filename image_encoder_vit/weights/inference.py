"""
The configuration that an encoder's weights belong to, from their shapes by published name. A checkpoint's config.json
is a hint where the shapes leave something open, and where it disagrees with them a sentence says so.
"""

from collections.abc import Iterator, Mapping
from math import inf, nextafter
from typing import Any, NamedTuple

from ..configuration_image_encoder_vit import ImageEncoderViTConfig, checked_config
from .naming import listed

Shape = tuple[int, ...]

NEEDED_RANKS = {
    "patch_embed.proj.weight": 4,
    "neck.0.weight": 4,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.mlp.lin1.weight": 2,
}
USUAL_WINDOW_SIZE = 14
USUAL_HEAD_SIZE = 64
USUAL_IMAGE_SIZE = 1024

# What a source's config.json may say about its encoder, under our names, and what else it may call them.
HINTED_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "window_size",
    "output_channels",
)
HINTED_LISTS = ("global_attn_indexes", "downsample_channels")
ALIASES = ImageEncoderViTConfig.attribute_map | {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
}


class Attention(NamedTuple):
    """Side of the windows in patches, and the blocks that attend over the whole grid instead."""

    window_size: int
    global_attn_indexes: list[int]


def infer_config(
    shapes: Mapping[str, Shape], source_config: Mapping[str, Any]
) -> tuple[ImageEncoderViTConfig, tuple[str, ...]]:
    """
    The configuration that weights of these shapes belong to, and sentences about what the shapes did not settle.

    Raises:
        ValueError: If a weight that is needed is missing, or the shapes belong to no encoder.
    """
    hints = config_hints(source_config)
    missing = [name for name in NEEDED_RANKS if name not in shapes]
    if missing:
        raise ValueError(f"The encoder is incomplete: {listed(missing)} missing.")
    for name, rank in NEEDED_RANKS.items():
        if len(shapes[name]) != rank or 0 in shapes[name]:
            raise ValueError(f"{name} must have {rank} dimensions, none of them 0, got {shapes[name]}.")
    hidden_size, num_channels, patch_size, _ = shapes["patch_embed.proj.weight"]
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    if depth > len(shapes):
        # A file of a few bytes can name block 10 ** 9: names must be plausible before anything is built for them.
        raise ValueError(f"The encoder names block {depth - 1}, but has only {len(shapes)} weights.")
    grid_size = _grid_size(shapes, hints, patch_size)
    attention, attention_notices = _attention(shapes, depth, grid_size, hints)
    num_heads, heads_notices = _num_heads(shapes, hidden_size, hints)
    config = checked_config(
        hidden_size=hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        num_channels=num_channels,
        image_size=grid_size * patch_size,
        patch_size=patch_size,
        mlp_ratio=_exact_ratio(shapes["blocks.0.mlp.lin1.weight"][0], hidden_size),
        output_channels=shapes["neck.0.weight"][0],
        downsample_channels=_downsample_channels(shapes),
        window_size=attention.window_size,
        global_attn_indexes=attention.global_attn_indexes,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        use_abs_pos="pos_embed" in shapes,
        use_rel_pos="blocks.0.attn.rel_pos_h" in shapes,
    )
    return config, (*heads_notices, *attention_notices, *_disagreements(config, hints))


def _grid_size(shapes: Mapping[str, Shape], hints: Mapping[str, Any], patch_size: int) -> int:
    """Patches along a side of the images that the weights were trained for."""
    if "pos_embed" not in shapes:
        return int(hints.get("image_size", USUAL_IMAGE_SIZE)) // patch_size
    shape = shapes["pos_embed"]
    if len(shape) != 4 or shape[0] != 1 or shape[1] != shape[2] or not shape[1]:
        raise ValueError(f"pos_embed must be (1, H, W, C) for a square image, got {shape}.")
    return shape[1]


def _num_heads(shapes: Mapping[str, Shape], hidden_size: int, hints: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    table = shapes.get("blocks.0.attn.rel_pos_h")
    if table is None:
        heads = int(hints.get("num_attention_heads") or max(1, hidden_size // USUAL_HEAD_SIZE))
        return heads, (f"Without relative positions the tensors do not say how many heads there are: taking {heads}.",)
    if len(table) != 2 or not table[1] or hidden_size % table[1]:
        raise ValueError(
            f"rel_pos_h must be (length, hidden_size / heads), got {table} with hidden_size {hidden_size}."
        )
    return hidden_size // table[1], ()


def _attention(
    shapes: Mapping[str, Shape], depth: int, grid_size: int, hints: Mapping[str, Any]
) -> tuple[Attention, tuple[str, ...]]:
    sides = table_sides(shapes, depth)
    told = from_tables(sides, grid_size)
    if told is not None:
        return told, ()
    chosen = from_hints(hints, usual(depth, grid_size if sides else USUAL_WINDOW_SIZE))
    if sides and chosen.window_size != grid_size:
        # Blocks with tables of the grid's length cannot be windowed by anything smaller: all of them are global.
        chosen = chosen._replace(global_attn_indexes=list(range(depth)))
    reason = f"tables as long as the grid of {grid_size} patches in every block" if sides else "no position tables"
    origin = "config.json" if "global_attn_indexes" in hints else "the usual spacing"
    return chosen, (
        f"With {reason}, the tensors do not say which blocks attend globally: taking {chosen.global_attn_indexes} and "
        f"windows of {chosen.window_size} patches from {origin}.",
    )


def table_sides(shapes: Mapping[str, Shape], depth: int) -> dict[int, int]:
    """
    The side in patches that each block's relative position tables, of 2 * side - 1 rows, were made for.

    Raises:
        ValueError: If a block's two tables differ.
    """
    sides = {}
    for index in range(depth):
        tables = [shapes.get(f"blocks.{index}.attn.rel_pos_{axis}", ()) for axis in "hw"]
        if tables[0] and tables[0] != tables[1]:
            raise ValueError(f"The relative position tables of block {index} differ: {tables[0]} and {tables[1]}.")
        if tables[0]:
            sides[index] = (tables[0][0] + 1) // 2
    return sides


def from_tables(sides: Mapping[int, int], grid_size: int) -> Attention | None:
    """What the tables say: a side other than the grid's is the window's. None where all are as long as the grid."""
    windows = {side for side in sides.values() if side != grid_size}
    if len(windows) > 1:
        raise ValueError(
            f"The attention windows differ between blocks: {sorted(windows)} patches, in a grid of {grid_size}."
        )
    if not windows:
        return None
    return Attention(windows.pop(), [index for index, side in sides.items() if side == grid_size])


def from_hints(hints: Mapping[str, Any], otherwise: Attention) -> Attention:
    """What config.json says, and `otherwise` where it says nothing."""
    return Attention(
        int(hints.get("window_size") or otherwise.window_size),
        [int(index) for index in hints.get("global_attn_indexes", otherwise.global_attn_indexes)],
    )


def usual(depth: int, window_size: int) -> Attention:
    """SAM's spacing: the last block of each quarter attends globally."""
    quarters = [depth // 4 * quarter - 1 for quarter in range(1, 5)]
    return Attention(window_size, quarters if depth >= 4 else [depth - 1])


def _exact_ratio(mlp_size: int, hidden_size: int) -> float:
    """The smallest float that makes `int(hidden_size * ratio)` the size of the MLP."""
    ratio = mlp_size / hidden_size
    return ratio if int(hidden_size * ratio) == mlp_size else nextafter(ratio, inf)


def _downsample_channels(shapes: Mapping[str, Shape]) -> list[int]:
    channels: list[int] = []
    while shape := shapes.get(f"net_{len(channels) + 2}.weight"):
        channels.append(shape[0])
    return channels


def config_hints(source_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's config.json says about its encoder, under the names of `ImageEncoderViTConfig`."""
    for section in _encoder_sections(source_config):
        named = {ALIASES.get(key, key): value for key, value in section.items()}
        sizes = {name: named[name] for name in HINTED_SIZES if _is_size(named.get(name))}
        lists = {name: named[name] for name in HINTED_LISTS if isinstance(named.get(name), list)}
        return sizes | {name: values for name, values in lists.items() if all(map(_is_size, values))}
    return {}


def _is_size(value: Any) -> bool:
    """Whether a value of a stranger's JSON can be a size or an index."""
    return type(value) is int and 0 <= value < 1 << 20


def _encoder_sections(source_config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The sections of a config.json that describe a SAM encoder: those that know global attention blocks."""
    pending: list[Any] = [source_config]
    while pending:
        section = pending.pop(0)
        if isinstance(section, Mapping):
            if "global_attn_indexes" in section or section.get("model_type") == ImageEncoderViTConfig.model_type:
                yield section
            pending.extend(section.values())


def _disagreements(config: ImageEncoderViTConfig, hints: Mapping[str, Any]) -> list[str]:
    """A sentence for each value of a config.json that the tensors contradict."""
    return [
        f"config.json says {name} = {value}, the tensors say {getattr(config, name)}: trusting the tensors."
        for name, value in hints.items()
        if getattr(config, name) != value
    ]
