"""The fingerprint of an output: the model, the label set and the settings that made it.

It is stored in `fingerprint.json`, in the manifest and in the metadata of every Parquet file. Two runs may write to the
same output only if their fingerprints are equal.
"""

from __future__ import annotations

import base64
import json
import uuid
from typing import Any

import pyarrow as pa

from pipelines.config import JobConfig
from pipelines.output.output import FINGERPRINT, LABELS, MANIFEST, Output
from pipelines.output.schema import DATA_SCHEMA_VERSION
from siglip.checkpoint import PinnedModel
from siglip.config import ImageSpec
from siglip.families.text_rules import OWN_RULES, find_rule
from siglip.labels import LabelSet, TextRule
from storage.schemes import is_remote
from storage.settings import ConfigError
from storage.store import NotFound, show

_FILES = {FINGERPRINT, LABELS, MANIFEST}
"""The files that lie in an output's own folder."""
_COLUMNS = "parquet.schema"
"""The key of the passed-through columns' schema in Arrow's IPC format. Different versions of Arrow may write different
bytes for equal schemas, so schemas are compared and not bytes."""


def describe_labels(labels: LabelSet, rule: TextRule) -> dict[str, Any]:
    """Return the fields of a fingerprint that depend on the label set."""
    accepts = {"labels.accepts": labels.accepts()} if labels.has_bands() else {}
    return {
        "labels.digest": labels.digest(rule)[:16],
        "labels.names": labels.label_names(),
        "labels.templates": list(labels.templates),
        "labels.thresholds": labels.thresholds(),
        "labels.top_k": labels.top_k,
        **accepts,
    }


def describe_columns(columns: pa.Schema) -> dict[str, Any]:
    """Return the fields of a fingerprint that depend on the passed-through columns.

    They are of the schema after a round trip, as the next run gets it: a map's text has other names of its fields then.
    """
    data = columns.serialize()
    types = {field.name: str(field.type) for field in _read_schema(data)}
    return {"parquet.columns": types, _COLUMNS: base64.b64encode(data).decode()}


def make_fingerprint(config: JobConfig, model: PinnedModel, columns: pa.Schema) -> dict[str, Any]:
    """Return the fields that must be equal for two runs that write to the same output."""
    renamed = {source: name for source, name in config.parquet.columns.items() if source != name}
    return {
        "schema_version": DATA_SCHEMA_VERSION,
        "model.weights": model.identity,
        **_describe_size(model.spec),
        "model.resample": model.spec.resample,
        "model.mean": list(model.spec.mean),
        "model.std": list(model.spec.std),
        "decode": config.decode,
        # Only int8, whose embeddings are not quite those of the others: see `ModelConfig.min_cosine`.
        **({"model.dtype": "int8"} if model.config.dtype == "int8" else {}),
        # Only another rule than the family's own: outputs of earlier versions have no such field.
        **({"model.text_rule": find_rule(model.family)} if model.rule.NAME not in OWN_RULES else {}),
        **describe_labels(config.labels, model.rule),
        "embedding_dtype": config.embedding_dtype,
        "thumbnails": config.thumbnails,
        **describe_columns(columns),
        **({"parquet.renamed": renamed} if renamed else {}),
    }


def _describe_size(spec: ImageSpec) -> dict[str, Any]:
    if spec.patches is None:
        return {"model.image_size": spec.size}
    return {"model.patches": spec.patches.count, "model.patch_size": spec.patches.size}


def read_fingerprint(output: Output) -> dict[str, Any] | None:
    """Read an output's fingerprint. Return None for a new output, which has none."""
    try:
        return output.read_json(FINGERPRINT)
    except NotFound:
        return None


def read_columns(fingerprint: dict[str, Any]) -> pa.Schema:
    """Return the types of the passed-through columns."""
    return _read_schema(base64.b64decode(fingerprint[_COLUMNS]))


def _read_schema(data: bytes | pa.Buffer) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(data))


def claim_output(output: Output, fingerprint: dict[str, Any]) -> str:
    """Write the fingerprint of a new output, or check that the stored one is equal. Return the stored one as text.

    The fingerprint is written before the first plan, and never again: if two runs differ, the first one wins. Raises
    `ConfigError` that names the fields in which the stored fingerprint differs, and for a new output in a store without
    conditional writes. Call `check_folder` before the work.
    """
    text = json.dumps(fingerprint, ensure_ascii=False, sort_keys=True, indent=1)
    if is_remote(output.uri) and not output.exists(FINGERPRINT):
        _check_store(output)
    if output.put_if_absent(FINGERPRINT, text.encode()):
        return text
    check_fingerprint(output.read_json(FINGERPRINT), fingerprint, output)
    return output.read(FINGERPRINT).decode()


def _check_store(output: Output) -> None:
    """Raise `ConfigError` unless the store refuses to write an object that exists, which all exactly-once rests on.

    Servers that do not know the condition write without a word. Of two runs, one would then undo what the other wrote.
    """
    probe = f".conditional-{uuid.uuid4().hex}"
    try:
        if output.put_if_absent(probe, b"first") and not output.put_if_absent(probe, b"second"):
            return
    finally:
        output.delete(probe)
    raise ConfigError(
        f"output: {output.uri} is in a store that ignores the condition of a write (If-None-Match), so that two runs "
        "could overwrite each other's rows: upgrade the server, or write to one with conditional writes"
    )


def check_folder(output: Output) -> None:
    """Raise `ConfigError` for a folder that has files and is no output: the files of both would be mixed for good."""
    if output.exists(FINGERPRINT):
        return
    foreign = next((name for name in output.store.names(output.uri) if not name.startswith(".")), None)
    if foreign is not None and foreign not in _FILES:
        raise ConfigError(
            f"output: {output.uri} is no output and has files, such as {show(foreign)}: give a new or empty folder"
        )


def check_fingerprint(found: dict[str, Any], fingerprint: dict[str, Any], output: Output) -> None:
    """Raise `ConfigError` that names the fields in which an output's stored fingerprint, `found`, differs.

    The message says what can be done, which depends on how far the output is.
    """
    keys = {*found, *fingerprint} - {_COLUMNS}
    differing = [key for key in sorted(keys) if found.get(key) != fingerprint.get(key)]
    if _COLUMNS in found:  # the types themselves are compared: their text differs between versions of Arrow
        differing = [key for key in differing if key != "parquet.columns"]
        if not read_columns(found).equals(read_columns(fingerprint)):
            differing = sorted([*differing, "parquet.columns"])
    if not differing:
        return
    changes = "; ".join(
        f"{key}: {_shorten(found.get(key))} there, {_shorten(fingerprint.get(key))} now" for key in differing
    )
    raise ConfigError(f"output: {output.uri} was made with other settings ({changes}): {_advise(output, differing)}")


def _advise(output: Output, differing: list[str]) -> str:
    """Say what to do about other settings than those of an output."""
    if not any(next(output.store.names(output.uri_of(folder)), None) for folder in ("commits", "ledger")):
        return "no image is committed there yet: delete it if no other run is at work on it, or give a new output"
    if not all(key.startswith("labels.") for key in differing):
        return "change them back or give a new output"
    retag = "`sightline retag` gives the images of this output the new labels"
    return (
        f"{retag}; or change them back"
        if output.exists(MANIFEST)
        else f"change them back; once a run has ended, {retag}"
    )


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
