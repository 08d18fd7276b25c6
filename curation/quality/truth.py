"""Ground truth: people's answers about an output's images, read from JSONL, CSV, Parquet or a Label Studio export."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curation.review.labelstudio import read_answers
from curation.tagged_output import ID, TaggedOutput, read_embeddings
from siglip.scoring import Floats
from storage.settings import ConfigError

RIGHT, WRONG, UNSURE, TAKEN_BACK = "right", "wrong", "unsure", "taken back"
ANSWERS = (RIGHT, WRONG, UNSURE, TAKEN_BACK)
SEPARATOR = "|"
_ID_COLUMNS = (ID, "sha256", "key")
_MAX_NAMES = 3


@dataclass(frozen=True)
class Truth:
    """Ground truth: answers about M images of an output. An answer says whether one label is right for one image.

    `positions` (M,) are the images' indices in the output's order, `ids` and `keys` their names, and `embeddings`
    (M, D) their embeddings, float32 of unit norm. Answer i is about image `image[i]` of these M and label `label[i]` of
    the output's label set; `right[i]` is True when the label is right. `weight[i]` is the number of images of the
    output that the answer stands for, 1 without a sample. `complete`: each image has an answer about each label.
    `exclusive`: exactly one label is right for each image.
    """

    positions: NDArray[np.int64]
    ids: list[str]
    keys: list[str]
    embeddings: Floats
    image: NDArray[np.int64]
    label: NDArray[np.int64]
    right: NDArray[np.bool_]
    weight: NDArray[np.float64]
    complete: bool = False
    exclusive: bool = False

    def logits(self, output: TaggedOutput) -> Floats:
        """The logit of each answer's image and label by the output's own head: float32 (A,)."""
        return np.asarray(output.head.logits(self.embeddings)[self.image, self.label], np.float32)


def read_truth(path: Path, output: TaggedOutput) -> Truth:
    """Read ground truth from JSONL, CSV, Parquet or a Label Studio JSON export, and find its images in the output.

    Images are named by the column `id` (as `sightline sample` writes it), `sha256` or `key`; the first that exists is
    used. The other columns decide what a row is:

    * `label` and `answer` (right, wrong, unsure, taken back): a row is an answer. The last answer about an image and a
      label counts. An answer that is unsure or taken back is left out.
    * `labels`, a list or names separated by |: a row is an image. These labels are right and all others are wrong.
    * `label` without `answer`: a row is an image with exactly one right label.

    A column `weight` is optional. When several images have the same `sha256`, the first is meant.

    Raises `ConfigError` for unknown images or labels (the message names the first few), for a key that several images
    have, for wrong columns, and when no answer says right or wrong.
    """
    rows, columns = _load(path)
    name = next((name for name in _ID_COLUMNS if name in columns), None)
    if name is None:
        raise ConfigError(f"{path}: no column that names the images: add one of {', '.join(_ID_COLUMNS)}")
    images = [_read_text(path, row.get(name), name) for row in rows]
    weights = [_read_weight(path, row.get("weight")) for row in rows]
    known = {label: index for index, label in enumerate(output.labels.label_names())}
    if "answer" in columns:
        answers, complete, exclusive = _read_answers(path, rows, images, weights, known), False, False
    elif "labels" in columns:
        named = [_split_labels(path, row.get("labels")) for row in rows]
        answers, complete, exclusive = _expand_labels(path, images, named, weights, known), True, False
    elif "label" in columns:
        one = [[_read_text(path, row.get("label"), "label")] for row in rows]
        answers, complete, exclusive = _expand_labels(path, images, one, weights, known), True, True
    else:
        raise ConfigError(
            f"{path}: no column `labels` or `label`: see curation/README.md for the columns of a truth file"
        )
    if not len(answers.right):
        raise ConfigError(f"{path}: no answer in this file says right or wrong")
    positions = _find_positions(path, output, name, answers.images)
    found = output.take(positions, [ID, "key", "embedding"])
    embeddings = np.concatenate([read_embeddings(batch) for batch in found.select(["embedding"]).to_batches()])
    ids, keys = found[ID].to_pylist(), found["key"].to_pylist()
    return Truth(
        positions,
        ids,
        keys,
        embeddings,
        answers.image,
        answers.label,
        answers.right,
        answers.weight,
        complete,
        exclusive,
    )


def group_answers(truth: Truth, labels: int) -> list[NDArray[np.intp]]:
    """For each label, the indices of the answers about it, in their order."""
    order = np.argsort(truth.label, kind="stable")
    return np.split(order, np.searchsorted(truth.label[order], np.arange(1, labels)))


@dataclass(frozen=True)
class _Answers:
    """Answers as in `Truth`, before the images are found in the output: `image` is an index into the names `images`."""

    images: list[str]
    image: NDArray[np.int64]
    label: NDArray[np.int64]
    right: NDArray[np.bool_]
    weight: NDArray[np.float64]


def _read_answers(
    path: Path, rows: list[dict[str, Any]], images: list[str], weights: list[float], known: dict[str, int]
) -> _Answers:
    _check_known(path, {_read_text(path, row.get("label"), "label") for row in rows}, known)
    found: dict[tuple[str, int], tuple[bool, float]] = {}
    for row, image, weight in zip(rows, images, weights, strict=True):
        answer, about = row.get("answer"), (image, known[str(row["label"])])
        if answer not in ANSWERS:
            raise ConfigError(f"{path}: an answer is {answer!r}: use one of {', '.join(ANSWERS)}")
        found.pop(about, None)
        if answer in (RIGHT, WRONG):
            found[about] = answer == RIGHT, weight
    names = {image: index for index, image in enumerate(dict.fromkeys(image for image, _ in found))}
    return _Answers(
        list(names),
        np.asarray([names[image] for image, _ in found], np.int64),
        np.asarray([label for _, label in found], np.int64),
        np.asarray([right for right, _ in found.values()], bool),
        np.asarray([weight for _, weight in found.values()], np.float64),
    )


def _expand_labels(
    path: Path, images: list[str], named: list[list[str]], weights: list[float], known: dict[str, int]
) -> _Answers:
    _check_known(path, {name for names in named for name in names}, known)
    twice = [image for image, count in Counter(images).items() if count > 1]
    if twice:
        raise ConfigError(
            f"{path}: several rows for one image: {_list_some(twice)}. Write one row with all labels of the image"
        )
    right = np.zeros((len(images), len(known)), bool)
    for row, names in enumerate(named):
        right[row, [known[name] for name in names]] = True
    every = np.arange(len(images)), np.arange(len(known))
    image, label = (part.reshape(-1) for part in np.meshgrid(*every, indexing="ij"))
    return _Answers(images, image, label, right.reshape(-1), np.repeat(np.asarray(weights), len(known)))


def _find_positions(path: Path, output: TaggedOutput, name: str, wanted: list[str]) -> NDArray[np.int64]:
    """Find the positions of images by name, in one pass over the output's column `name`."""
    values = pa.array(wanted, pa.string())
    positions = np.full(len(wanted), -1, np.int64)
    first = 0
    for batch in output.batches([name], rows=65_536):
        where = pc.index_in(batch[name], value_set=values)
        rows = np.flatnonzero(where.is_valid().to_numpy(zero_copy_only=False))
        found = where.take(pa.array(rows)).to_numpy()
        again = (positions[found] >= 0) | (np.bincount(found, minlength=len(wanted))[found] > 1)
        if name == "key" and again.any():
            double = wanted[int(found[again][0])]
            raise ConfigError(f"{path}: several images have the key {double!r}: name the images by {ID} or sha256")
        for row, index in zip(rows[::-1], found[::-1], strict=True):
            if positions[index] < 0 or positions[index] >= first:  # of several images with the same bytes, the first
                positions[index] = first + row
        first += len(batch)
    missing = [image for image, position in zip(wanted, positions, strict=True) if position < 0]
    if missing:
        raise ConfigError(
            f"{path}: {len(missing)} of {len(wanted)} images are not in {output.uri}: {_list_some(missing)}"
        )
    return positions


def _load(path: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """Read the file's rows, and the names of their columns. Raises `ConfigError`."""
    if not path.is_file():
        raise ConfigError(f"{path} is not a file")
    try:
        if path.suffix == ".parquet":
            return _read_rows(pq.read_table(path))
        if path.suffix == ".csv":
            # Inferred types would read the key 0012 as the number 12.
            types = dict.fromkeys((*_ID_COLUMNS, "label", "labels", "answer"), pa.string()) | {"weight": pa.float64()}
            return _read_rows(
                pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=types))
            )
        if path.suffix == ".json":
            return read_answers(path), {ID, "label", "answer"}
        if path.suffix in (".jsonl", ".ndjson"):
            # Not `splitlines`, which also splits at U+2028, and JSON may contain it in a string.
            text = path.read_text(encoding="utf-8-sig")
            lines = [json.loads(line) for line in text.split("\n") if line.strip()]
            if not all(isinstance(line, dict) for line in lines):
                raise ConfigError(f"{path}: a line is not a JSON object")
            return lines, {name for line in lines for name in line}
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    raise ConfigError(f"{path}: a truth file is .jsonl, .csv, .parquet or Label Studio's .json")


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
    try:
        weight = 1.0 if value is None else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not (np.isfinite(weight) and weight > 0):
        raise ConfigError(f"{path}: a weight is {value}: weights must be greater than 0")
    return weight


def _check_known(path: Path, names: set[str], known: dict[str, int]) -> None:
    unknown = sorted(names - known.keys())
    if unknown:
        raise ConfigError(f"{path}: labels that are not in the output's label set: {_list_some(unknown)}")


def _list_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(repr(name) for name in names[:_MAX_NAMES]) + more
