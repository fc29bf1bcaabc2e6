"""The model card (README.md) of a folder with the encoder, and the provenance that it and `provenance.json` tell."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment, StrictUndefined
from transformers import PreTrainedConfig
from yaml import YAMLError

from ..support import visible
from .model_kinds import CLASSIFIER, ModelKind, kind_of

PROVENANCE_FILE = "provenance.json"
CARD_FILE = "README.md"
MAX_CARD_BYTES = 4 << 20
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
# What lies between these lines is written anew each time; the rest of a card is its author's.
START_MARK = "<!-- image-encoder-vit: generated below -->"
END_MARK = "<!-- image-encoder-vit: generated above -->"
LIBRARY = "transformers"
TAGS = ("sam", "vit", "ocr", "image-encoder")
# What Markdown and HTML give a meaning to.
MARKUP = re.compile(r"([\\`*_{}\[\]<>|#&~$!])")


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `pull` wrote about where the weights come from; empty for folders that it did not make."""
    try:
        content = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def parse_card(text: str) -> ModelCard:
    """
    A card, whose text may have no front matter.

    Raises:
        ValueError: If its front matter is no YAML that maps names to values, saying where.
    """
    try:
        # huggingface_hub warns of a card without front matter; ours may begin so.
        return ModelCard(text if re.match(r"\s*---\s*\n", text) else f"---\n\n---\n{text}")
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        problem = " ".join(visible(line.strip()) for line in str(error).splitlines() if line.strip())
        raise ValueError(f"The front matter of {CARD_FILE} cannot be read: {problem[:300]}") from None


def read_card(path: Path) -> ModelCard:
    """
    The card in a file, an empty one where there is none.

    Raises:
        ValueError: As `parse_card`, and if the file is no text or too large for a card.
    """
    if not path.is_file():
        return parse_card("")
    with path.open("rb") as file:
        content = file.read(MAX_CARD_BYTES + 1)
    if len(content) > MAX_CARD_BYTES:
        raise ValueError(f"{path.name!r} is larger than the {MAX_CARD_BYTES} bytes accepted of a card.")
    try:
        return parse_card(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path.name!r} is no text in UTF-8.") from None


def plain_license(value: Any) -> str | None:
    """A licence's identifier as the Hub uses them, or None for anything else."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", value) else None


def plain_repository(value: Any) -> str | None:
    """A repository's id as the Hub has them, or None for anything else."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", value, re.ASCII) else None


def escaped(value: object) -> str:
    """Text from outside that Markdown shows as it is, on one line: no markup, no HTML, no control characters."""
    return MARKUP.sub(r"\\\1", visible(str(value)))


def code(value: object) -> str:
    """The same in the type of code, where that is possible."""
    text = str(value)
    return f"`{text}`" if re.fullmatch(r"[\w.,:/+ -]+", text, re.ASCII) else escaped(text)


def update_card(card: ModelCard, kind: ModelKind, provenance: Mapping[str, Any], generated: str) -> str:
    """
    A whole README.md: the generated part in place of the last one, or after the author's own text, and the front
    matter with what the source says, below what the author has written already.
    """
    source = _mapping(provenance.get("source"))
    said = {
        "pipeline_tag": kind.pipeline_tag,
        "license": plain_license(source.get("license")),
        "base_model": plain_repository(source.get("repository")),
    }
    for key, value in said.items():
        if value is not None and card.data.get(key) is None:
            card.data[key] = value
    tags = card.data.get("tags") or []
    card.data["library_name"] = LIBRARY
    card.data["tags"] = list(dict.fromkeys([*(tags if isinstance(tags, list) else [tags]), *TAGS]))

    block = f"{START_MARK}\n{generated.strip()}\n{END_MARK}"
    body = card.text.strip("\r\n")
    start, end = body.find(START_MARK), body.find(END_MARK)
    if 0 <= start < end:
        body = body[:start] + block + body[end + len(END_MARK) :]
    else:
        body = f"{body}\n\n{block}" if body else block
    card.text = f"\n{body}\n"
    return str(card)


def describe_model(
    config: PreTrainedConfig, provenance: Mapping[str, Any], *, usage: str, measurements: Mapping[str, str]
) -> str:
    """
    The generated part of a card. What comes out of `provenance`, which may be a stranger's, is escaped.

    `usage` is Markdown that tells how to load the model, `measurements` are figures by what they measure.
    """
    tensors = _mapping(provenance.get("tensors"))
    notices = provenance.get("notices")
    environment = Environment(undefined=StrictUndefined, autoescape=False)  # Markdown: escaped here.
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        summary=kind_of(config).summary(config),
        usage=usage.strip(),
        source=_describe_source(_mapping(provenance.get("source"))),
        notices=[escaped(notice) for notice in notices] if isinstance(notices, list) else [],
        measurements={escaped(what): escaped(value) for what, value in measurements.items()},
        tensors=[
            (code(name), escaped(_joined(record.get("shape"), " x ")), code(record.get("sha256")))
            for name, record in tensors.items()
            if isinstance(record, dict)
        ],
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _joined(value: Any, separator: str) -> str:
    return separator.join(map(str, value)) if isinstance(value, list) else ""


def _describe_source(source: Mapping[str, Any]) -> dict[str, str]:
    """The rows of the table that says where the weights come from."""
    if not source:
        return {}
    rows = {
        "source": code(source.get("repository") or source.get("name") or ""),
        "commit": code(source.get("commit") or ""),
        "files": code(_joined(source.get("files"), ", ")),
        "layout": f"{code(source.get('layout'))}, under {code(source.get('prefix') or '(no prefix)')}",
        "licence": _describe_license(source),
    }
    return {what: value for what, value in rows.items() if value}


def _describe_license(source: Mapping[str, Any]) -> str:
    license_name = plain_license(source.get("license"))
    if license_name is None:
        return "not stated by the source"
    return (
        license_name if source.get("license_stated_by") == "source" else f"{license_name}, that of the original model"
    )


def usage_from(kind: ModelKind, location: str, revision: str | None) -> str:
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
        "with torch.inference_mode():\n"
        "    features = model(**inputs).last_hidden_state  # (1, channels, rows, columns)\n"
        "```\n" + (_classifier_usage(location, pinned) if kind == CLASSIFIER else "") + reason
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
