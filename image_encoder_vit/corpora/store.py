"""
Features of a corpus on the disk: written unit by unit so that nothing is lost or written twice when a process dies, and
read page by page.

A unit is a run of consecutive pages. Its features are one file of `shards/`; its rows of the index, in a hidden folder
until all units are there, are written last and say that it is complete. Both appear under their names at once, brought
to the disk. What a unit holds depends on nothing but its pages and the settings, so whichever process makes it again
makes the same bytes.
"""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..storage.atomic_file import atomic_file
from ..support import import_extra, message_of
from .pages import Page

pa = import_extra("pyarrow", "corpora")
compute = import_extra("pyarrow.compute", "corpora")
parquet = import_extra("pyarrow.parquet", "corpora")

MANIFEST_FILE, INDEX_FILE, REJECTS_FILE = "manifest.json", "index.parquet", "rejects.parquet"
SHARDS, WORK = "shards", ".work"
PLAN_FILE = "plan.arrow"
PAGES_PER_WRITE = 4096
MAX_OPEN_SHARDS = 16

PLAN_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("page", pa.int32()),
        ("kind", pa.string()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("stamp", pa.string()),
        ("problem", pa.string()),
        ("item", pa.int32()),
        ("frame", pa.int32()),
    ]
)
# Sizes and regions in px, the grid in cells, (rows, columns); `row` is the name of the map in its shard, whose size in
# bytes and digest stand in each of its rows. Tokens lie in the same shard.
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("page", pa.int32()),
        ("original_size", pa.list_(pa.int32(), 2)),
        ("valid_region", pa.list_(pa.int32(), 4)),
        ("grid", pa.list_(pa.int32(), 2)),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("sha256", pa.string()),
        ("shard_bytes", pa.int64()),
        ("shard_sha256", pa.string()),
    ]
)
REJECTS_SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("page", pa.int32()), ("reason", pa.string())]
)
UNIT_SCHEMA = pa.schema([*INDEX_SCHEMA, ("reason", pa.string())])


def _write_table(path: Path, tables: Iterable[Any], schema: Any, new_writer: Any) -> None:
    with atomic_file(path) as partial, new_writer(str(partial), schema) as writer:
        for table in tables:
            if table.num_rows:
                writer.write_table(table)


class Plan:
    """The pages of a corpus on the disk, in order, cut into units of `pages_per_unit`."""

    def __init__(self, folder: Path, pages_per_unit: int) -> None:
        self.path = str(folder / WORK / PLAN_FILE)
        self.pages_per_unit = pages_per_unit
        self.table = self._map()

    def _map(self) -> Any:
        """The list as it lies on the disk, shared by all processes: of millions of pages none is a Python object."""
        return pa.ipc.open_file(pa.memory_map(self.path)).read_all()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"table": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.table = self._map()

    @property
    def num_pages(self) -> int:
        return int(self.table.num_rows)

    @property
    def num_units(self) -> int:
        return -(-self.num_pages // self.pages_per_unit)

    def positions(self, unit: int) -> range:
        """The numbers of the pages of a unit."""
        start = unit * self.pages_per_unit
        return range(start, min(start + self.pages_per_unit, self.num_pages))

    def page(self, position: int) -> Page:
        return Page(**self.table.slice(position, 1).to_pylist()[0])

    def find(self, source: str, page: int | None) -> Page | None:
        """The page with this number of this file."""
        is_it = compute.and_(compute.equal(self.table["source"], source), compute.equal(self.table["page"], page))
        position = compute.index(is_it, True).as_py()
        return self.page(position) if position >= 0 else None


def write_plan(folder: Path, pages: Iterable[Page]) -> str:
    """
    Writes the list of pages for all processes; returns a digest of it. Pages are never all in memory.

    Raises:
        ValueError: If there is no page.
    """
    digest = hashlib.sha256()

    def tables() -> Iterator[Any]:
        rows: list[dict[str, Any]] = []
        for page in map(Page.storable, pages):
            digest.update(json.dumps(page).encode())
            rows.append(page._asdict())
            if len(rows) == PAGES_PER_WRITE:
                yield pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)
                rows = []
        if rows:
            yield pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)

    _write_table(folder / WORK / PLAN_FILE, tables(), PLAN_SCHEMA, pa.ipc.new_file)
    return digest.hexdigest()


def check_folder(folder: Path) -> None:
    """
    Checks that features can be written to the folder, or a run that was begun there be finished.

    Raises:
        FileExistsError: If it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{str(folder)!r} is no folder: choose another --output.")
    if not folder.is_dir() or (folder / MANIFEST_FILE).exists():
        return
    # A killed run leaves what it was writing.
    others = sorted(path.name for path in folder.iterdir() if path.name != WORK and not _is_partial(path))
    if others:
        raise FileExistsError(
            f"{str(folder)!r} holds something else, {others[0]!r}: choose another folder, or remove it."
        )


def check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """
    Writes the manifest of a run; if there is one of an earlier run, compares it.

    Raises:
        ValueError: If the earlier run had other inputs, settings or weights, naming them.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changes = differences(before, json.loads(json.dumps(manifest)))
    if changes:
        raise ValueError(
            f"{str(folder)!r} is of a run with other settings or inputs: {'; '.join(changes)}. Run the same command "
            "as before, or choose another folder."
        )


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two values of JSON, as lines "name was ..., is ..."."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(before.keys() | now.keys())
            for line in differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == now else [f"{name} was {before!r}, is {now!r}"]


def _unit_path(folder: Path, unit: int) -> Path:
    return folder / WORK / "units" / f"unit-{unit:06d}.parquet"


def shard_name(unit: int) -> str:
    return f"{SHARDS}/shard-{unit:06d}.safetensors"


def is_complete(folder: Path, unit: int) -> bool:
    """Whether all of a unit was written; its shard may have gone since."""
    return _unit_path(folder, unit).exists()


def is_whole(folder: Path, unit: int) -> bool:
    """Whether a unit is complete, with a shard of the size that it was written with."""
    if not is_complete(folder, unit):
        return False
    try:
        return all(shard.is_there(folder) for shard in _shards(read_unit(folder, unit)))
    except (OSError, ValueError):  # The rows themselves are damaged.
        return False


def forget_unit(folder: Path, unit: int) -> None:
    """Makes a unit incomplete, if it is not already."""
    _unit_path(folder, unit).unlink(missing_ok=True)


def read_unit(folder: Path, unit: int) -> Any:
    """The rows of a complete unit, a table of `UNIT_SCHEMA`."""
    return parquet.read_table(_unit_path(folder, unit), schema=UNIT_SCHEMA)


class Shard(NamedTuple):
    """A file of features as the index tells of it: its name in the folder, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str

    def is_there(self, folder: Path) -> bool:
        """Whether the file has its size."""
        try:
            return (folder / self.name).stat().st_size == self.size
        except OSError:
            return False

    def damage(self, folder: Path) -> str:
        """What is wrong with the file, "" if nothing; all of it is read."""
        try:
            with (folder / self.name).open("rb") as file:
                digest = hashlib.sha256()
                size = 0
                while block := file.read(1 << 20):
                    digest.update(block)
                    size += len(block)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if size != self.size:
            return f"has {size} of {self.size} bytes"
        return "" if digest.hexdigest() == self.sha256 else "has other bytes than were written"


def _shards(table: Any) -> list[Shard]:
    """The shards that rows of an index lie in, in order, each once."""
    columns = (table[name].to_pylist() for name in ("shard", "shard_bytes", "shard_sha256"))
    return [Shard(*shard) for shard in dict.fromkeys(zip(*columns, strict=True)) if shard[0] is not None]


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def remove_partial_files(folder: Path) -> None:
    """Removes what a killed run was writing. Only while no other process works on the folder."""
    for place in (folder, folder / SHARDS, folder / WORK, folder / WORK / "units"):
        for path in place.glob(".*.partial"):
            path.unlink(missing_ok=True)


def _tokens_name(row: int) -> str:
    """The name of a page's tokens in its shard."""
    return f"{row}.tokens"


def write_unit(
    folder: Path,
    unit: int,
    features: dict[int, torch.Tensor],
    rows: list[dict[str, Any]],
    tokens: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> None:
    """
    Makes a unit complete: `features` are the maps (C, h, w) by their row, `tokens` the sequences (n, D) of those pages
    that have one, `rows` those of `UNIT_SCHEMA` without what they tell of the shard, with a `reason` for each rejected
    page.
    """
    if features:
        named = {str(row): tensor for row, tensor in features.items()}
        named |= {_tokens_name(row): tensor for row, tensor in tokens.items()}
        data = save({name: tensor.contiguous() for name, tensor in named.items()}, metadata={"format": "pt"})
        with atomic_file(folder / shard_name(unit)) as partial:
            partial.write_bytes(data)
        shard = {"shard": shard_name(unit), "shard_bytes": len(data), "shard_sha256": hashlib.sha256(data).hexdigest()}
        rows = [row if row.get("reason") is not None else row | shard for row in rows]
    _write_table(
        _unit_path(folder, unit), [pa.Table.from_pylist(rows, schema=UNIT_SCHEMA)], UNIT_SCHEMA, parquet.ParquetWriter
    )


def merge(folder: Path, num_units: int) -> tuple[int, int]:
    """
    Joins the rows of all units to the index and the rejects table; returns how many rows each has. Doing it again
    gives the same files; the index appears last.
    """
    counts = {REJECTS_FILE: 0, INDEX_FILE: 0}

    def tables(name: str, schema: Any) -> Iterator[Any]:
        for unit in range(num_units):
            table = read_unit(folder, unit)
            is_rejected = compute.is_valid(table["reason"])
            mask = is_rejected if name == REJECTS_FILE else compute.invert(is_rejected)
            table = table.filter(mask).select(schema.names)
            counts[name] += table.num_rows
            yield table

    _write_table(folder / REJECTS_FILE, tables(REJECTS_FILE, REJECTS_SCHEMA), REJECTS_SCHEMA, parquet.ParquetWriter)
    _write_table(folder / INDEX_FILE, tables(INDEX_FILE, INDEX_SCHEMA), INDEX_SCHEMA, parquet.ParquetWriter)
    return counts[INDEX_FILE], counts[REJECTS_FILE]


def rejects(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of the rejects table of a finished run."""
    with parquet.ParquetFile(folder / REJECTS_FILE) as file:
        for batch in file.iter_batches(PAGES_PER_WRITE):
            yield from batch.to_pylist()


class FeatureStore:
    """
    The features that `image-encoder-vit extract` has written, by the id of their page, "source#page":
    `store["scan.pdf#2"]` is a map (C, h, w), `store.tokens("scan.pdf#2")` what a decoder reads of the page, where that
    was kept; both are read from the disk when asked for. `len`, `in` and iteration are over
    ids, in the order of the corpus. Several threads may read from it, and it can be given to worker processes.

    Raises:
        FileNotFoundError: If there is no finished run in the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX_FILE).is_file():
            what = "an unfinished run: the same command finishes it" if (self.folder / WORK).is_dir() else "no features"
            raise FileNotFoundError(f"{str(folder)!r} holds {what}.")
        self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        self.index: Any = parquet.read_table(self.folder / INDEX_FILE)
        self._positions = {page_id: position for position, page_id in enumerate(self.index["id"].to_pylist())}
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __contains__(self, page_id: object) -> bool:
        return page_id in self._positions

    def row(self, page_id: str) -> dict[str, Any]:
        """
        The page's row of the index: sizes and regions in px, `grid` in cells.

        Raises:
            KeyError: If there are no features of that id.
        """
        if page_id not in self._positions:
            raise KeyError(
                f"No features of {page_id!r} in {str(self.folder)!r}; ids are like {next(iter(self), None)!r}."
            )
        row: dict[str, Any] = self.index.slice(self._positions[page_id], 1).to_pylist()[0]
        return row

    def __getitem__(self, page_id: str) -> torch.Tensor:
        row = self.row(page_id)
        return self._tensor(row["shard"], str(row["row"]))

    def tokens(self, page_id: str) -> torch.Tensor:
        """
        The sequence (n, D) that a decoder reads of the page, as a DeepEncoder has made it.

        Raises:
            KeyError: If there are no features of that id.
            ValueError: If the features were extracted without tokens.
        """
        row = self.row(page_id)
        if not self.manifest["settings"].get("tokens"):
            raise ValueError(
                f"{str(self.folder)!r} holds maps only: extract with --tokens, from a whole DeepEncoder, into another "
                "folder."
            )
        return self._tensor(row["shard"], _tokens_name(row["row"]))

    def _tensor(self, shard: str, name: str) -> torch.Tensor:
        try:
            features: torch.Tensor = self._shard(shard).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The shard {str(self.folder / shard)!r} is missing or damaged: {message_of(error)}. The "
                "command that extracted the features makes it again if it is missing or cut off; `image-encoder-vit "
                "extract --verify` tells which shards are damaged."
            ) from error
        return features

    def damaged_shards(self) -> Iterator[tuple[str, str]]:
        """Reads every shard; the names of those that are not as they were written, and what is wrong with each."""
        for shard in self.shards():
            if problem := shard.damage(self.folder):
                yield shard.name, problem

    def shards(self) -> list[Shard]:
        """
        All shards.

        Raises:
            ValueError: If the index is of a version that did not record them.
        """
        if "shard_sha256" not in self.index.column_names:
            raise ValueError(f"The index in {str(self.folder)!r} holds no digests: extract the features again.")
        return _shards(self.index)

    def _shard(self, name: str) -> Any:
        with self._lock:
            if name not in self._open:
                while len(self._open) >= MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
                self._open[name] = safe_open(self.folder / name, "pt")
            self._open.move_to_end(name)
            return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        # Open files and locks stay with their process.
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open, self._lock = OrderedDict(), threading.Lock()
