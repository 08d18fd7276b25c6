"""The fingerprint: what made an output. It stands in the output, in its manifest and in every file's metadata."""

from __future__ import annotations

import base64
import json
from typing import Any

import pyarrow as pa

from pipelines.config import JobConfig
from pipelines.output.layout import SCHEMA_VERSION, read_json
from siglip.checkpoint import PinnedModel
from siglip.labels import LabelSet, TextRule
from storage.settings import ConfigError
from storage.store import NotFound, Store, join

_NAME = "fingerprint.json"
_COLUMNS = "parquet.schema"
"""The types of passed columns, as Arrow writes them. Other versions write other bytes for the same types."""


def describe_labels(labels: LabelSet, rule: TextRule) -> dict[str, Any]:
    """The fields of a fingerprint that a label set decides."""
    accepts = {"labels.accepts": labels.accepts()} if labels.has_bands() else {}
    return {
        "labels.digest": labels.digest(rule)[:16],
        "labels.names": labels.label_names(),
        "labels.templates": list(labels.templates),
        "labels.thresholds": labels.thresholds(),
        "labels.top_k": labels.top_k,
        **accepts,
    }


def make_fingerprint(config: JobConfig, model: PinnedModel, columns: pa.Schema) -> dict[str, Any]:
    """The fields that two runs over one output must agree in."""
    renamed = {source: name for source, name in config.parquet.columns.items() if source != name}
    return {
        "schema_version": SCHEMA_VERSION,
        "model.weights": model.identity,
        "model.image_size": model.spec.size,
        "model.resample": model.spec.resample,
        "model.mean": list(model.spec.mean),
        "model.std": list(model.spec.std),
        "decode": config.decode,
        **describe_labels(config.labels, model.rule),
        "embedding_dtype": config.embedding_dtype,
        "thumbnails": config.thumbnails,
        "parquet.columns": {field.name: str(field.type) for field in columns},
        **({"parquet.renamed": renamed} if renamed else {}),
        _COLUMNS: base64.b64encode(columns.serialize()).decode(),
    }


def read_fingerprint(store: Store, output: str) -> dict[str, Any] | None:
    """The fingerprint of an output, or None of a new one."""
    try:
        return read_json(store, join(output, _NAME))
    except NotFound:
        return None


def read_columns(fingerprint: dict[str, Any]) -> pa.Schema:
    """The types of an output's passed columns."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(fingerprint[_COLUMNS])))


def claim_output(store: Store, output: str, fingerprint: dict[str, Any]) -> str:
    """Write the fingerprint into a new output, or check that the one there is the same. Returns the one there, as text.

    It is written before the first plan and never again: what two runs disagree about is settled by who came first.
    Raises `ConfigError`, naming the fields that differ: an output holds the work of one model and one label set.
    """
    uri = join(output, _NAME)
    text = json.dumps(fingerprint, ensure_ascii=False, sort_keys=True, indent=1)
    if store.put_if_absent(uri, text.encode()):
        return text
    check_fingerprint(read_json(store, uri), fingerprint, output)
    return store.read(uri).decode()


def check_fingerprint(found: dict[str, Any], fingerprint: dict[str, Any], output: str) -> None:
    """Raises `ConfigError`, naming the fields in which an output's fingerprint is another."""
    differing = [key for key in sorted({*found, *fingerprint} - {_COLUMNS}) if found.get(key) != fingerprint.get(key)]
    if not differing and not read_columns(found).equals(read_columns(fingerprint)):
        differing = ["parquet.columns"]
    if not differing:
        return
    changes = "; ".join(
        f"{key}: {_short(found.get(key))} there, {_short(fingerprint.get(key))} now" for key in differing
    )
    raise ConfigError(
        f"output: {output} was made with other settings ({changes}): change them back or give a new output"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
