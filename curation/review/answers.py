"""The answers of one person about a sample: a file that is only appended to, so that a kill loses at most one save."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from curation.tagged_output import ID
from storage.settings import ConfigError

RIGHT, WRONG, UNSURE, TAKEN_BACK = "right", "wrong", "unsure", "taken back"
ANSWERS = (RIGHT, WRONG, UNSURE, TAKEN_BACK)
NOBODY, SETTLED = "", "settled"
"""Names of answers files: that of the person without a name, and that of the settled disagreements."""
_NAME = re.compile(r"[\w-]{1,64}")
_COLUMNS = (ID, "key", "sha256", "label", "sample", "stratum", "weight", "score")
"""The columns of the sample that are copied to each answer."""


class State(NamedTuple):
    """What counts for a question: a row of the sample, its answer or None, and the version of both.

    The version is the number of the last line in the file about the row, 0 if there is none.
    """

    row: int
    answer: str | None
    version: int


class NewAnswer(NamedTuple):
    """An answer about a row of the sample, from a person who knows the given version of the row's state."""

    row: int
    answer: str
    version: int


class Conflict(Exception):
    """Some questions have got another answer than the person knows of. Nothing was saved. `states` is what counts."""

    def __init__(self, states: list[State]) -> None:
        super().__init__(f"{len(states)} questions have other answers in the meantime")
        self.states = states


def answers_path(folder: Path, name: str = NOBODY) -> Path:
    """Return the path of a person's answers file in the folder of a sample. It need not exist.

    Raises `ConfigError` for a name with other characters than letters, digits, - and _.
    """
    if name == NOBODY:
        return folder / "answers.jsonl"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"the name {name!r} cannot be a part of a file's name: use letters, digits, - and _")
    return folder / f"answers-{name}.jsonl"


def read_answer_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a file of JSON objects, one on each line: the objects, and the number of dropped unfinished lines, 0 or 1.

    Lines end with a line feed and with nothing else: a text in JSON may contain U+2028 and other characters at which
    Python splits lines. The last line is unfinished, and is dropped, if no line feed follows and it is not JSON: that
    is what a process leaves that was killed while it wrote. Blank lines do not count.

    Raises `ConfigError` when the file cannot be read, and for any other line that is not a JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    rows, unfinished = _parse_lines(path, content)
    return rows, int(unfinished is not None)


def _parse_lines(path: Path, content: bytes) -> tuple[list[dict[str, Any]], int | None]:
    """Return the objects, and the number of the byte at which an unfinished last line starts, or None."""
    rows: list[dict[str, Any]] = []
    *whole, last = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate([*whole, last], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number > len(whole):
                return rows, len(content) - len(last)
            raise ConfigError(f"{path}: line {number} is not JSON") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: line {number} is not a JSON object")
        rows.append(row)
    return rows, None


class AnswerFile:
    """The answers file of one person beside a sample: one line for each answer, in the order of the answers.

    The last line about an image and a label counts. A line that takes an answer back leaves the question unanswered.
    `current` maps the sample's rows to the answers that count, in the order in which they were given. `dropped` is the
    number of unfinished lines that were removed from the end of the file, 0 or 1. Threads may share it. The file is
    locked as long as this object is open, because two processes would not see each other's answers.

    Raises `ConfigError` when another process has the file open, when it belongs to another sample or is not an answers
    file, and when it cannot be written or locked.
    """

    def __init__(self, folder: Path, sample: pa.Table, name: str = NOBODY) -> None:
        self.path = answers_path(folder, name)
        if missing := [column for column in _COLUMNS if column not in sample.column_names]:
            raise ConfigError(f"the sample in {folder} has no column {missing[0]!r}: draw it again")
        self._rows = sample.select(_COLUMNS).to_pylist()
        self._lock = threading.Lock()
        self._log: list[int] = []  # the row that each line is about
        self._versions: dict[int, int] = {}
        self.current: dict[int, str] = {}
        try:
            # Not buffered: a failed write must leave nothing that a later write would repeat.
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}") from error
        try:
            self._lock_file(folder)
            self.dropped = self._load()
        except BaseException:
            self._file.close()
            raise

    @property
    def version(self) -> int:
        """The number of lines in the file."""
        return len(self._log)

    def save(self, answers: Sequence[NewAnswer]) -> None:
        """Append answers, all of them or none. They are on disk when the method returns.

        An answer that counts already is not written again, so a request may be repeated. Raises `Conflict` when a
        question has another answer than its `NewAnswer.version` says, `ValueError` for an unknown answer or two answers
        about one row, `IndexError` for an unknown row, and `OSError` when the write fails.
        """
        if len({new.row for new in answers}) < len(answers):
            raise ValueError("two answers are about one row")
        for new in answers:
            if new.answer not in ANSWERS:
                raise ValueError(f"no such answer: {new.answer}")
            if not 0 <= new.row < len(self._rows):
                raise IndexError(f"no such row: {new.row}")
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock:
            changed = [new for new in answers if self.current.get(new.row, TAKEN_BACK) != new.answer]
            if others := [new.row for new in changed if new.version != self._versions.get(new.row, 0)]:
                raise Conflict([self._state(row) for row in others])
            lines = [{**self._rows[new.row], "answer": new.answer, "at": at} for new in changed]
            self._append("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            for new in changed:
                self._record(new.row, new.answer)

    def changes(self, since: int) -> list[State]:
        """Return what counts for the questions that lines after the first `since` are about, oldest answer first."""
        with self._lock:
            rows = sorted(set(self._log[max(0, since) :]), key=lambda row: self._versions[row])
            return [self._state(row) for row in rows]

    def close(self) -> None:
        """Close the file, and let other processes open it."""
        self._file.close()

    def _lock_file(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"{self.path} cannot be locked: {error.strerror}: copy the sample to a local disk"
                ) from error
            raise ConfigError(
                f"{self.path} is in use by another `sightline review`: use its page, which may be open in several "
                f"tabs, or, for another person, `sightline review {folder} --name NAME --port 0`"
            ) from error

    def _append(self, data: bytes) -> None:
        """Write bytes to the end of the file, all of them or none. Raises `OSError`."""
        if not data:
            return
        before = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) or 0 :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(before)
            raise

    def _load(self) -> int:
        content = self.path.read_bytes()
        lines, unfinished = _parse_lines(self.path, content)
        if unfinished is not None:
            self._file.truncate(unfinished)
        elif content and not content.endswith(b"\n"):
            self._append(b"\n")
        indices = {(row[ID], row["label"]): index for index, row in enumerate(self._rows)}
        for number, line in enumerate(lines, 1):
            if line.get("answer") not in ANSWERS:
                raise ConfigError(f"{self.path}: answer {number} is {line.get('answer')!r}: use {', '.join(ANSWERS)}")
            about = line.get(ID), line.get("label")
            row = next((indices[one] for one in [about] if all(map(_is_text, one)) and one in indices), None)
            if row is None or line.get("sample") != self._rows[row]["sample"]:
                raise ConfigError(f"{self.path}: answer {number} is about a question that is not in this sample")
            self._record(row, line["answer"])
        return int(unfinished is not None)

    def _record(self, row: int, answer: str) -> None:
        self._log.append(row)
        self._versions[row] = len(self._log)
        self.current.pop(row, None)
        if answer != TAKEN_BACK:
            self.current[row] = answer

    def _state(self, row: int) -> State:
        return State(row, self.current.get(row), self._versions.get(row, 0))


def _is_text(value: object) -> bool:
    return isinstance(value, str)
