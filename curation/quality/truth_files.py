"""Files of people's answers: JSONL, CSV, Parquet, a Label Studio export, and the folder of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from curation.review.agreement import read_reviews
from curation.review.answers import ANSWERS, RIGHT, TAKEN_BACK, read_answer_lines
from curation.review.labelstudio import read_answers
from curation.sampling.files import FILES
from curation.tagged_output import ID
from storage.settings import ConfigError

SEPARATOR = "|"
ID_COLUMNS = (ID, "sha256", "key")
"""The columns that may name an image. The first of them that a file has is used."""
_TEXT_COLUMNS = (*ID_COLUMNS, "label", "labels", "answer", "sample")
_MAX_NAMES = 3


@dataclass(frozen=True)
class TruthRow:
    """What a row of a file says: about the image `image`, these labels are right, wrong, or neither is known.

    A row with `label` None is about all labels of the label set: those in `labels` are right, and the others wrong.
    `sample` is the id of the sample that asked, or empty. `weight` is NaN if the row has none. `sha256` is that of the
    image beside its name, or empty.
    """

    image: str
    label: str | None
    answer: str
    labels: tuple[str, ...]
    sample: str
    weight: float
    sha256: str = ""


@dataclass(frozen=True)
class TruthFile:
    """The rows of a file. `name_column` names the images. `exclusive`: exactly one label is right for each image.

    `notices` are one-line warnings about the file.
    """

    path: Path
    name_column: str
    rows: list[TruthRow]
    exclusive: bool
    notices: list[str]

    @property
    def complete(self) -> bool:
        """Whether each row is about all labels."""
        return bool(self.rows) and self.rows[0].label is None


def read_truth_file(path: Path) -> TruthFile:
    """Read a file of answers. The last answer about an image and a label counts; one that is taken back does not.

    The columns decide what a row is:

    * `label` and `answer` (right, wrong, unsure, taken back): a row is an answer.
    * `labels`, a list or names separated by |: a row is an image. These labels are right and all others are wrong.
    * `label` without `answer`: a row is an image with exactly one right label.

    A last line of a JSONL file that was not written to its end is left out, with a notice. Raises `ConfigError` for
    other columns and values, for two rows about all labels of one image, and for the questions of a sample, which are
    no answers.
    """
    notices: list[str] = []
    rows, columns = _load(path, notices)
    name = next((name for name in ID_COLUMNS if name in columns), None)
    if name is None:
        raise ConfigError(f"{path}: no column that names the images: add one of {', '.join(ID_COLUMNS)}")
    if "answer" in columns:
        return TruthFile(path, name, _read_answers(path, rows, name), False, notices)
    if {"stratum", "score", "label"} <= columns:
        raise ConfigError(f"{path} holds the questions of a sample and no answers: give the file with the answers")
    if "labels" not in columns and "label" not in columns:
        raise ConfigError(
            f"{path}: no column `labels` or `label`: see curation/README.md for the columns of a truth file"
        )
    many = "labels" in columns
    found: dict[str, TruthRow] = {}
    twice = []
    for row in rows:
        image = _read_text(path, row.get(name), name)
        labels = _split_labels(path, row.get("labels")) if many else [_read_text(path, row.get("label"), "label")]
        if image in found:
            twice.append(image)
        weight, digest = _read_weight(path, row.get("weight")), str(row.get("sha256") or "")
        found[image] = TruthRow(image, None, RIGHT, tuple(labels), "", weight, digest)
    if twice:
        raise ConfigError(
            f"{path}: several rows for one image: {list_some(twice)}. Write one row with all labels of the image"
        )
    return TruthFile(path, name, list(found.values()), not many, notices)


def read_truth_folder(folder: Path) -> list[TruthFile]:
    """Read all answers in the folder of a sample: those of the review page, merged, and Label Studio's exports.

    Of people who answered the same questions, see `curation.review.agreement`: where they disagree, the answer is
    unsure until it is settled, and a notice counts these questions. Raises `ConfigError` as `read_truth_file` does.
    """
    if not (folder / FILES[0]).exists():
        raise ConfigError(f"{folder} is a folder, and not the folder of a sample: name a file of answers")
    found = []
    reviews = read_reviews(folder)
    if reviews.people or reviews.settled:
        notices = reviews.describe() if len(reviews.people) > 1 else []
        if reviews.dropped:
            notices.append(f"{folder}: {reviews.dropped} last lines were not written to their end, and are left out")
        found.append(TruthFile(folder / FILES[0], ID, _read_answers(folder, reviews.merge(), ID), False, notices))
    found += map(read_truth_file, find_exports(folder))
    if not found:
        raise ConfigError(f"{folder} holds no answers: run `sightline review {folder}`")
    return found


def find_exports(folder: Path) -> list[Path]:
    """The exports of Label Studio in the folder of a sample."""
    return [one for one in sorted(folder.glob("*.json")) if one.name != FILES[1] and not one.name.startswith("tasks-")]


def list_some(names: Sequence[str]) -> str:
    """The first few names, in quotes, and how many more there are."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(repr(name) for name in names[:_MAX_NAMES]) + more


def _read_answers(path: Path, rows: list[dict[str, Any]], name: str) -> list[TruthRow]:
    found: dict[tuple[str, str], TruthRow] = {}
    for row in rows:
        image, label = _read_text(path, row.get(name), name), _read_text(path, row.get("label"), "label")
        answer = row.get("answer")
        if answer not in ANSWERS:
            raise ConfigError(f"{path}: an answer is {answer!r}: use one of {', '.join(ANSWERS)}")
        found.pop((image, label), None)
        if answer != TAKEN_BACK:
            weight = _read_weight(path, row.get("weight"))
            sample, digest = str(row.get("sample") or ""), str(row.get("sha256") or "")
            found[image, label] = TruthRow(image, label, str(answer), (), sample, weight, digest)
    return list(found.values())


def _load(path: Path, notices: list[str]) -> tuple[list[dict[str, Any]], set[str]]:
    """Read the file's rows, and the names of their columns. Raises `ConfigError`."""
    if not path.is_file():
        raise ConfigError(f"{path} is neither a file nor the folder of a sample")
    try:
        if path.suffix == ".parquet":
            return _read_rows(pq.read_table(path))
        if path.suffix == ".csv":
            # Inferred types would read the key 0012 as the number 12.
            types = dict.fromkeys(_TEXT_COLUMNS, pa.string()) | {"weight": pa.float64()}
            return _read_rows(
                pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=types))
            )
        if path.suffix == ".json":
            return read_answers(path), {ID, "label", "answer"}
        if path.suffix in (".jsonl", ".ndjson"):
            lines, dropped = read_answer_lines(path)
            if dropped:
                notices.append(f"{path}: the last line was not written to its end, and is left out")
            return lines, {name for line in lines for name in line}
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    raise ConfigError(f"{path}: a truth file is .jsonl, .csv, .parquet or Label Studio's .json, or a sample's folder")


def _read_rows(table: pa.Table) -> tuple[list[dict[str, Any]], set[str]]:
    return table.to_pylist(), set(table.column_names)


def _split_labels(path: Path, value: Any) -> list[str]:
    names = value.split(SEPARATOR) if isinstance(value, str) else value or []
    if not isinstance(names, list):
        raise ConfigError(f"{path}: labels are {value!r}: write a list of names, or names separated by {SEPARATOR}")
    return [text for name in names if (text := _to_text(path, name, "labels").strip())]


def _read_text(path: Path, value: Any, column: str) -> str:
    if value is None or value == "":
        raise ConfigError(f"{path}: a row has no {column}")
    return _to_text(path, value, column)


def _to_text(path: Path, value: Any, column: str) -> str:
    """Return a value as text. Only an integer besides text has one notation: 1.1 may have been written 1.10."""
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    raise ConfigError(f"{path}: {column} is {value!r}, which is not text: write it in quotes")


def _read_weight(path: Path, value: Any) -> float:
    if value is None:
        return float("nan")
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = float("nan")
    if not (np.isfinite(weight) and weight > 0):
        raise ConfigError(f"{path}: a weight is {value}: weights must be greater than 0")
    return weight
