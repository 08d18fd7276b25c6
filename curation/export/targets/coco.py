"""COCO annotations of whole images: `images`, `categories` and `annotations` with a score and without boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import IO, Any

from curation.export.job import Job, Target
from curation.export.names import Repeats, add_tag
from curation.export.rows import describe, dump

_ROWS = 4096
_OWN = frozenset(["file_name", "row_id"])
"""Names in `images` that columns of an output get `input_` before."""


def write(job: Job, path: str) -> None:
    """Write the annotations to a file of JSON, in two passes over the rows.

    All ids are integers from 1 on: tools take 0 for no category and no match. A category's id is the place of its label
    in the label set, also if no image has it. `file_name` is the key; a key that several images have gets a
    suffix for each of them. Memory holds 4,096 rows, and 8 bytes for each row.
    """
    repeated = Repeats(key for batch in job.selection.batches(["key"]) for key in batch["key"].to_pylist())
    if len(repeated):
        job.notices.append(
            f"{len(repeated):,} keys are those of several images: their file_name is the key with a suffix"
        )
    names = job.output.labels.label_names()
    supercategory = {name: group for group, members in job.output.labels.groups.items() for name in members}
    categories = [
        {"id": place, "name": name, "supercategory": supercategory.get(name, "")} for place, name in enumerate(names, 1)
    ]
    info = {"description": f"Labels of {job.output.uri}", "date_created": datetime.now(UTC).isoformat()}
    with open(path, "wb") as file:
        file.write(b'{"info":' + dump(info) + b',\n"licenses":[],\n"categories":')
        _write_list(file, categories)
        file.write(b',\n"images":')
        _write_list(file, _make_images(job, repeated))
        file.write(b',\n"annotations":')
        _write_list(file, _make_annotations(job, {name: place for place, name in enumerate(names, 1)}))
        file.write(b"}\n")


def _make_images(job: Job, repeated: Repeats) -> Iterator[dict[str, Any]]:
    number = 0
    columns = [name for name in job.columns if name not in ("labels", "scores", "bands")]
    for batch in job.rows(columns, _ROWS):
        for row in describe(batch):
            number += 1
            key, row_id = row["key"], row.pop("id")
            file_name = add_tag(key, row_id) if key in repeated else key
            other = {f"input_{name}" if name in _OWN else name: value for name, value in row.items()}
            yield {"id": number, "file_name": file_name, "row_id": row_id, **other}


def _make_annotations(job: Job, ids: dict[str, int]) -> Iterator[dict[str, Any]]:
    number = image = 0
    columns = [name for name in ("labels", "scores", "bands") if name in job.columns]
    for batch in job.selection.batches(columns, _ROWS):
        for row in describe(batch):
            image += 1
            for place, name in enumerate(row["labels"] or []):
                number += 1
                found = {"id": number, "image_id": image, "category_id": ids[name], "score": row["scores"][place]}
                if "bands" in row:
                    found["band"] = row["bands"][place]
                yield found


def _write_list(file: IO[bytes], values: Iterable[dict[str, Any]]) -> None:
    separator = b"[\n"
    for value in values:
        file.write(separator + dump(value))
        separator = b",\n"
    file.write(b"\n]" if separator == b",\n" else b"[]")


TARGET = Target("none", write, folder=False)
