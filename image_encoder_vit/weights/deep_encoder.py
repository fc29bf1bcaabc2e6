"""
The whole DeepEncoder in the checkpoints that hold it, beside SAM's encoder: CLIP's tower, the projector and the two
learned tokens, found by the tensors' names and shapes. Nothing here reads a file.

"Published names" are DeepSeek-OCR's without `model.`, which `DeepEncoder` uses.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from math import isqrt
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration_deep_encoder import DeepEncoderConfig
from ..configuration_image_encoder_vit import ImageEncoderViTConfig
from ..modeling_deep_encoder import STRANGERS, DeepEncoderModel
from .inference import Shape
from .naming import PROJECTOR, listed, weights_below

SAM_PREFIX = "sam_model."
PUBLISHED_NAME = re.compile(
    r"vision_model\.(embeddings\.(class_embedding|position_embedding\.weight)|pre_layrnorm\.(weight|bias)"
    r"|transformer\.layers\.\d+\.(layer_norm[12]|self_attn\.(qkv_proj|out_proj)|mlp\.fc[12])\.(weight|bias))"
    r"|projector\.layers\.(weight|bias)|image_newline|view_seperator"
)
# MLX's spelling of a name that DeepSeek-OCR misspells.
RESPELT = {"view_separator": "view_seperator"}
USUAL_HEAD_SIZE = 64
NEEDED_RANKS = {
    "vision_model.embeddings.position_embedding.weight": 2,
    "vision_model.transformer.layers.0.mlp.fc1.weight": 2,
    "projector.layers.weight": 2,
}


def deep_encoder_weights(names: Iterable[str], sam_prefix: str) -> dict[str, str]:
    """
    Published name to name in a checkpoint whose SAM encoder lies below `sam_prefix`. Needs no shapes, so that an index
    is enough.

    Raises:
        ValueError: If there is no DeepEncoder, with what is there instead.
    """
    known = set(names)
    stem = stem_of(known, sam_prefix)
    weights = {SAM_PREFIX + name: source for name, source in weights_below(known, sam_prefix).items()}
    for name in sorted(known):
        if name.startswith(stem):
            own = name.removeprefix(stem)
            published = RESPELT.get(own, own)
            if PUBLISHED_NAME.fullmatch(published):
                weights[published] = name
    return weights


def stem_of(names: Iterable[str], sam_prefix: str) -> str:
    """
    What the names of all parts of the DeepEncoder begin with.

    Raises:
        ValueError: If there is none.
    """
    known = set(names)
    stem = sam_prefix.removesuffix(SAM_PREFIX)
    if sam_prefix.endswith(SAM_PREFIX) and f"{stem}vision_model.embeddings.class_embedding" in known:
        return stem
    raise ValueError(f"There is no DeepEncoder in this checkpoint. {_instead(known, sam_prefix)}")


def _instead(names: set[str], sam_prefix: str) -> str:
    """What a checkpoint holds where a DeepEncoder was looked for, and what to do."""
    alone = "Without --part, pull takes its SAM encoder."
    if any(".qwen2_model." in f".{name}" for name in names):
        return (
            "It is DeepSeek-OCR-2's: what reads SAM's features there is a Qwen2, not CLIP, and DeepseekOcr2VisionModel "
            f"of transformers (5.12 and later) computes it. {alone}"
        )
    if any("vision_encoder.encoder.layers." in name and ".q_proj." in name for name in names):
        return (
            "It is Unlimited-OCR as transformers holds it in memory, with CLIP's queries, keys and values apart: save "
            "the model by save_pretrained, which writes the published names, and pull from that folder."
        )
    got = ("mm_projector_vary", f"{PROJECTOR}conv_upsampler")
    if sam_prefix.endswith("vision_tower_high.") or any(part in name for part in got for name in names):
        return f"GOT-OCR2 and Vary hand SAM's features to one linear layer; no CLIP reads them. {alone}"
    if any(name.startswith(("mask_decoder.", "prompt_encoder.")) for name in names) or "image_encoder." in sam_prefix:
        return f"Segment Anything has a mask decoder after its encoder; there is no CLIP in it. {alone}"
    return (
        f"Its SAM encoder lies below {sam_prefix!r}, without CLIP's tower beside it, which is looked for below "
        f"vision_model, beside sam_model. {alone}"
    )


def left_out(names: Iterable[str], stem: str, taken: Iterable[str]) -> list[str]:
    """
    What lies in the DeepEncoder's modules and is not taken: weights that nothing reads.

    Raises:
        ValueError: If there is anything else, which means another architecture.
    """
    sources = set(taken)
    modules = tuple(f"{stem}{module}." for module in ("vision_model", "projector"))
    others = sorted(name for name in names if name.startswith(modules) and name not in sources)
    foreign = [name for name in others if not re.search(STRANGERS, name)]
    if foreign:
        raise ValueError(
            f"Below {stem!r} is a DeepEncoder of another architecture: it also has {listed(foreign)}. "
            "Quantised checkpoints and other variants cannot be converted."
        )
    return others


def infer_deep_config(
    shapes: Mapping[str, Shape], sam_config: ImageEncoderViTConfig, source_config: Mapping[str, Any]
) -> tuple[DeepEncoderConfig, tuple[str, ...]]:
    """
    The configuration that weights of these shapes, by published name, belong to, and sentences about what the shapes
    did not settle.

    Raises:
        ValueError: If a weight that is needed is missing, or the shapes belong to no DeepEncoder.
    """
    missing = [name for name in NEEDED_RANKS if name not in shapes]
    if missing:
        raise ValueError(f"The DeepEncoder is incomplete: {listed(missing)} missing.")
    for name, rank in NEEDED_RANKS.items():
        if len(shapes[name]) != rank or 0 in shapes[name]:
            raise ValueError(f"{name} must have {rank} dimensions, none of them 0, got {shapes[name]}.")
    positions, width = shapes["vision_model.embeddings.position_embedding.weight"]
    grid = isqrt(positions - 1)
    if 1 + grid**2 != positions or not grid:
        raise ValueError(f"CLIP's position table must be of a class and a square grid, 1 + n x n, got {positions}.")
    blocks = {int(name.split(".")[3]) for name in shapes if name.startswith("vision_model.transformer.layers.")}
    if max(blocks) > len(shapes):
        raise ValueError(f"CLIP's tower names block {max(blocks)}, but has only {len(shapes)} weights.")
    heads = next(iter(_hinted_heads(source_config)), None)
    notices: tuple[str, ...] = ()
    if heads is None:
        heads = max(1, width // USUAL_HEAD_SIZE)
        if width != 1024:
            notices = (f"The tensors do not say how many heads CLIP's tower has: taking {heads}.",)
    try:
        config = DeepEncoderConfig(
            sam_config=sam_config,
            clip_num_hidden_layers=1 + max(blocks),
            clip_num_attention_heads=heads,
            clip_intermediate_size=shapes["vision_model.transformer.layers.0.mlp.fc1.weight"][0],
            clip_grid_size=grid,
            projection_size=shapes["projector.layers.weight"][0],
        )
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error).strip().splitlines()[-1].strip()) from None
    return config, notices


def _hinted_heads(source_config: Mapping[str, Any]) -> Iterator[int]:
    """How many heads CLIP's tower has, as a config.json says: this package's, DeepSeek-OCR's or transformers'."""
    pending: list[Any] = [source_config]
    while pending:
        section = pending.pop(0)
        if not isinstance(section, Mapping):
            continue
        said = [section.get("clip_num_attention_heads")]
        for name, values in section.items():
            if isinstance(values, Mapping):
                if str(name).startswith("clip"):
                    said.append(values.get("heads"))
                elif name == "encoder_config":
                    said.append(values.get("num_attention_heads"))
        yield from (heads for heads in said if type(heads) is int and 0 < heads < 1 << 20)
        pending.extend(section.values())


def expected_deep_shapes(config: DeepEncoderConfig) -> dict[str, Shape]:
    """Published name to shape of every weight of a DeepEncoder, without allocating any."""
    with torch.device("meta"):
        model = DeepEncoderModel(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
