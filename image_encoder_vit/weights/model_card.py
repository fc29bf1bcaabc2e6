"""The model card (README.md) of a folder with the encoder, and the provenance that it and `provenance.json` tell."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from ..configuration_image_encoder_vit import ImageEncoderViTConfig

PROVENANCE_FILE = "provenance.json"
CARD_FILE = "README.md"
# What lies between these lines is written anew each time; the rest of a card is its author's.
START_MARK = "<!-- image-encoder-vit: generated below -->"
END_MARK = "<!-- image-encoder-vit: generated above -->"
TAGS = ("sam", "vit", "ocr", "image-encoder")
CLASSIFIER = "ImageEncoderViTForImageClassification"


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `pull` wrote about where the weights come from; empty for folders that it did not make."""
    try:
        content = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_metadata(card: Path) -> dict[str, Any]:
    """The YAML front matter of a card, empty where there is none or it cannot be read."""
    if not card.is_file():
        return {}
    try:
        return dict(metadata_load(card) or {})
    except ValueError:
        return {}


def plain_license(value: Any) -> str | None:
    """A licence's identifier as the Hub uses them, or None for anything else."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", value) else None


def is_classifier(config: ImageEncoderViTConfig) -> bool:
    """Whether the folder of this configuration was saved with a head."""
    return CLASSIFIER in (config.architectures or ())


def build_metadata(
    existing: Mapping[str, Any], provenance: Mapping[str, Any], library_name: str, classifies: bool = False
) -> dict[str, Any]:
    """
    The front matter: what the source says, below what the author of the card has written already.
    """
    source = provenance.get("source", {})
    generated = {
        "library_name": library_name,
        "pipeline_tag": "image-classification" if classifies else "image-feature-extraction",
        "license": plain_license(source.get("license")),
        "base_model": source.get("repository"),
    }
    metadata = {key: value for key, value in generated.items() if value is not None} | dict(existing)
    metadata["library_name"] = library_name
    tags = metadata.get("tags") or []
    metadata["tags"] = list(dict.fromkeys([*(tags if isinstance(tags, list) else [tags]), *TAGS]))
    return metadata


def build_card(existing: str, metadata: Mapping[str, Any], generated: str) -> str:
    """
    A whole README.md: the metadata, and the generated part in place of the last one, or after the author's own text.
    """
    body = re.sub(r"\A---\r?\n.*?\r?\n---\r?\n", "", existing, count=1, flags=re.DOTALL).strip("\n")
    block = f"{START_MARK}\n{generated.strip()}\n{END_MARK}"
    start, end = body.find(START_MARK), body.find(END_MARK)
    if 0 <= start < end:
        body = body[:start] + block + body[end + len(END_MARK) :]
    else:
        body = f"{body}\n\n{block}" if body else block
    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{body}\n"


def describe_model(
    config: ImageEncoderViTConfig,
    provenance: Mapping[str, Any],
    *,
    usage: str,
    measurements: Mapping[str, str],
) -> str:
    """
    The generated part of a card.

    `usage` is Markdown that tells how to load the model, `measurements` are figures by what they measure.
    """
    stride_px = config.patch_size * 2 ** len(config.downsample_channels)
    channels = [config.output_channels, *config.downsample_channels][-1]
    cells = -(-config.image_size // stride_px)
    sections = [
        "# SAM ViT image encoder\n\n"
        f"A page of {config.image_size} x {config.image_size} px becomes a feature map of {channels} channels on a "
        f"grid of {cells} x {cells}, {cells * cells} tokens; other sizes work, a cell stands for {stride_px} x "
        f"{stride_px} px. {config.num_hidden_layers} blocks of width {config.hidden_size}, global attention in blocks "
        f"{', '.join(map(str, config.global_attn_indexes)) or 'none'}.",
        f"## Usage\n\n{usage}",
        _describe_source(provenance),
        "## Numbers\n\n" + _table(("what", "measured"), measurements.items()),
    ]
    tensors = provenance.get("tensors", {})
    if tensors:
        rows = [(f"`{n}`", " x ".join(map(str, t["shape"])), f"`{t['sha256']}`") for n, t in tensors.items()]
        sections.append(
            f"<details><summary>The {len(tensors)} tensors, their shapes and SHA-256</summary>\n\n"
            f"{_table(('tensor', 'shape', 'SHA-256 of its bytes'), rows)}\n</details>"
        )
    return "\n\n".join(section for section in sections if section)


def _describe_source(provenance: Mapping[str, Any]) -> str:
    source = provenance.get("source")
    if not source:
        return ""
    rows = [
        ("source", source.get("repository") or source.get("name")),
        ("commit", source.get("commit")),
        ("files", ", ".join(source.get("files", []))),
        ("layout", f"{source.get('layout')}, under `{source.get('prefix') or '(no prefix)'}`"),
        ("licence", _describe_license(source)),
    ]
    notices = "".join(f"\n- {notice}" for notice in provenance.get("notices", []))
    table = _table(("where the weights come from", ""), [(what, value) for what, value in rows if value])
    return f"## Source\n\n{table}" + (f"\nNotices of the conversion:\n{notices}\n" if notices else "")


def _describe_license(source: Mapping[str, Any]) -> str | None:
    license_name = plain_license(source.get("license"))
    if license_name is None:
        return "not stated by the source"
    return (
        license_name if source.get("license_stated_by") == "source" else f"{license_name}, that of the original model"
    )


def _table(head: tuple[str, ...], rows: Any) -> str:
    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"

    return line(head) + "|" + "---|" * len(head) + "\n" + "".join(line(row) for row in rows)


def usage_from(location: str, revision: str | None, classifies: bool = False) -> str:
    """
    Markdown that loads the published model from a repository or folder, pinned to a revision where it has one; with a
    head, in the pipeline that shows its labels too.
    """
    pinned = f', revision="{revision}"' if revision else ""
    reason = (
        "\nThe revision is a tag named after the content: what it loads, code included, stays what it is.\n"
        if revision
        else ""
    )
    return (
        "```python\n"
        "import torch\n"
        "from PIL import Image\n"
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        f'source = "{location}"\n'
        f"processor = AutoImageProcessor.from_pretrained(source{pinned}, trust_remote_code=True)\n"
        f"model = AutoModel.from_pretrained(source{pinned}, trust_remote_code=True).eval()\n\n"
        'inputs = processor(Image.open("page.png"), return_tensors="pt")\n'
        "with torch.no_grad():\n"
        '    features = model(inputs["pixel_values"]).last_hidden_state  # (1, channels, rows, columns)\n'
        "```\n" + (_classifier_usage(location, pinned) if classifies else "") + reason
    )


def _classifier_usage(location: str, pinned: str) -> str:
    return (
        "\nIts labels:\n\n"
        "```python\n"
        "from transformers import pipeline\n\n"
        f'classify = pipeline("image-classification", "{location}"{pinned}, trust_remote_code=True)\n'
        'print(classify("page.png"))\n'
        "```\n"
    )
