"""Files of labels: YAML, JSON, CSV, TSV, and text with one label on each line.

A label is the text that stands in the file. Where it is not certain which part of a file is the label, as in the lines
`0: cat` and `1: dog`, the file is refused with what to write instead.
"""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from siglip.label_text.lines import find_doubt
from storage.settings import parse_yaml, refuse_double_keys

TEXT, TABLES = (".txt", ".names", ""), (".csv", ".tsv")
"""Suffixes of text files and of tables. YOLO calls its text files `.names`."""
COLUMNS = ("label", "name")
"""The column of a table that holds the labels: one of these."""
SET_KEYS = ("names", "templates", "threshold", "top_k", "groups")
"""The keys of a label set in a YAML or JSON file."""
NUMBERS = ("id", "index", "")
"""Columns of a table that may stand beside the labels and are not read. Pandas writes its index without a name."""


def read_label_file(path: Path) -> Any:
    """The content of a label file: a list of labels, or the keys of a label set. Scalars are text, also numbers.

    A byte order mark at the start is not part of the first label. Raises `ValueError` with one line for a file that
    cannot be read, for text that is not UTF-8, and for a file in which the labels cannot be told with certainty.
    """
    if not os.path.isfile(path):  # unlike `Path.is_file`, it does not raise for a text that is too long for a name
        name = " ".join(str(path)[:200].split())
        if os.path.isdir(path):
            raise ValueError(f"label file {name} is a folder")
        if os.path.exists(path):  # a pipe or a device can be read only once, and a job reads its labels again
            raise ValueError(f"label file {name} is no regular file: save the labels in a file")
        raise ValueError(f"label file {name} does not exist")
    suffix = path.suffix.lower()
    try:
        text = _decode(path.read_bytes())
        if suffix in (".yaml", ".yml"):
            return _check_document(parse_yaml(text, text_only=True))
        if suffix == ".json":
            return _check_document(_parse_json(text))
        if suffix in TABLES:
            return list(_read_table(text, "\t" if suffix == ".tsv" else ","))
        if suffix in TEXT:
            return _read_lines(text) or _check_document([])
    except OSError as error:
        raise ValueError(f"label file {path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"label file {path}: it is nested too deeply") from None
    except (yaml.YAMLError, csv.Error, ValueError) as error:
        raise ValueError(f"label file {path}: {' '.join(str(error).split())}") from None
    raise ValueError(f"label file {path}: the name must end in .yaml, .yml, .json, .csv, .tsv or .txt")


def _decode(data: bytes) -> str:
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):  # UTF-32's mark begins like UTF-16's
        raise ValueError("it is UTF-32: save it as UTF-8")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = data[: error.start].count(b"\n") + 1
        raise ValueError(f"line {where} is not UTF-8: save the file as UTF-8") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for number, line in enumerate(text.split("\n"), 1):
        if found := next((c for c in line if c != "\t" and unicodedata.category(c) in ("Cc", "Zl", "Zp")), None):
            raise ValueError(f"line {number} contains the control character U+{ord(found):04X}: remove it")
    return text


def _check_document(value: Any) -> Any:
    if isinstance(value, dict) and "categories" in value:
        raise ValueError("this looks like COCO's annotations: write the names of its categories as a list")
    if isinstance(value, dict) and value:
        if "names" in value and (others := [str(key) for key in value if key not in SET_KEYS]):
            raise ValueError(
                f"it has other keys than a label set ({', '.join(others)[:80]}): leave only {', '.join(SET_KEYS)}"
            )
        if "names" not in value and all(str(item).isdigit() for item in value.values()):
            raise ValueError("it maps names to numbers: write the names as a list")
        if "names" not in value and all(isinstance(item, list) for item in value.values()):
            raise ValueError("each of its entries is a list: write only the label for each number")
        return value
    if isinstance(value, list) and value:
        return value
    raise ValueError("it contains neither a list of labels nor a label set")


def _parse_json(text: str) -> Any:
    """Parse JSON. Numbers stay text as written: as a float, 1.10 would become 1.1."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no label: write it in quotes")

    return json.loads(text, parse_float=str, parse_int=str, parse_constant=refuse, object_pairs_hook=refuse_double_keys)


def _read_table(text: str, delimiter: str) -> Iterator[str]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [name.strip().lower() for name in next(rows, [])]
    named = [index for index, name in enumerate(header) if name in COLUMNS]
    if len(header) == 1 and (other := next((one for one in ";\t|" if one in header[0]), None)):
        raise ValueError(f"its columns are separated by {other!r}: separate them by commas, or write a list")
    if len(named) != 1:
        raise ValueError(
            f"exactly one column must be called {' or '.join(COLUMNS)}: the first line is {', '.join(header)[:80]!r}"
        )
    if unread := [name for index, name in enumerate(header) if index not in named and name not in NUMBERS]:
        raise ValueError(f"the column {unread[0]!r} cannot be read from a table: remove it, or write a YAML file")
    for row in rows:
        if not row:
            continue
        if len(row) != len(header):
            raise ValueError(f"line {rows.line_num} has {len(row)} fields, and the first line has {len(header)}")
        if not (label := row[named[0]].strip()):
            raise ValueError(f"line {rows.line_num} has no label")
        yield label


def _read_lines(text: str) -> list[str]:
    """One label on each line. Empty lines, and lines that are `#` or begin with `# `, are skipped."""
    labels = []
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip()
        if not line or line == "#" or line.startswith(("# ", "#\t")):
            continue
        if line.startswith("#"):
            raise ValueError(
                f"line {number} is {line[:40]!r}: write `# ` for a comment; a label that begins with # goes into a "
                "YAML file, in quotes"
            )
        if "\t" in line:
            raise ValueError(f"line {number} contains a tab: write one label on each line, or name the file .tsv")
        labels.append(line)
    if doubt := find_doubt(labels):
        raise ValueError(
            f"{doubt}: write only labels, one on each line; if this is part of them, write them in quotes as a list in "
            "a YAML file"
        )
    return labels
