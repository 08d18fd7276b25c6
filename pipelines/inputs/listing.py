"""Listing the inputs, and comparing them with those that are already planned."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from pipelines.config import JobConfig
from pipelines.inputs import images, lists
from pipelines.inputs.columns import PassedColumns
from pipelines.inputs.formats import ARCHIVES, archive_of
from pipelines.inputs.rows import Input, InputStats, Kind, Skipped, WaitReason, wait_reason
from storage.schemes import is_remote, open_store
from storage.settings import ConfigError
from storage.store import Entry, StoreError, StoreOptions

_LOOKS_AHEAD = 16
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

    `waiting` are inputs that could not be inspected, and changed inputs that the configuration tells to skip. They are
    not planned, and the next run inspects them again.
    """

    inputs: int = 0
    shards: int = 0
    rows: int = 0
    known: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    waiting: list[Waiting] = field(default_factory=list)


class KnownInputs:
    """The planned inputs, in a SQLite file: as Python objects, ten million of them would need gigabytes of memory."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path)
        # The file is deleted after one planning, so nothing in it needs to survive a crash.
        self._database.execute("pragma journal_mode = off")
        self._database.execute("pragma synchronous = off")
        self._database.execute("create table known (uri text, version text, primary key (uri, version)) without rowid")

    def add(self, rows: Iterator[tuple[str, str]]) -> None:
        """Add pairs of a URI and its version (`Input.version`)."""
        self._database.executemany("insert or ignore into known values (?, ?)", rows)

    def versions(self, uri: str) -> list[str]:
        """Return the planned versions of a URI."""
        return [row[0] for row in self._database.execute("select version from known where uri = ?", (uri,))]

    def holds(self, uri: str) -> bool:
        """Tell whether this URI, or an object below it, is planned."""
        query = "select 1 from known where uri = ? or (uri > ? and uri < ?) limit 1"
        return bool(
            self._database.execute(query, (uri, f"{uri}/", f"{uri}0")).fetchone()
        )  # "0" is the character after "/"

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def list_new(
    config: JobConfig, options: StoreOptions, known: KnownInputs, columns: PassedColumns, report: PlanReport
) -> Iterator[Input]:
    """Yield the inputs that are not planned yet, in listing order; archives are split into parts.

    Each object is yielded once, also if configured inputs overlap. Adds to `report` and `columns`. Raises `ConfigError`
    if the configuration does not fit an input, and `StoreError` if the listing itself fails.
    """
    queue: deque[tuple[Input, Future[InputStats] | None]] = deque()
    folders = _Folders()
    looking = 0
    with ThreadPoolExecutor(_LOOKS_AHEAD) as pool:

        def take_first() -> Iterator[Input]:
            nonlocal looking
            planned, look = queue.popleft()
            looking -= look is not None
            for found in _finish_look(planned, look, columns, report):
                if look is not None:
                    folders.note(found)
                yield found

        for planned in _list_unknown(config, options, known, report):
            archive, guessed = ARCHIVES.get(planned.kind), folders.guess(planned)
            look = pool.submit(archive.size_up, planned, config, options) if archive and guessed is None else None
            queue.append((guessed or planned, look))
            looking += look is not None
            while queue and (_is_done(queue[0][1]) or looking > 2 * _LOOKS_AHEAD or len(queue) > _QUEUE):
                yield from take_first()
        while queue:
            yield from take_first()


class _Folders:
    """Bytes per image in the tars of each folder, learned from the first few tars and used to estimate the others."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, bool], list[float]] = {}

    def note(self, tar: Input) -> None:
        """Add a tar that was inspected itself."""
        if tar.kind == "tar":
            self._seen.setdefault(self._group(tar), []).append(tar.size / tar.rows)

    def guess(self, tar: Input) -> Input | None:
        """Return the tar with estimated rows, or None if too few similar tars were inspected.

        Similar tars are in the same folder, and compressed or uncompressed like this one.
        """
        seen = self._seen.get(self._group(tar), []) if tar.kind == "tar" else []
        if len(seen) < _TARS_SAMPLED:
            return None
        return replace(tar, rows=max(1, round(tar.size / median(seen))))

    def _group(self, tar: Input) -> tuple[str, bool]:
        return tar.uri.rpartition("/")[0], tar.uri.lower().endswith("gz")


def _is_done(look: Future[InputStats] | None) -> bool:
    return look is None or look.done()


def _finish_look(
    planned: Input, look: Future[InputStats] | None, columns: PassedColumns, report: PlanReport
) -> Iterator[Input]:
    try:
        found = look.result() if look else InputStats([planned])
    except StoreError as error:
        report.waiting.append(Waiting(planned.uri, wait_reason(error), str(error), 1))
        return
    if not found.parts:
        report.skipped.add(planned.uri, "Parquet files without an image column")
        return
    if found.schema is not None:
        columns.add(planned.uri, found.schema, found.small_integers)
    report.inputs += 1
    yield from found.parts


def _list_unknown(config: JobConfig, options: StoreOptions, known: KnownInputs, report: PlanReport) -> Iterator[Input]:
    for planned in _classify(config, options, known, report):
        version, versions = planned.version, known.versions(planned.uri)
        if version in versions or (versions and ("" in versions or not version)):
            report.known += 1
            continue
        if versions and config.on_changed == "error":
            report.known += 1
            detail = (
                f"{planned.uri} changed since it was planned: give it a new name, or set on_changed: retag to tag it "
                "once more"
            )
            report.waiting.append(Waiting(planned.uri, "changed", detail, planned.rows))
            continue
        known.add(iter([(planned.uri, version)]))
        yield planned


def _list_entries(config: JobConfig, options: StoreOptions, known: KnownInputs, report: PlanReport) -> Iterator[Entry]:
    """Yield every object under the configured inputs, except the output's files. Raises `ConfigError`."""
    own = config.output + "/"
    for uri in config.input:
        store = open_store(uri, options)
        single = store.stat(uri)
        if single is not None:
            yield single
            continue
        empty = True
        for entry in store.list(uri):
            empty = False
            if not entry.uri.startswith(own):
                yield entry
        if empty and (is_remote(uri) or Path(uri).is_dir()):
            report.skipped.add(uri, "inputs with nothing under them")
        elif empty:
            if not known.holds(uri):
                raise ConfigError(f"input: {uri} does not exist")
            if config.on_missing == "wait":  # it existed at an earlier run, so a mount may be missing
                report.waiting.append(Waiting(uri, "missing", f"input: {uri} does not exist now", 0))


def _classify(config: JobConfig, options: StoreOptions, known: KnownInputs, report: PlanReport) -> Iterator[Input]:
    roots = [root.rstrip("/") + "/" for root in config.input]
    named = set(config.input)
    for entry in _list_entries(config, options, known, report):
        root = next((root for root in roots if entry.uri.startswith(root)), "")
        key = entry.uri.removeprefix(root) if root else entry.uri.rpartition("/")[2]
        name = entry.uri.lower().rpartition("/")[2]
        if entry.size < 0:
            report.skipped.add(_printable(entry.uri), "broken links and special files")
        elif not _is_utf8(entry.uri):
            report.skipped.add(_printable(entry.uri), "names that are not UTF-8")
        elif name.startswith("._"):
            report.skipped.add(entry.uri, "hidden files")
        elif lists.recognizes(name) and entry.uri in named:
            yield from lists.expand(entry, options)
        elif (archive := archive_of(name)) is not None:
            yield _plan_input(archive.KIND, entry, key)
        elif images.recognizes(name):
            yield _plan_input("image", entry, key)
        else:
            report.skipped.add_suffix(entry.uri)


def _plan_input(kind: Kind, entry: Entry, key: str) -> Input:
    return Input(kind, entry.uri, key, entry.size, entry.etag)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode()
