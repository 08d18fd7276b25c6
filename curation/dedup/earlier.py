"""The result of an earlier run, by the positions of its rows in the outputs as they are now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curation.dedup.groups import Members
from curation.tagged_output import ID, TaggedOutput
from storage.settings import ConfigError

GROUPS, KEEP, ABOUT = "groups.parquet", "keep.txt", "dedup.json"
OTHER_STATE = "against_ledgers"
"""The setting that tells the state of the other output: how many ledgers it had."""
_LINES = 65_536


@dataclass(frozen=True)
class Earlier:
    """What an earlier run has found: `seen` tells which rows it has looked at, bool (N,), and the groups that it made.

    A row whose representative is gone is not among those seen, because nothing stands for it any more. Memory holds 1
    byte a row, and 20 for each member of a group.
    """

    seen: NDArray[np.bool_]
    copies: Members
    similar: Members


def read_earlier(target: Path, about: dict[str, Any], outputs: Sequence[TaggedOutput]) -> Earlier | None:
    """Read the result of an earlier run in a folder; None if there was none, or the other output has changed since.

    `about` are the settings of this run. `outputs` are the output, after the other one if there is one: all groups are
    then represented by rows of the other one. Rows of the result that are gone are left out: a retry replaces rejected
    rows, and a shard may be tagged anew. While it reads, memory holds 24 bytes a row.

    Raises `ConfigError` if the folder holds something else, or a result that was made otherwise; `StoreError`.
    """
    if not target.exists():
        return None
    try:
        before = json.loads((target / ABOUT).read_text())["settings"]
        groups = pq.ParquetFile(target / GROUPS)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        if target.is_dir() and not any(target.iterdir()):
            return None
        raise _damaged(target) from None
    with groups:
        for name, value in about.items():
            if name != OTHER_STATE and before.get(name) != value:
                raise ConfigError(
                    f"--to {target}: its result was made with {name} {before.get(name)}, not {value}: "
                    "give another folder"
                )
        if before.get(OTHER_STATE) != about[OTHER_STATE]:
            return None
        starts = np.cumsum([0, *(output.rows for output in outputs)])
        shards: dict[str, int] = {}
        members = _Places(outputs[-1], int(starts[-2]), shards)
        heads = _Places(outputs[0], 0, shards) if len(outputs) > 1 else members
        seen = np.zeros(int(starts[-1]), np.bool_)
        try:
            for ids in _read_lines(target / KEEP):
                found = members.find(ids)
                seen[found[found >= 0]] = True
            made = {kind: _read_members(groups, kind, heads, members) for kind in ("identical", "copy", "similar")}
        except (OSError, ValueError, KeyError, pa.ArrowException):
            raise _damaged(target) from None
    for kind in ("copy", "similar"):
        rows = np.concatenate([made[kind].rows, np.unique(made[kind].heads)])
        if len(np.unique(rows)) != len(rows):
            raise ConfigError(f"--to {target}: {GROUPS} has an image in two groups: give another folder")
    seen[made["copy"].rows] = True
    same = made["identical"]
    seen[same.rows] = seen[same.heads] | (same.heads < starts[-2])
    return Earlier(seen, made["copy"], made["similar"])


class _Places:
    """The positions of an output's rows by their ids, as two sorted arrays: 16 bytes a row."""

    def __init__(self, output: TaggedOutput, first: int, shards: dict[str, int]) -> None:
        """Read the ids. `first` is the position of the first row. `shards` gets a number for each shard's name."""
        self._shards = shards
        codes = np.concatenate([_encode(batch[ID], shards) for batch in output.batches([ID])])
        order = np.argsort(codes)
        self._codes, self._positions = codes[order], order + first

    def find(self, ids: pa.Array) -> NDArray[np.int64]:
        """Return the positions of the rows with these ids, int64 (M,), -1 for an id that no row has."""
        codes = _encode(ids, self._shards)
        places = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[places] == codes, self._positions[places], -1)


def _encode(ids: pa.Array, shards: dict[str, int]) -> NDArray[np.int64]:
    """Return a number for each id `<shard>/<row>`, int64 (M,). Raises `ArrowInvalid` for something else."""
    parts = pc.split_pattern(ids, "/", max_splits=1, reverse=True)
    rows = pc.cast(pc.list_element(parts, 1), pa.int64()).to_numpy()
    names = pc.list_element(parts, 0).dictionary_encode()
    numbers = [shards.setdefault(name, len(shards)) for name in names.dictionary.to_pylist()]
    return np.asarray(np.asarray(numbers, np.int64)[names.indices.to_numpy()] << 32 | rows)


def _read_lines(path: Path) -> Iterator[pa.Array]:
    with path.open() as file:
        while lines := [line.rstrip("\n") for line in islice(file, _LINES)]:
            yield pa.array(lines, pa.string())


def _read_members(groups: pq.ParquetFile, kind: str, heads: _Places, members: _Places) -> Members:
    """Read the members of the groups of one kind, without those that are gone or whose representative is."""
    found = [Members()]
    columns = ["group", "kind", "representative", "cosine", ID]
    for batch in groups.iter_batches(_LINES, columns=columns):
        lines = batch.filter(pc.and_(pc.equal(batch["kind"], kind), pc.invert(batch["representative"])))
        if len(lines):
            places = heads.find(lines["group"]), members.find(lines[ID])
            here = (places[0] >= 0) & (places[1] >= 0)
            cosines = lines["cosine"].to_numpy(zero_copy_only=False)
            found.append(Members(places[0][here], places[1][here], cosines[here]))
    return Members(*(np.concatenate([getattr(one, name) for one in found]) for name in ("heads", "rows", "cosines")))


def _damaged(target: Path) -> ConfigError:
    return ConfigError(f"--to {target}: it is not empty, and has no result of `sightline dedup`")
