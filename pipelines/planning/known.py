"""The inputs that are planned already, as arrays of hashes: ten million of them take 200 MB.

An input is recognized by two 64-bit hashes, of its URI and of its version (`Input.version`). Python's `hash` of a text
is SipHash with a key that is random in each process, so that nobody can choose names that collide. Among ten million
inputs, that two of them agree in both hashes by chance is less likely than 1 in 10^24.

The URI of a local file is its real path as the disk is now. So a file is the same input whichever of several links to
its folder a listing follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.config import absolute
from pipelines.inputs.rows import Input
from storage.links import RealPaths
from storage.schemes import is_remote
from storage.settings import ConfigError
from storage.store import Entry

NEW, KNOWN, CHANGED, NAMED = 0, 1, 2, 3
"""What `KnownInputs.find` says of an object: not planned, planned in this version, planned in another version, or not
planned and named by a row that was met in this planning."""

Hashes = NDArray[np.int64]
_NONE: Hashes = np.zeros(0, np.int64)
PLAN_COLUMNS = ("kind", "uri", "size", "etag", "metadata")
"""The columns of a plan file that `KnownInputs.add` needs."""


class KnownInputs:
    """The planned inputs, and the rows of lists that are met in this planning.

    Add all plan files first, and ask afterwards. Links are resolved below `roots`, the configured inputs.
    """

    def __init__(self, roots: Iterable[str] = ()) -> None:
        self._paths = RealPaths(root.removeprefix("file://") for root in roots if not is_remote(root))
        self._added: dict[str, list[tuple[Hashes, Hashes]]] = {"objects": [], "rows": []}
        self._objects = self._rows = (_NONE, _NONE)
        self._planned, self._seen = _NONE, _NONE  # for each of `_rows`: how many are planned, and how many were met
        self._named = self._met = _NONE  # the URIs of `_rows`, and of the rows that were met
        self._just_met: list[Hashes] = []
        self._plain: dict[int, int] = {}  # rows without columns that were met, by URI, of planned objects

    def __bool__(self) -> bool:
        """Whether anything is planned."""
        return any(self._added.values()) or len(self._objects[0]) > 0 or len(self._rows[0]) > 0

    def add(self, table: pa.Table) -> None:
        """Add the inputs of a plan file, which has the columns `PLAN_COLUMNS`."""
        listed = pc.equal(table["kind"], "uri")
        objects = table.filter(pc.invert(listed))
        versions = pc.binary_join_element_wise(pc.cast(objects["size"], pa.string()), objects["etag"], " ")
        self._append("objects", self._hash_uris(objects["uri"].to_pylist()), _hash(versions.to_pylist()))
        if len(objects) < len(table):
            rows = table.filter(listed).select(PLAN_COLUMNS).to_pylist()
            planned = [Input(key="", **row) for row in rows]
            self._append("rows", self._hash_uris(one.uri for one in planned), _hash(one.version for one in planned))

    def find(self, entries: Sequence[Entry]) -> NDArray[np.int8]:
        """Tell for each object whether it is `NEW`, `KNOWN`, `CHANGED` or `NAMED`, as int8 (N,).

        An object is known too if only rows of lists name it: a row does not have the object's version, so that it
        cannot be compared.
        """
        self._sort()
        uris = self._hash_uris(entry.uri for entry in entries)
        # Sorted, so that the places that are looked at lie beside each other in memory.
        order = np.argsort(uris)
        uris = uris[order]
        versions = _hash(f"{entry.size} {entry.etag}" for entry in entries)[order]
        planned, matches = _look_up(self._objects, uris, versions)
        sorted_ = np.where(planned, np.where(matches, KNOWN, CHANGED), NEW).astype(np.int8)
        if self._just_met:
            self._met, self._just_met = np.unique(np.concatenate([self._met, *self._just_met])), []
        for names, status in ((self._met, NAMED), (self._named, KNOWN)):
            if len(names):
                sorted_[~planned & _contains(names, uris)] = status
        found = np.empty_like(sorted_)
        found[order] = sorted_
        return found

    def meet(self, rows: Sequence[Input]) -> NDArray[np.bool_]:
        """Tell for each row of a list, in the order in which they are met, whether it was planned before: bool (N,).

        As many equal rows are known as were planned. A row without other columns says no more than the object itself,
        so one such row is known if the object is.
        """
        self._sort()
        uris, versions = self._hash_uris(row.uri for row in rows), _hash(row.version for row in rows)
        self._just_met.append(uris)
        place = _find_pair(self._rows, uris, versions)
        known = np.zeros(len(rows), np.bool_)
        order = np.argsort(place, kind="stable")
        order = order[place[order] >= 0]
        places, starts, counts = np.unique(place[order], return_index=True, return_counts=True)
        rank = np.arange(len(order)) - np.repeat(starts, counts)
        known[order] = self._seen[place[order]] + rank < self._planned[place[order]]
        np.add.at(self._seen, places, counts)
        plain = ~known & np.fromiter((not row.version for row in rows), bool, len(rows))
        if plain.any():
            plain &= _look_up(self._objects, uris, versions)[0]
            for number in np.flatnonzero(plain):
                met = self._plain[int(uris[number])] = self._plain.get(int(uris[number]), 0) + 1
                known[number] = met == 1
        return known

    def resolve(self, uri: str) -> str:
        """Return the name by which an object is recognized: the real path of a local file, else the URI."""
        return uri if is_remote(uri) else self._paths.of(_normalize(uri))

    def _hash_uris(self, uris: Iterable[str]) -> Hashes:
        return np.fromiter((hash(self.resolve(uri)) for uri in uris), np.int64)

    def _append(self, kind: str, uris: Hashes, versions: Hashes) -> None:
        # The parts of a Parquet file are neighbours, and an object needs to be known once.
        if kind == "objects" and len(uris):
            other = np.r_[True, (np.diff(uris) != 0) | (np.diff(versions) != 0)]
            uris, versions = uris[other], versions[other]
        self._added[kind].append((uris, versions))

    def _sort(self) -> None:
        """Sort what was added since the last time by URI and version."""
        if self._added["objects"]:
            self._objects, _ = _unite(self._objects, self._added["objects"])
        if self._added["rows"]:
            self._rows, self._planned = _unite(self._rows, self._added["rows"])
            self._seen = np.zeros_like(self._planned)
            self._named = np.unique(self._rows[0])


def _unite(
    first: tuple[Hashes, Hashes], added: list[tuple[Hashes, Hashes]]
) -> tuple[tuple[Hashes, Hashes], NDArray[np.int64]]:
    """Sort pairs of hashes, and join equal ones. Returns them, and how often each is there. Empties `added`."""
    uris = np.concatenate([first[0], *(uris for uris, _ in added)])
    versions = np.concatenate([first[1], *(versions for _, versions in added)])
    added.clear()
    order = np.lexsort((versions, uris))
    uris, versions = uris[order], versions[order]
    del order
    starts = np.flatnonzero(np.r_[len(uris) > 0, (np.diff(uris) != 0) | (np.diff(versions) != 0)])
    counts = np.diff(np.r_[starts, len(uris)])
    return (uris[starts], versions[starts]), counts


def _find_pair(pairs: tuple[Hashes, Hashes], uris: Hashes, versions: Hashes) -> NDArray[np.int64]:
    """Return the places of pairs among sorted ones, int64 (N,): -1 for those that are not there."""
    place = np.full(len(uris), -1, np.int64)
    at = np.searchsorted(pairs[0], uris)
    open_ = np.flatnonzero(at < len(pairs[0]))
    while len(open_):
        open_ = open_[pairs[0][at[open_]] == uris[open_]]
        right = pairs[1][at[open_]] == versions[open_]
        place[open_[right]] = at[open_[right]]
        open_ = open_[~right]
        at[open_] += 1
        open_ = open_[at[open_] < len(pairs[0])]
    return place


def _look_up(pairs: tuple[Hashes, Hashes], uris: Hashes, versions: Hashes) -> tuple[NDArray[np.bool_], ...]:
    """Tell for each URI whether it is there, and whether it is there with this version."""
    place = _find_pair(pairs, uris, versions)
    there = place >= 0
    there[~there] = _contains(pairs[0], uris[~there])
    return there, place >= 0


def _contains(values: Hashes, wanted: Hashes) -> NDArray[np.bool_]:
    at = np.searchsorted(values, wanted)
    inside = at < len(values)
    inside[inside] = values[at[inside]] == wanted[inside]
    return inside


def _hash(texts: Iterable[str]) -> Hashes:
    return np.fromiter(map(hash, texts), np.int64)


def _normalize(uri: str) -> str:
    """Return a local path without `file://`, `.` and `..`, as `find .` writes them into lists. Others are unchanged.

    Names in an object store are literal. Only comparisons use the result; a plan has the URI as the list has it.
    """
    if ("/." not in uri and "//" not in uri) or not uri.removeprefix("file://").strip():
        return uri
    try:
        return absolute(uri)
    except (ValueError, ConfigError):  # a NUL, half of a character as JSON may have it, `s3:a//b`: no file's name
        return uri
