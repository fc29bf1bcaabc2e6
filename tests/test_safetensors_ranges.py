"""The safetensors header is believed only after it was checked, and the ranges planned from it waste little."""

import hashlib
import json
import struct
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPES, write_checkpoint
from hub_client import Worker
from hub_server import HubServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from image_encoder_vit.storage.safetensors_format import MAX_HEADER_BYTES, TensorSpec, build_header, parse_header
from image_encoder_vit.storage.safetensors_ranges import Staging, plan_download, plan_runs
from image_encoder_vit.weights.files import LocalTensors
from image_encoder_vit.weights.pull import pull

pytest_plugins = ["hub_fixtures"]


def file_of(header: Any, data_bytes: int = 0) -> bytes:
    """A safetensors file with any header, and zeros for data."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(data_bytes)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "no header": (b"", "no safetensors file"),
    "seven bytes": (b"1234567", "no safetensors file"),
    "ten gigabytes of header": (struct.pack("<Q", 10 << 30) + b"{}", "claims 10737418240 bytes"),
    "the largest header": (struct.pack("<Q", (1 << 64) - 1) + b"{}", "claims 18446744073709551615 bytes"),
    "a header one byte too long": (struct.pack("<Q", 3) + b"{}", "claims 3 bytes"),
    "no JSON": (file_of(b"{'a'"), "cannot be read"),
    "no UTF-8": (file_of(b'{"\xff\xfe": 1}'), "cannot be read"),
    "a list": (file_of(b"[]"), "no JSON object"),
    "deep nesting": (file_of(b"[" * 100_000), "cannot be read"),
    "a huge number": (file_of(b'{"a": ' + b"9" * 10_000 + b"}"), "cannot be read"),
    "not a number": (file_of(b'{"a": NaN}'), "NaN"),
    "duplicate names": (
        file_of(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), 8),
        "the name 'a' occurs twice",
    ),
    "duplicate keys": (file_of(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "occurs twice"),
    "offsets past the end": (file_of({"a": entry(shape=[200], offsets=[0, 800])}, 8), "end at byte"),
    "negative offsets": (file_of({"a": entry(offsets=[-8, 0])}, 8), "no valid data_offsets"),
    "reversed offsets": (file_of({"a": entry(offsets=[8, 0])}, 8), "no valid data_offsets"),
    "one offset": (file_of({"a": entry(offsets=[8])}, 8), "no valid data_offsets"),
    "text offsets": (file_of({"a": entry(offsets=["0", "8"])}, 8), "no valid data_offsets"),
    "huge offsets": (file_of({"a": entry(offsets=[0, 1 << 70])}, 8), "no valid data_offsets"),
    "overlapping": (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, 12), "overlaps"),
    "the same bytes twice": (file_of({"a": entry(), "b": entry()}, 8), "overlaps"),
    "a gap": (file_of({"a": entry(), "b": entry(offsets=[16, 24])}, 24), "leaves a gap"),
    "bytes left over": (file_of({"a": entry()}, 9), "damaged"),
    "cut off": (file_of({"a": entry()}, 7), "damaged"),
    "unknown dtype": (file_of({"a": entry(dtype="F3 1")}, 8), "unknown dtype 'F3 1'"),
    "no text dtype": (file_of({"a": entry(dtype=["F32"])}, 8), "unknown dtype"),
    "wrong dtype": (file_of({"a": entry(dtype="F16")}, 8), r"claims F16 of shape \[2\], 4 bytes"),
    "overflowing shape": (file_of({"a": entry(shape=[1 << 62] * 4)}, 8), "bytes, but its data_offsets"),
    "negative shape": (file_of({"a": entry(shape=[-2, -1])}, 8), "no valid shape"),
    "boolean shape": (file_of({"a": entry(shape=[True, 2])}, 8), "no valid shape"),
    "many dimensions": (file_of({"a": entry(shape=[1] * 1000, offsets=[0, 4])}, 4), "no valid shape"),
    "more keys": (file_of({"a": entry() | {"code": "x"}}, 8), "nothing else"),
    "no entry": (file_of({"a": 1}), "must have dtype"),
    "path": (file_of({"../../etc/passwd": entry()}, 8), "taken for a path"),
    "slash": (file_of({"a/b": entry()}, 8), "taken for a path"),
    "backslash": (file_of({"a\\b": entry()}, 8), "taken for a path"),
    "null byte": (file_of({"a\0b": entry()}, 8), "taken for a path"),
    "line end": (file_of({"a\nb": entry()}, 8), "taken for a path"),
    "empty name": (file_of({"": entry()}, 8), "taken for a path"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata list": (file_of({"__metadata__": []}), "__metadata__"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_lying_headers_are_refused_with_one_clear_error(kind: str, tmp_path: Path) -> None:
    content, message = HOSTILE[kind]
    (tmp_path / "evil.safetensors").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as error:
            pull(tmp_path / "evil.safetensors", tmp_path / "out")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)
    assert peak_bytes < 20 << 20
    assert [path.name for path in tmp_path.iterdir()] == ["evil.safetensors"]


@pytest.mark.parametrize("kind", HOSTILE)
def test_lying_headers_on_the_hub_too(kind: str, hub: HubServer, worker: Worker, tmp_path: Path) -> None:
    content, _ = HOSTILE[kind]
    hub.add_repository(f"hostile/{kind.replace(' ', '-')}", {"model.safetensors": content})
    outcome = worker.call(
        "pull",
        source=f"hostile/{kind.replace(' ', '-')}",
        output_dir=tmp_path / "out",
        retry={"first_wait_s": 0.001, "max_failures": 2},
    )
    assert outcome.error is not None
    assert outcome.error[0] == "ValueError", outcome.output
    assert hub.sent_bytes() < 1 << 20
    assert list(tmp_path.iterdir()) == []


def test_a_header_larger_than_we_accept_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(ValueError, match="more than the 16777216 accepted"):
        LocalTensors.open([path])


def test_valid_headers_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 4).to(torch.bfloat16),
        "a.scalar": torch.tensor(2.0),
        "c.empty": torch.zeros(0, 5),
        "d.long": torch.arange(6),
        "e.Ünïcode 🎉": torch.randn(2, 1, 2, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt", "note": "x"})
    local = LocalTensors.open([tmp_path / "file.safetensors"])
    assert local.shapes == {name: tuple(value.shape) for name, value in tensors.items()}
    for name in ("b.weight", "a.scalar", "e.Ünïcode 🎉"):
        assert torch.equal(local.read(name), tensors[name])


def valid_file() -> bytes:
    shapes = {"model.a": ("F32", (2, 3)), "model.b": ("BF16", (4,)), "model.c": ("F16", (1, 2, 2))}
    header, _ = build_header(shapes)
    return header + bytes(range(24 + 8 + 8))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.none() | st.integers(0, 400),
    extra=st.binary(max_size=20),
)
def test_fuzzed_files_are_read_as_safetensors_reads_them_or_refused(
    edits: list[tuple[int, int]], cut: int | None, extra: bytes, tmp_path: Path
) -> None:
    """Whatever we accept, safetensors' own parser accepts too and sees the same; everything else is a ValueError."""
    content = bytearray(valid_file())
    for position, value in edits:
        content[position % len(content)] = value
    content = content[:cut] + extra
    path = tmp_path / "fuzzed.safetensors"
    path.write_bytes(content)
    try:
        ours = LocalTensors.open([path])
    except ValueError:
        return
    with safe_open(path, framework="pt") as theirs:
        assert {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()} == ours.shapes  # noqa: SIM118


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
tensor_like = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F99"]) | json_values,
        "shape": st.lists(st.integers(-1, 1 << 40), max_size=5) | json_values,
        "data_offsets": st.lists(st.integers(-1, 1 << 66), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=300, deadline=None)
@given(
    header=json_values | st.dictionaries(st.text(max_size=8), tensor_like, max_size=4),
    file_bytes=st.integers(0, 1 << 40),
)
def test_any_json_is_parsed_into_what_the_file_can_hold_or_refused(header: Any, file_bytes: int) -> None:
    encoded = json.dumps(header).encode()
    try:
        specs = parse_header(encoded, file_bytes, "the file")
    except ValueError:
        return
    position = 8 + len(encoded)
    for spec in sorted(specs.values(), key=lambda spec: (spec.start, spec.end)):
        assert spec.start == position
        position = spec.end
    assert position == file_bytes


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused_as_an_index_or_a_checkpoint(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (folder / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"."):
            pull(folder / name, folder / "out")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"model.sam_model.pos_embed": "../../secret"}, "do not exist"),
        ({"model.sam_model.pos_embed": "/etc/passwd"}, "do not exist"),
        ({"model.sam_model.pos_embed": 3}, "do not exist"),
        ({"model.sam_model.pos_embed": ["x"]}, "cannot be read"),
        ([], "cannot be read"),
        ({}, "the checkpoint is empty"),
        (None, "cannot be read"),
    ],
)
def test_indices_that_lie_are_refused(weight_map: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        pull(tmp_path, tmp_path / "out")


def test_an_index_that_names_a_tensor_which_is_not_there_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", RECIPES["deepseek-ocr-2"])
    index = tmp_path / "source" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.sam_model.net_4.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="which does not hold it"):
        pull(tmp_path / "source", tmp_path / "out")


# Plans


@st.composite
def wanted_tensors(draw: st.DrawFn) -> list[TensorSpec]:
    """Tensors of a file in order, with gaps between them."""
    specs = []
    position = 0
    for size, gap in draw(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 300)), min_size=1, max_size=30)):
        position += gap
        specs.append(TensorSpec("U8", (size,), position, position + size))
        position += size
    return specs


@settings(max_examples=200, deadline=None)
@given(specs=wanted_tensors())
def test_runs_cover_what_is_wanted_and_waste_at_most_half_a_percent(specs: list[TensorSpec]) -> None:
    runs = plan_runs(reversed(specs))
    assert runs == sorted(runs)
    assert all(before[1] < after[0] for before, after in pairwise(runs))
    for spec in specs:
        assert not spec.size or any(start <= spec.start and spec.end <= end for start, end in runs)
    wanted_bytes = sum(spec.size for spec in specs)
    assert sum(end - start for start, end in runs) <= 1.005 * wanted_bytes


@settings(max_examples=200, deadline=None)
@given(files=st.lists(wanted_tensors(), min_size=1, max_size=3), max_chunk_bytes=st.integers(1, 4000))
def test_chunks_put_every_tensor_into_its_place(files: list[list[TensorSpec]], max_chunk_bytes: int) -> None:
    contents = {}
    wanted: dict[str, dict[str, TensorSpec]] = {}
    for number, specs in enumerate(files):
        size = specs[-1].end
        contents[f"f{number}"] = bytes((number * 31 + position * 7) % 251 for position in range(size))
        wanted[f"f{number}"] = {f"f{number}.t{i}": spec for i, spec in enumerate(specs) if spec.size}
    chunks, staged = plan_download(wanted, max_chunk_bytes)
    staging = bytearray(sum(chunk.end - chunk.start for chunk in chunks))
    for chunk in chunks:
        assert 0 < chunk.end - chunk.start <= max_chunk_bytes
        staging[chunk.offset : chunk.offset + chunk.end - chunk.start] = contents[chunk.file][chunk.start : chunk.end]
    for file, specs_by_name in wanted.items():
        for name, spec in specs_by_name.items():
            assert staging[staged[name].start : staged[name].end] == contents[file][spec.start : spec.end]


def test_staging_trusts_only_chunks_whose_bytes_are_there(tmp_path: Path) -> None:
    specs = {"a": TensorSpec("U8", (30,), 0, 30)}
    chunks, _ = plan_download({"file": specs}, 10)
    staging = Staging(tmp_path / "staging", "one", chunks)
    assert staging.missing() == chunks
    staging.weights.write_bytes(bytes(30))
    digest = hashlib.sha256(bytes(10)).hexdigest()
    journal = tmp_path / "staging" / "chunks.jsonl"
    journal.write_text(
        json.dumps({"offset": 0, "sha256": digest})
        + "\n"
        + json.dumps({"offset": 10, "sha256": "0" * 64})  # A chunk that a power cut has lost.
        + '\n{"offset": 20, "sha2'  # A line that a kill has cut.
    )
    assert Staging(tmp_path / "staging", "one", chunks).missing() == chunks[1:]
    # Another source or commit starts from nothing.
    assert Staging(tmp_path / "staging", "two", chunks).missing() == chunks


LEFT_OVER = [(), ("weights.part",), ("plan.json",), ("chunks.jsonl",), ("plan.json", "chunks.jsonl")]
LEFT_OVER += [("plan.json", "weights.part"), ("weights.part", "chunks.jsonl")]


@pytest.mark.parametrize("left", LEFT_OVER)
def test_staging_goes_on_from_whatever_a_kill_has_left_of_it(left: tuple[str, ...], tmp_path: Path) -> None:
    """As when the removal of a finished folder was killed half way, in any order of its files."""
    chunks, _ = plan_download({"file": {"a": TensorSpec("U8", (30,), 0, 30)}}, 10)
    folder = tmp_path / "staging"
    staging = Staging(folder, "one", chunks)
    staging.weights.write_bytes(bytes(30))
    digest = hashlib.sha256(bytes(10)).hexdigest()
    lines = [json.dumps({"offset": chunk.offset, "sha256": digest}) for chunk in chunks]
    (folder / "chunks.jsonl").write_text("\n".join(lines))
    for path in list(folder.iterdir()):
        if path.name not in left:
            path.unlink()
    assert Staging(folder, "one", chunks).missing() == chunks
    (folder / "plan.json").write_bytes(b"\xff\xfe torn")
    assert Staging(folder, "one", chunks).missing() == chunks


def test_our_parser_is_no_laxer_than_the_reference(tmp_path: Path) -> None:
    """Every hostile file that safetensors itself refuses, we refuse; some more, by name."""
    refused = 0
    for content, _ in HOSTILE.values():
        (tmp_path / "evil").write_bytes(content)
        try:
            with safe_open(tmp_path / "evil", framework="pt"):
                pass
        except (SafetensorError, OSError):
            refused += 1
    assert refused >= 25
