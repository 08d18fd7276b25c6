"""What becomes of the images that are selected on the page: a list, answers, an export."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from curation.browse.snapshot import Snapshot
from curation.export.export import export_output
from curation.tagged_output import ID
from storage.schemes import scheme_of
from storage.settings import ConfigError
from storage.store import StoreError


def check_positions(snapshot: Snapshot, positions: Sequence[int]) -> NDArray[np.int64]:
    """Return some positions as int64 (K,). Raises `ConfigError` for none, and for one that there is not."""
    if not positions:
        raise ConfigError("no image is selected")
    if min(positions) < 0 or max(positions) >= snapshot.rows:
        raise ConfigError("there is no such image")
    return np.asarray(positions, np.int64)


def list_ids(snapshot: Snapshot, positions: Sequence[int]) -> list[str]:
    """Return the ids of the rows at some positions, each once, for `sightline export --keep`.

    Raises `ConfigError` as `check_positions` does.
    """
    ids = snapshot.take(check_positions(snapshot, positions), [ID])[ID].to_pylist()
    return list(dict.fromkeys(ids))


class Answers:
    """A file of answers about labels of images, that the page appends to. Threads may share it.

    Each line has the columns that the option --truth of `sightline evaluate` and `sightline probe` reads: id, sha256,
    label and answer. No sample asked for them: a person has picked the images, so that they are no random ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def add(
        self, snapshot: Snapshot, positions: Sequence[int], label: str, answer: Literal["right", "wrong", "taken back"]
    ) -> int:
        """Append an answer about a label for each of some images; they are on disk afterwards. Return their number.

        An image whose row was replaced, and that is selected at both positions, is one image. An answer that is taken
        back is replaced by the one before it in the file, if there is one.

        Raises `ConfigError` for a label that the output does not have, and if the file cannot be written.
        """
        if label not in snapshot.output.labels.label_names():
            raise ConfigError(f"the output has no label {label!r}: add it to the label set, with `sightline retag`")
        taken = snapshot.take(check_positions(snapshot, positions), [ID, "key", "sha256"]).to_pylist()
        rows = {row[ID]: row for row in taken}.values()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock:
            try:
                before = self._list_before(label, {row[ID] for row in rows}) if answer == "taken back" else {}
                said = ({**row, "label": label, "answer": before.get(row[ID], answer), "at": now} for row in rows)
                lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in said)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise ConfigError(f"{self.path} cannot be written: {error.strerror or error}") from error
        return len(rows)

    def _list_before(self, label: str, ids: set[str]) -> dict[str, str]:
        """Return the last answer but one about a label of each of some images that has so many."""
        found: dict[str, list[str]] = {}
        with self.path.open(encoding="utf-8") as file:
            for text in file:
                line = json.loads(text)
                if line["label"] == label and line[ID] in ids:
                    found[line[ID]] = [*found.get(line[ID], [])[-1:], line["answer"]]
        return {one: answers[0] for one, answers in found.items() if len(answers) == 2}

    def suggest(self, snapshot: Snapshot) -> list[str]:
        """Return the commands that use the answers."""
        output, truth = shlex.quote(snapshot.output.uri), shlex.quote(str(self.path))
        return [f"sightline probe {output} --truth {truth}", f"sightline evaluate {output} --truth {truth}"]


class _Cancelled(Exception):
    """The export that is under way is not wanted any more."""


class Export:
    """One export at a time, in a thread. `describe` says how far it is, and what it did."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None
        self._said: dict[str, object] = {"state": "none", "rows": 0, "lines": []}

    def start(
        self, snapshot: Snapshot, positions: Sequence[int], target: str, destination: str, *, thumbnails: bool
    ) -> None:
        """Start an export of the rows at some positions.

        Raises `ConfigError` if one is under way, and for a destination that can be no name of a folder or file.
        """
        ids = list_ids(snapshot, positions)
        destination = _find_place(destination.strip())
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                raise ConfigError("another export is under way: wait for its end, or cancel it")
            self._cancelled.clear()
            self._said = {"state": "running", "rows": 0, "lines": []}
            arguments = (snapshot, ids, target, destination, thumbnails)
            self._thread = threading.Thread(target=self._run, args=arguments, name="export", daemon=True)
            self._thread.start()

    def describe(self) -> dict[str, object]:
        """Return `state` (none, running, done, failed, cancelled), the `rows` so far, and `lines` to show."""
        return dict(self._said)

    def cancel(self) -> None:
        """End the export that is under way, if there is one, at its next images. Then there is no destination."""
        self._cancelled.set()

    def update(self, rows: int) -> None:
        """Note the number of images so far. Ends the export by an exception if it was cancelled."""
        if self._cancelled.is_set():
            raise _Cancelled
        self._said = {**self._said, "rows": rows}

    def _run(self, snapshot: Snapshot, ids: list[str], target: str, destination: str, thumbnails: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            keep = Path(folder) / "selection.txt"
            keep.write_text("".join(f"{id_}\n" for id_ in ids), encoding="utf-8")
            try:
                done = export_output(
                    snapshot.output, target, destination, keep=keep, thumbnails=thumbnails, progress=self
                )
            except _Cancelled:
                what = "images that are there already stay" if scheme_of(destination) else "nothing was written"
                self._said = {"state": "cancelled", "rows": 0, "lines": [f"cancelled: {what}"]}
                return
            except (ConfigError, StoreError) as error:
                self._said = {"state": "failed", "rows": 0, "lines": [str(error)]}
                return
            except Exception as error:
                self._said = {"state": "failed", "rows": 0, "lines": [f"{type(error).__name__}: {error}"]}
                raise
        lines = [f"{done.images:,} images are in {done.destination}"]
        if done.without_file:
            lines.append(f"{done.without_file:,} have no file, such as {done.missing[0]}")
        self._said = {"state": "done", "rows": done.images, "lines": [*lines, *done.notices]}


def _find_place(destination: str) -> str:
    """Return a destination with a home folder in place of `~`. A URL, which Qdrant takes, stays as it is."""
    if not destination:
        raise ConfigError("name a folder that the export is written to")
    if not destination.isprintable():
        raise ConfigError(f"{destination!r} has characters that cannot be seen: name another folder")
    if scheme_of(destination):
        return destination
    try:
        return str(Path(destination).expanduser())
    except RuntimeError:
        raise ConfigError(f"{destination}: there is no such home folder") from None
