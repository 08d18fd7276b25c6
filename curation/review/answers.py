"""The file of answers: appended to, never rewritten, so that a kill costs at most the answer under way."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation.tagged_output import ID
from curation.truth import ANSWERS, TAKEN_BACK
from storage.settings import ConfigError

NAME = "answers.jsonl"
_KEPT = (ID, "key", "sha256", "label", "weight", "score")


class AnswerFile:
    """`answers.jsonl` beside a sample: a line for each answer, in the order in which they were given.

    The last line about an image and a label counts; one that takes an answer back leaves none. For one process: two
    that write at once would each not know of the other's answers until they start again.

    Raises `ConfigError` for a file that is of another sample, or is no such file.
    """

    def __init__(self, folder: Path, sample: pa.Table) -> None:
        self.path = folder / NAME
        self._rows = sample.select(_KEPT).to_pylist()
        self._places = {(row[ID], row["label"]): place for place, row in enumerate(self._rows)}
        self._lock = threading.Lock()
        self.given: dict[int, str] = {}
        try:
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}") from error
        self._load()

    def add(self, place: int, answer: str) -> None:
        """An answer about row `place` of the sample. On disk when this returns. Raises `ValueError`, `IndexError`."""
        if answer not in ANSWERS:
            raise ValueError(f"no such answer: {answer}")
        if not 0 <= place < len(self._rows):
            raise IndexError(f"no such row: {place}")
        line = json.dumps({**self._rows[place], "answer": answer}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._note(place, answer)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _load(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed while it wrote
            self._file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row: dict[str, Any] = json.loads(line)
                place, answer = self._places[row[ID], row["label"]], row["answer"]
            except (ValueError, TypeError):
                raise ConfigError(f"{self.path}: line {number} is no answer") from None
            except KeyError:
                raise ConfigError(f"{self.path}: line {number} is about no image of this sample") from None
            self._note(place, answer)

    def _note(self, place: int, answer: str) -> None:
        self.given.pop(place, None)
        if answer != TAKEN_BACK:
            self.given[place] = answer
