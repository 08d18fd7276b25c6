"""The answers file of a review. It is only appended to, so that a kill loses at most the answer being written."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation.quality.truth import ANSWERS, TAKEN_BACK
from curation.tagged_output import ID
from storage.settings import ConfigError

NAME = "answers.jsonl"
_COLUMNS = (ID, "key", "sha256", "label", "weight", "score")
"""The columns of the sample that are copied to each answer."""


class AnswerFile:
    """The file `answers.jsonl` beside a sample: one line for each answer, in the order of the answers.

    The last line about an image and a label counts. A line that takes an answer back leaves the question unanswered.
    `current` maps the sample's rows to the answers that count. Use one process at a time: two that write at once do not
    see each other's answers until they are started again.

    Raises `ConfigError` when the file belongs to another sample, is not an answers file, or cannot be written.
    """

    def __init__(self, folder: Path, sample: pa.Table) -> None:
        self.path = folder / NAME
        self._rows = sample.select(_COLUMNS).to_pylist()
        self._indices = {(row[ID], row["label"]): index for index, row in enumerate(self._rows)}
        self._lock = threading.Lock()
        self.current: dict[int, str] = {}
        try:
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}") from error
        self._load()

    def add(self, row: int, answer: str) -> None:
        """Append an answer about a row of the sample. It is on disk when the method returns.

        Raises `ValueError` for an unknown answer, `IndexError` for an unknown row, `OSError` when the write fails.
        """
        if answer not in ANSWERS:
            raise ValueError(f"no such answer: {answer}")
        if not 0 <= row < len(self._rows):
            raise IndexError(f"no such row: {row}")
        line = json.dumps({**self._rows[row], "answer": answer}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._record(row, answer)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _load(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # an earlier process was killed while it wrote
            self._file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                parsed: dict[str, Any] = json.loads(line)
                row = self._indices[parsed[ID], parsed["label"]]
                answer = parsed["answer"]
            except (ValueError, TypeError):
                raise ConfigError(f"{self.path}: line {number} is not an answer") from None
            except KeyError:
                raise ConfigError(f"{self.path}: line {number} is about an image that is not in this sample") from None
            self._record(row, answer)

    def _record(self, row: int, answer: str) -> None:
        self.current.pop(row, None)
        if answer != TAKEN_BACK:
            self.current[row] = answer
