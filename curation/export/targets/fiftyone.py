"""A FiftyOne dataset on disk: `fo.Dataset.from_dir(FOLDER, dataset_type=fo.types.FiftyOneDataset)` imports it."""

from __future__ import annotations

import base64
import hashlib
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from curation.export.destination import write_new
from curation.export.job import EMBEDDING, Job, Target
from curation.export.names import add_tag, make_path
from curation.export.rows import describe, dump
from siglip.scoring import Floats

VERSION = "1.0.0"
"""The version of FiftyOne whose format is written. Later ones migrate it when they import it."""
PREDICTIONS = "predictions"
"""The field with the labels."""
_TAKEN = frozenset(
    ["id", "filepath", "tags", "metadata", "created_at", "last_modified_at", "frames", PREDICTIONS, EMBEDDING]
)
_FIELDS = "fiftyone.core.fields."
_EPOCH_FIELDS = ("created_at", "last_modified_at")


def write(job: Job, path: str) -> None:
    """Write `metadata.json`, `samples.json` and the images in `data/`, under their keys, to a folder.

    A sample has `predictions`, a `Classifications` with the label, its confidence and, if the output has bands, `band`
    of each label; `embedding`, a vector of D float32; the original's width and height as its metadata, if the file is
    the one that was tagged; and the output's other columns as fields. Names that FiftyOne uses itself get `input_`
    before them, so the column `metadata` is `input_metadata`, and `id` is `row_id`. Columns that are no numbers, texts,
    or lists of them are JSON in a text, as `metadata` is: MongoDB has no large integers. Ids are made from rows' ids:
    the same output gives the same ids. Memory holds one batch of `curation.export.images`.
    """
    folder = Path(path)
    schema = job.make_schema()
    names = _name_fields(job.columns)
    data = folder / "data"
    data.mkdir()
    (folder / "metadata.json").write_bytes(dump(_describe_dataset(job, schema, names)))
    with open(folder / "samples.json", "wb") as file:
        file.write(b'{"samples": [')
        separator = b"\n"
        for batch, vectors, pictures in job.pictures():
            for row, vector, picture in zip(describe(batch, parse=False), vectors, pictures, strict=True):
                wanted = make_path(row["key"])
                if not wanted.lower().endswith(f".{picture.extension}") and "." not in wanted.rpartition("/")[2]:
                    wanted += f".{picture.extension}"
                plain = f"{add_tag('image', row['id'])}.{picture.extension}"
                written = write_new(data, [wanted, add_tag(wanted, row["id"]), plain], picture.data)
                sample = _make_sample(row, vector, f"data/{written}", picture.original, schema, names)
                file.write(separator + dump(sample))
                separator = b",\n"
        file.write(b"\n]}\n")


def _make_sample(
    row: dict[str, Any], vector: Floats, filepath: str, original: bool, schema: pa.Schema, names: dict[str, str]
) -> dict[str, Any]:
    labels, scores, bands = row.pop("labels") or [], row.pop("scores"), row.pop("bands", None)
    row_id = row["id"]
    metadata = {"_cls": "ImageMetadata", "width": row["width"], "height": row["height"]}
    digest = hashlib.sha256(row_id.encode()).digest()
    found = [
        {
            "_id": _make_object_id(f"{row_id}\n{label}"),
            "_cls": "Classification",
            "tags": [],
            "label": label,
            "confidence": scores[place],
            **({"band": bands[place]} if bands is not None else {}),
        }
        for place, label in enumerate(labels)
    ]
    return {
        "_id": _make_object_id(row_id),
        "filepath": filepath,
        "tags": [],
        "metadata": metadata if original else None,
        "_media_type": "image",
        "_rand": int.from_bytes(digest[:6]) / 2**48,
        PREDICTIONS: {"_cls": "Classifications", "classifications": found},
        EMBEDDING: {"$binary": {"base64": _pack(vector), "subType": "00"}},
        **{names[name]: _make_value(value, schema.field(name).type) for name, value in row.items()},
    }


def _make_value(value: Any, dtype: pa.DataType) -> Any:
    if value is None or _name_type(dtype) is not None:
        return value
    text = dump(value)
    plain = orjson.loads(text)
    return plain if isinstance(plain, str) else text.decode()


def _pack(vector: Floats) -> str:
    """Return a vector as FiftyOne stores it: the bytes of `numpy.save`, compressed, in base64."""
    buffer = io.BytesIO()
    np.save(buffer, vector, allow_pickle=False)
    return base64.b64encode(zlib.compress(buffer.getvalue(), 1)).decode()


def _make_object_id(text: str) -> dict[str, str]:
    return {"$oid": hashlib.sha256(text.encode()).hexdigest()[:24]}


def _name_fields(columns: list[str]) -> dict[str, str]:
    """Return for each column the name of its field, which has no dot and is none that FiftyOne uses."""
    names: dict[str, str] = {}
    taken = set(_TAKEN)
    for column in columns:
        name = column.replace(".", "_").replace("\0", "_").replace("$", "_").lstrip("_") or "column"
        name = "row_id" if column == "id" else f"input_{name}" if name in _TAKEN else name
        while name in taken:
            name += "_"
        taken.add(name)
        names[column] = name
    return names


def _describe_dataset(job: Job, schema: pa.Schema, names: dict[str, str]) -> dict[str, Any]:
    """Return the document of the dataset, with its fields."""
    classification = [
        _describe_field("id", "ObjectIdField", db_field="_id"),
        _describe_field("tags", "ListField", "StringField"),
        _describe_field("label", "StringField"),
        _describe_field("confidence", "FloatField"),
        *([_describe_field("band", "StringField")] if "bands" in names else []),
    ]
    classifications = _describe_field("classifications", "ListField", "EmbeddedDocumentField", classification)
    predictions = _describe_field(PREDICTIONS, "EmbeddedDocumentField", None, [classifications])
    classifications["embedded_doc_type"] = "fiftyone.core.labels.Classification"
    predictions["embedded_doc_type"] = "fiftyone.core.labels.Classifications"
    sizes = [_describe_field(name, "IntField") for name in ("size_bytes", "width", "height", "num_channels")]
    metadata = _describe_field(
        "metadata", "EmbeddedDocumentField", None, [*sizes, _describe_field("mime_type", "StringField")]
    )
    metadata["embedded_doc_type"] = "fiftyone.core.metadata.ImageMetadata"
    fields = [
        _describe_field("id", "ObjectIdField", db_field="_id"),
        _describe_field("filepath", "StringField"),
        _describe_field("tags", "ListField", "StringField"),
        metadata,
        *(_describe_field(name, "DateTimeField") for name in _EPOCH_FIELDS),
        predictions,
        _describe_field(EMBEDDING, "VectorField"),
    ]
    for column, name in names.items():
        if column in ("labels", "scores", "bands"):
            continue
        fields.append(_describe_field(name, _name_type(schema.field(column).type) or "StringField"))
    return {
        "name": "sightline",
        "version": VERSION,
        "media_type": "image",
        "info": {"output": job.output.uri, "model": job.output.model},
        "classes": {PREDICTIONS: job.output.labels.label_names()},
        "default_classes": [],
        "mask_targets": {},
        "default_mask_targets": {},
        "skeletons": {},
        "group_media_types": {},
        "tags": [],
        "app_config": {
            "grid_media_field": "filepath",
            "media_fields": ["filepath"],
            "modal_media_field": "filepath",
            "plugins": {},
        },
        "sample_fields": fields,
        "frame_fields": [],
        "saved_views": [],
        "workspaces": [],
        "annotation_runs": {},
        "brain_methods": {},
        "evaluations": {},
        "runs": {},
    }


def _describe_field(
    name: str, kind: str, element: str | None = None, fields: list[dict[str, Any]] | None = None, *, db_field: str = ""
) -> dict[str, Any]:
    return {
        "name": name,
        "ftype": _FIELDS + kind,
        "embedded_doc_type": None,
        "subfield": None if element is None else _FIELDS + element,
        "fields": fields or [],
        "db_field": db_field or name,
        "description": None,
        "info": None,
        "read_only": False,
        "created_at": None,
    }


def _name_type(dtype: pa.DataType) -> str | None:
    """Return the name of FiftyOne's field for a type, or None if it has none.

    The elements of a list have no field, because FiftyOne's fields of elements refuse a null.
    """
    types = pa.types
    if types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype):
        inner = dtype.value_type
        return "ListField" if _name_type(inner) not in (None, "ListField") else None
    if types.is_boolean(dtype):
        return "BooleanField"
    if types.is_integer(dtype) and not types.is_uint64(dtype):  # MongoDB has signed integers
        return "IntField"
    if types.is_floating(dtype):
        return "FloatField"
    return "StringField" if types.is_string(dtype) or types.is_large_string(dtype) else None


TARGET = Target("needed", write)
