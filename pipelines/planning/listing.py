"""Listing the inputs, and comparing them with those that are already planned."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TypeVar

from pipelines.config import JobConfig
from pipelines.inputs import images, lists
from pipelines.inputs.columns import PassedColumns
from pipelines.inputs.formats import ARCHIVES, archive_of, open_list
from pipelines.inputs.rows import Input, InputStats, Kind, ReadColumns, Skipped, WaitReason, wait_reason
from pipelines.output.output import find_marker
from pipelines.planning import inventory
from pipelines.planning.dates import fixed_part
from pipelines.planning.known import CHANGED, KNOWN, NAMED, KnownInputs
from pipelines.planning.roots import Roots, is_empty
from pipelines.planning.tar_sizes import TarSizes
from storage.schemes import is_remote, open_store
from storage.settings import ConfigError
from storage.store import Entry, InvalidUri, LinkNotFollowed, StoreError, StoreOptions, show

_INSPECTIONS = 16
"""Archives that are inspected at the same time."""
_QUEUE = 10_000
"""The most inputs that wait for an earlier archive's inspection, so that inputs stay in order."""
_BATCH, _BATCH_CHARS = 16_384, 16 << 20
"""Listed objects, or rows of a list, that are compared with the plan at once, and the characters of such rows: a list
may have long texts beside its images."""

T = TypeVar("T")


@dataclass(frozen=True)
class Waiting:
    """A shard, or an input that is not yet planned, that cannot be read now. `rows` estimates its images.

    `shards` is more than 1 if it stands for several shards, which were not tried.
    """

    name: str
    reason: WaitReason
    detail: str
    rows: int
    shards: int = 1


@dataclass
class PlanReport:
    """The counts of a planning: new `inputs`, new `shards`, their `rows` (estimated for tars), and `known` inputs.

    `columns` are the columns that images are read from, of new Parquet files and of all lists. `changed` of the new
    inputs were planned before, in another version, and hold about `changed_rows` images (`on_changed: retag`).
    `waiting` are inputs that could not be inspected, and changed inputs that the configuration tells to skip. They are
    not planned, and the next run inspects them again.
    """

    inputs: int = 0
    shards: int = 0
    rows: int = 0
    known: int = 0
    changed: int = 0
    changed_rows: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    notes: list[str] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)
    columns: ReadColumns = field(default_factory=ReadColumns)


class InputLister:
    """Lists the inputs that are not planned yet.

    `known` are the planned inputs, and `holds` tells whether a URI, or an object below it, is planned. Listing adds to
    `report`, and the types of passed-through columns to `columns`.
    """

    def __init__(
        self,
        config: JobConfig,
        options: StoreOptions,
        known: KnownInputs,
        holds: Callable[[str], bool],
        columns: PassedColumns,
        report: PlanReport,
    ) -> None:
        self._config = config
        self._options = options
        self._known, self._holds = known, holds
        self._columns = columns
        self._report = report
        self._changed: set[str] = set()
        self._inputs = config.list_inputs()
        self._roots = Roots(self._inputs)
        self._markers: dict[str, bool] = {}

    def list_new(self) -> Iterator[Input]:
        """Yield the new inputs in listing order, archives split into parts.

        Each object is yielded once, also if configured inputs overlap. Raises `ConfigError` if the configuration does
        not fit an input, and `StoreError` if the listing itself fails.
        """
        queue: deque[tuple[Input, Future[InputStats] | None]] = deque()
        sizes = TarSizes()
        running = 0
        with ThreadPoolExecutor(_INSPECTIONS) as pool:

            def take_first() -> Iterator[Input]:
                nonlocal running
                planned, inspection = queue.popleft()
                running -= inspection is not None
                for part in self._finish(planned, inspection):
                    if inspection is not None:
                        sizes.note(part)
                    yield part

            for planned in self._list_unknown():
                archive, estimated = ARCHIVES.get(planned.kind), sizes.estimate(planned)
                inspection = None
                if archive and estimated is None:
                    inspection = pool.submit(archive.inspect, planned, self._config, self._options)
                queue.append((estimated or planned, inspection))
                running += inspection is not None
                while queue and (_is_done(queue[0][1]) or running > 2 * _INSPECTIONS or len(queue) > _QUEUE):
                    yield from take_first()
            while queue:
                yield from take_first()

    def _finish(self, planned: Input, inspection: Future[InputStats] | None) -> Iterator[Input]:
        try:
            found = inspection.result() if inspection else InputStats([planned])
        except StoreError as error:
            self._report.waiting.append(Waiting(planned.uri, wait_reason(error), str(error), 1))
            return
        if not found.parts:
            self._report.skipped.add(planned.uri, found.skipped)
            return
        if found.column:
            self._report.columns.add("Parquet file", found.column, planned.uri)
        if found.schema is not None:
            self._columns.add(planned.uri, found.schema, found.small_integers)
        self._report.inputs += 1
        if planned.uri in self._changed:
            self._report.changed += 1
            self._report.changed_rows += sum(part.rows for part in found.parts)
        yield from found.parts

    def _list_unknown(self) -> Iterator[Input]:
        expanded = set[str]()
        for entry, changed in self._list_objects():
            if entry.uri in expanded:
                continue
            if entry.uri in self._inputs and (rows := self._open_list(entry)) is not None:
                expanded.add(entry.uri)
                yield from self._expand(rows)
                continue
            planned = self._classify(entry)
            if planned is None:
                continue
            if changed and self._config.on_changed == "error":
                self._report.known += 1
                detail = (
                    f"{entry.uri} changed since it was planned: give it a new name, or set on_changed: retag to tag it "
                    "once more"
                )
                self._report.waiting.append(Waiting(entry.uri, "changed", detail, 1))
                continue
            if changed:
                self._changed.add(entry.uri)
            yield planned

    def _list_objects(self) -> Iterator[tuple[Entry, bool]]:
        """Yield the listed objects that are not planned in this version, each with whether another version is."""
        for entries in self._list_entries():
            for group in _batch(entries):
                for entry, status in zip(group, self._known.find(group).tolist(), strict=True):
                    if not self._roots.meet(entry):
                        continue
                    if status == KNOWN:
                        self._report.known += 1
                    elif status == NAMED:
                        self._report.skipped.add(entry.uri, "images that a list names too")
                    else:
                        yield entry, status == CHANGED

    def _open_list(self, entry: Entry) -> Iterator[Input] | None:
        report = self._report
        return open_list(entry, self._config, self._options, report.skipped, report.columns)

    def _expand(self, rows: Iterator[Input]) -> Iterator[Input]:
        """Yield the rows of a list that are not planned."""
        for group in _batch(rows, lambda row: len(row.metadata or "")):
            known = self._known.meet(group).tolist()
            self._report.known += sum(known)
            yield from (row for row, is_known in zip(group, known, strict=True) if not is_known)

    def _classify(self, entry: Entry) -> Input | None:
        """Return the input that an object is by its name, or None. Counts what is no input."""
        skipped = self._report.skipped
        key = self._roots.key_of(entry.uri)
        name = entry.uri.lower().rpartition("/")[2]
        configured = entry.uri in self._inputs
        if not configured and self._roots.is_hidden(entry.uri):
            skipped.add(entry.uri, "hidden files")
        elif (output := self._find_output(entry.uri)) is not None:
            if output != self._config.output:  # its own files are there at each run, and no news
                skipped.add(entry.uri, "files of outputs and samples of Sightline")
        elif entry.size < 0:
            skipped.add(entry.uri, "broken links and special files")
        elif not _is_utf8(entry.uri):
            skipped.add(entry.uri, "names that are not UTF-8")
        elif (archive := archive_of(name)) is not None:
            return _plan_input(archive.KIND, entry, key)
        elif images.recognizes(name):
            return _plan_input("image", entry, key)
        elif configured:
            known = f"image, tar, Parquet file or list ({', '.join(lists.SUFFIXES)})"
            raise ConfigError(f"input: {show(entry.uri)} is no {known}, by the suffix of its name")
        else:
            skipped.add_suffix(entry.uri)
        return None

    def _list_entries(self) -> Iterator[Iterable[Entry]]:
        """Yield the objects of each configured input. Raises `ConfigError`."""
        lost = tuple(f"{folder}/" for folder in self._find_lost())
        # Lists come first: an image that a list names too is not planned once more for the folder that it is in.
        for uri in sorted(self._inputs, key=lambda uri: not lists.recognizes(uri.lower())):
            if uri.startswith(lost) and uri not in self._config.input:
                continue
            store = open_store(uri, self._options)
            single = store.stat(uri)
            if single is not None and inventory.recognizes(uri):
                yield self._list_inventory(single)
                continue
            if single is not None:
                yield [single]
                continue
            seen = len(self._report.waiting), self._report.skipped.counts.total()
            listed = iter(store.list(uri, self._note_unreadable, self._roots.links))
            first = list(islice(listed, 1))
            if first:
                yield chain(first, listed)
            if first or seen != (len(self._report.waiting), self._report.skipped.counts.total()):
                continue
            there = not lists.recognizes(uri.lower()) if is_remote(uri) else os.path.isdir(uri)
            self._note_nothing(uri, there, uri in self._config.input)

    def _find_lost(self) -> list[str]:
        """Return the folders of all days that are not there or empty, although something was planned in them.

        A day without a folder is no error, so without this a mount that is missing would be none, and the days that
        were not listed would not be listed later.
        """
        found = []
        for one in self._config.input:
            folder = fixed_part(one)
            if folder is None or is_remote(one) or folder in found:
                continue
            there = os.path.isdir(folder)
            if (not there or is_empty(folder)) and self._note_nothing(folder, there, not there, one):
                found.append(folder)
        return found

    def _note_nothing(self, uri: str, there: bool, refused: bool, named: str = "") -> bool:
        """Count an input with nothing under it, and tell whether it waits: if something was there at an earlier run.

        Then a mount may be missing, which leaves an empty folder. One that was never there is `refused` with a
        `ConfigError`. `named` is the configured input, if it is another one.
        """
        planned = self._was_planned(uri, named or uri)
        if refused and not there and not planned:
            raise ConfigError(f"input: {uri} does not exist")
        if self._config.on_missing == "wait" and not (there and is_remote(uri)) and planned:
            what = "is empty now" if there else "does not exist now"
            self._report.waiting.append(Waiting(uri, "missing", f"input: {uri} {what}", 0))
            return True
        if not named:
            self._report.skipped.add(uri, f"inputs {'with nothing under them' if there else 'that do not exist'}")
        return False

    def _list_inventory(self, manifest: Entry) -> Iterator[Entry]:
        """Yield the objects of an inventory. Their keys are relative to the bucket."""
        for entry in inventory.list_inventory(manifest, self._options, self._report.skipped):
            self._roots.add(entry.uri[: entry.uri.index("/", len("s3://")) + 1])
            yield entry

    def _was_planned(self, uri: str, named: str) -> bool:
        """Tell whether this URI, or an object below it, is planned. For a list, which no row names: any object."""
        return bool(self._known) and (lists.recognizes(named.lower()) or self._holds(uri))

    def _note_unreadable(self, path: str, error: StoreError) -> None:
        """Count a path that cannot be looked at. Inputs may be below a closed folder, so the run has to say so."""
        if self._roots.is_hidden(path):
            self._report.skipped.add(path, "hidden files")
        elif isinstance(error, LinkNotFollowed):
            self._report.skipped.add(path, "links in a circle or to a folder that is read anyway")
        elif isinstance(error, InvalidUri):
            self._report.skipped.add(path, "paths that are too long")
        else:
            self._report.waiting.append(Waiting(show(path), wait_reason(error), f"{error}: not listed", 0))

    def _find_output(self, uri: str) -> str | None:
        """Return the folder of the output or sample that an object is a file of, or None for all other objects.

        What lies in the output's folder besides is an input. A part of an output that is configured itself, such as
        its folder `data`, is read.
        """
        marker = find_marker(uri)
        if marker is None:
            return None
        folder = marker.rpartition("/")[0]
        if not self._roots.holds(folder):
            return None
        if marker not in self._markers:
            self._markers[marker] = open_store(marker, self._options).stat(marker) is not None
        return folder if self._markers[marker] else None


def _is_done(inspection: Future[InputStats] | None) -> bool:
    return inspection is None or inspection.done()


def _plan_input(kind: Kind, entry: Entry, key: str) -> Input:
    return Input(kind, entry.uri, key, entry.size, entry.etag)


def _batch(items: Iterable[T], count_chars: Callable[[T], int] = lambda item: 0) -> Iterator[list[T]]:
    """Yield the items in lists of up to `_BATCH`, which end with the item with which they have `_BATCH_CHARS`."""
    group: list[T] = []
    chars = 0
    for item in items:
        group.append(item)
        chars += count_chars(item)
        if len(group) >= _BATCH or chars >= _BATCH_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
