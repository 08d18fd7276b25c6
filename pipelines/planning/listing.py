"""Listing the inputs, and comparing them with those that are already planned."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from pipelines.config import JobConfig, absolute
from pipelines.inputs import images, lists
from pipelines.inputs.columns import PassedColumns
from pipelines.inputs.formats import ARCHIVES, archive_of
from pipelines.inputs.rows import ROW_VERSION, Input, InputStats, Kind, ReadColumns, Skipped, WaitReason, wait_reason
from pipelines.output.output import find_marker
from storage.hidden_names import is_hidden
from storage.schemes import is_remote, open_store
from storage.settings import ConfigError
from storage.store import Entry, InvalidUri, StoreError, StoreOptions, show

_INSPECTIONS = 16
"""Archives that are inspected at the same time."""
_TARS_SAMPLED = 16
"""Tars of a folder that are inspected before the others' images are estimated from their size."""
_QUEUE = 10_000
"""The most inputs that wait for an earlier archive's inspection, so that inputs stay in order."""


@dataclass(frozen=True)
class Waiting:
    """A shard, or an input that is not yet planned, that cannot be read now. `rows` estimates its images."""

    name: str
    reason: WaitReason
    detail: str
    rows: int


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


class KnownInputs:
    """The planned inputs, in a SQLite file: as Python objects, ten million of them would need gigabytes of memory."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path)
        # The file is deleted after one planning, so nothing in it needs to survive a crash.
        self._database.execute("pragma journal_mode = off")
        self._database.execute("pragma synchronous = off")
        self._database.execute(
            "create table known (uri text, version text, planned integer, seen integer, primary key (uri, version)) "
            "without rowid"
        )

    def add(self, rows: Iterator[tuple[str, str]]) -> None:
        """Add pairs of a URI and its version (`Input.version`)."""
        add = "insert into known values (?, ?, 1, 0) on conflict do update set planned = planned + 1"
        self._database.executemany(add, ((_normalize(uri), version) for uri, version in rows))

    def meet(self, uri: str, version: str) -> bool:
        """Tell whether a list's row that is met now was planned before: as many equal rows as were met until now.

        A row without other columns says no more than the object itself, so one such row is known if the object is.
        """
        meet = "insert into known values (?, ?, 0, 1) on conflict do update set seen = seen + 1 returning planned, seen"
        uri = _normalize(uri)
        planned, seen = self._database.execute(meet, (uri, version)).fetchone()
        if seen > planned and not version:
            objects = "select 1 from known where uri = ? and version <> '' and version not like ? limit 1"
            planned += self._database.execute(objects, (uri, f"{ROW_VERSION}%")).fetchone() is not None
        return bool(seen <= planned)

    def versions(self, uri: str) -> list[str]:
        """Return the planned versions of a URI."""
        found = self._database.execute("select version from known where uri = ?", (_normalize(uri),))
        return [row[0] for row in found]

    def holds(self, uri: str) -> bool:
        """Tell whether this URI, or an object below it, is planned. For a list, which no row names: any object."""
        below = ("", "\U0010ffff") if lists.recognizes(uri.lower()) else (f"{uri}/", f"{uri}0")  # "0" comes after "/"
        query = "select 1 from known where planned > 0 and (uri = ? or (uri > ? and uri < ?)) limit 1"
        return bool(self._database.execute(query, (uri, *below)).fetchone())

    def close(self) -> None:
        """Close the file."""
        self._database.close()


class InputLister:
    """Lists the inputs that are not planned yet.

    `known` are the planned inputs. Listing adds to `known`, to `report`, and the types of passed-through columns to
    `columns`.
    """

    def __init__(
        self, config: JobConfig, options: StoreOptions, known: KnownInputs, columns: PassedColumns, report: PlanReport
    ) -> None:
        self._config = config
        self._options = options
        self._known = known
        self._columns = columns
        self._report = report
        self._changed: set[str] = set()
        self._roots = [root.rstrip("/") + "/" for root in config.input]
        self._markers: dict[str, bool] = {}

    def list_new(self) -> Iterator[Input]:
        """Yield the new inputs in listing order, archives split into parts.

        Each object is yielded once, also if configured inputs overlap. Raises `ConfigError` if the configuration does
        not fit an input, and `StoreError` if the listing itself fails.
        """
        queue: deque[tuple[Input, Future[InputStats] | None]] = deque()
        sizes = _TarSizes()
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
        for planned in self._list_inputs():
            version = planned.version
            if planned.kind == "uri":
                if self._known.meet(planned.uri, version):
                    self._report.known += 1
                else:
                    yield planned
                continue
            versions = self._known.versions(planned.uri)
            objects = [one for one in versions if one and not one.startswith(ROW_VERSION)]
            # A row of a list has no version of its object, so an image that only a list has named cannot be compared.
            if version in objects or (versions and not objects):
                self._report.known += 1
                continue
            if versions and self._config.on_changed == "error":
                self._report.known += 1
                detail = (
                    f"{planned.uri} changed since it was planned: give it a new name, or set on_changed: retag to tag "
                    "it once more"
                )
                self._report.waiting.append(Waiting(planned.uri, "changed", detail, planned.rows))
                continue
            if versions:
                self._changed.add(planned.uri)
            self._known.add(iter([(planned.uri, version)]))
            yield planned

    def _list_inputs(self) -> Iterator[Input]:
        """Yield every object that is an input by its name, and the images that lists name. Counts all others."""
        configured, expanded = set(self._config.input), set[str]()
        skipped = self._report.skipped
        for entry in self._list_entries():
            key = next(self._relative_paths(entry.uri), None) or entry.uri.rpartition("/")[2]
            name = entry.uri.lower().rpartition("/")[2]
            if entry.uri not in configured and self._is_hidden(entry.uri):
                skipped.add(entry.uri, "hidden files")
            elif (output := self._find_output(entry.uri)) is not None:
                if output != self._config.output:  # its own files are there at each run, and no news
                    skipped.add(entry.uri, "files of outputs and samples of Sightline")
            elif entry.size < 0:
                skipped.add(entry.uri, "broken links and special files")
            elif not _is_utf8(entry.uri):
                skipped.add(entry.uri, "names that are not UTF-8")
            elif lists.recognizes(name) and entry.uri in configured:
                if entry.uri not in expanded:
                    expanded.add(entry.uri)
                    column = self._config.lists.column
                    yield from lists.expand(entry, column, self._options, skipped, self._report.columns)
            elif (archive := archive_of(name)) is not None:
                yield _plan_input(archive.KIND, entry, key)
            elif images.recognizes(name):
                yield _plan_input("image", entry, key)
            elif entry.uri in configured:
                known = f"image, tar, Parquet file or list ({', '.join(lists.SUFFIXES)})"
                raise ConfigError(f"input: {show(entry.uri)} is no {known}, by the suffix of its name")
            else:
                skipped.add_suffix(entry.uri)

    def _list_entries(self) -> Iterator[Entry]:
        """Yield every object under the configured inputs. Raises `ConfigError`."""
        # Lists come first: an image that a list names too is not planned once more for the folder that it is in.
        for uri in sorted(self._config.input, key=lambda uri: not lists.recognizes(uri.lower())):
            store = open_store(uri, self._options)
            single = store.stat(uri)
            if single is not None:
                yield single
                continue
            empty = True
            seen = len(self._report.waiting), self._report.skipped.counts.total()
            for entry in store.list(uri, self._note_unreadable):
                empty = False
                yield entry
            if not empty or seen != (len(self._report.waiting), self._report.skipped.counts.total()):
                continue
            there = not lists.recognizes(uri.lower()) if is_remote(uri) else Path(uri).is_dir()
            if not there and not self._known.holds(uri):
                raise ConfigError(f"input: {uri} does not exist")
            # If something was there at an earlier run, a mount may be missing, which leaves an empty folder.
            if self._config.on_missing == "wait" and not (there and is_remote(uri)) and self._known.holds(uri):
                what = "is empty now" if there else "does not exist now"
                self._report.waiting.append(Waiting(uri, "missing", f"input: {uri} {what}", 0))
            else:
                self._report.skipped.add(uri, f"inputs {'with nothing under them' if there else 'that do not exist'}")

    def _note_unreadable(self, path: str, error: StoreError) -> None:
        """Count a path that cannot be looked at. Inputs may be below a closed folder, so the run has to say so."""
        if self._is_hidden(path):
            self._report.skipped.add(path, "hidden files")
        elif isinstance(error, InvalidUri):
            self._report.skipped.add(path, "links to folders that are read anyway, and paths that are too long")
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
        if not any(f"{folder}/".startswith(root) for root in self._roots):
            return None
        if marker not in self._markers:
            self._markers[marker] = open_store(marker, self._options).stat(marker) is not None
        return folder if self._markers[marker] else None

    def _relative_paths(self, uri: str) -> Iterator[str]:
        """Yield the path of an object relative to each configured input that holds it."""
        return (uri[len(root) :] for root in self._roots if uri.startswith(root))

    def _is_hidden(self, uri: str) -> bool:
        """Tell whether an object is hidden below each configured input that holds it. What is above does not count."""
        return all(is_hidden(path) for path in self._relative_paths(uri))


class _TarSizes:
    """Bytes per image in the tars of each folder, learned from the first few tars and used to estimate the others."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, bool], list[float]] = {}

    def note(self, tar: Input) -> None:
        """Add a tar that was inspected."""
        if tar.kind == "tar":
            self._seen.setdefault(self._group(tar), []).append(tar.size / tar.rows)

    def estimate(self, tar: Input) -> Input | None:
        """Return the tar with estimated rows, or None if too few similar tars were inspected.

        Similar tars are in the same folder, and compressed or uncompressed like this one.
        """
        seen = self._seen.get(self._group(tar), []) if tar.kind == "tar" else []
        if len(seen) < _TARS_SAMPLED:
            return None
        return replace(tar, rows=max(1, round(tar.size / median(seen))))

    def _group(self, tar: Input) -> tuple[str, bool]:
        return tar.uri.rpartition("/")[0], tar.uri.lower().endswith("gz")


def _is_done(inspection: Future[InputStats] | None) -> bool:
    return inspection is None or inspection.done()


def _plan_input(kind: Kind, entry: Entry, key: str) -> Input:
    return Input(kind, entry.uri, key, entry.size, entry.etag)


def _normalize(uri: str) -> str:
    """Return a local path without `file://`, `.` and `..`, as `find .` writes them into lists. Others are unchanged.

    Names in an object store are literal. Only comparisons use the result; a plan has the URI as the list has it.
    """
    if ("/." not in uri and "//" not in uri) or not uri.removeprefix("file://").strip():
        return uri
    return absolute(uri)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
