"""`labels.parquet`: an output's label set with its head, with which embeddings can be scored without the model.

The file has one row for each label: `name`, `prompts` (the texts as the model got them), `threshold`, `accept`, and the
label's row of the head: `vector`, `gain`, `offset`. The file's metadata holds the label set as the user wrote it, with
its groups, and the model's settings.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipelines.output.fingerprint import read_columns
from pipelines.output.output import LABELS, Output
from pipelines.output.schema import OutputFormat
from siglip.checkpoint import PinnedModel
from siglip.config import ModelConfig
from siglip.heads import LinearHead, build_head
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale
from storage.store import StoreError

_KEY = b"sightline.labels"


@dataclass(frozen=True)
class LabelTable:
    """An output's label set with its head, the prompts of each label, and the model that embedded them.

    `model` is the configuration of the run that made the table: its source may no longer exist. `weights` is the digest
    of the model's weights, `family` is a key of `siglip.families.FAMILIES`, and `scale` is the checkpoint's.
    """

    labels: LabelSet
    head: LinearHead
    prompts: list[list[str]]
    model: ModelConfig
    weights: str
    family: str
    scale: Scale


def make_format(fingerprint: Mapping[str, Any], table: LabelTable) -> OutputFormat:
    """Return the schema of the data and reject files of an output with this fingerprint and label table."""
    return OutputFormat(
        int(table.head.vectors.shape[1]),
        fingerprint["embedding_dtype"],
        bool(fingerprint["thumbnails"]),
        read_columns(dict(fingerprint)),
        bands=table.labels.has_bands(),
    )


def make_label_table(labels: LabelSet, texts: Floats, scale: Scale, model: PinnedModel) -> LabelTable:
    """Build the table of a label set from `texts`, the averaged prompt embeddings, float32 (L, D).

    Raises `siglip.labels.LabelError` for a probe that was trained on another model's embeddings.
    """
    head = build_head(labels, texts, scale, model.identity)
    prompts = labels.prompts(model.rule)
    return LabelTable(labels, head, prompts, model.config, model.identity, model.rule.NAME, scale)


def claim_labels(output: Output, table: LabelTable) -> LabelTable:
    """Write the label table of a new output, or read the one that is there. Return the stored table.

    All runs that write to an output thus score with the same numbers. The fingerprint makes sure that the labels and
    the model are the same, but another device may compute embeddings with other last bits.
    """
    if output.put_if_absent(LABELS, _to_bytes(table)):
        return table
    return read_label_table(output)


def read_label_table(output: Output) -> LabelTable:
    """Read an output's label table. Raises `storage.store.NotFound` if it has none, `StoreError` if it is damaged."""
    data = output.read(LABELS)
    try:
        table = pq.read_table(io.BytesIO(data))
        about = json.loads(table.schema.metadata[_KEY])
        labels = LabelSet.model_validate(about["labels"])
        vectors = table["vector"].combine_chunks()
        head = LinearHead(
            np.array(vectors.flatten().to_numpy().reshape(len(vectors), -1), np.float32),
            np.array(table["gain"].to_numpy(), np.float32),
            np.array(table["offset"].to_numpy(), np.float32),
            tuple(labels.positions(members) for members in labels.groups.values()),
        )
        model = ModelConfig.model_validate(about["model"])
        prompts, scale = table["prompts"].to_pylist(), Scale(*about["scale"])
        return LabelTable(labels, head, prompts, model, about["weights"], about["family"], scale)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, ValidationError) as error:
        raise StoreError(f"{output.uri_of(LABELS)} is damaged: {error}") from error


def _to_bytes(table: LabelTable) -> bytes:
    labels, head = table.labels, table.head
    about: dict[str, Any] = {
        "labels": labels.model_dump(mode="json", exclude_defaults=True),
        "model": table.model.model_dump(mode="json"),
        "weights": table.weights,
        "family": table.family,
        "scale": [table.scale.logit_scale, table.scale.logit_bias],
    }
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(head.vectors.reshape(-1)), head.vectors.shape[1])
    columns = pa.table(
        {
            "name": pa.array(labels.label_names(), pa.string()),
            "prompts": pa.array(table.prompts, pa.list_(pa.string())),
            "threshold": pa.array(labels.thresholds(), pa.float64()),
            "accept": pa.array(labels.accepts(), pa.float64()),
            "vector": vectors,
            "gain": pa.array(head.gain, pa.float32()),
            "offset": pa.array(head.offset, pa.float32()),
        }
    ).replace_schema_metadata({_KEY: json.dumps(about, ensure_ascii=False)})
    buffer = io.BytesIO()
    pq.write_table(columns, buffer, compression="zstd")
    return buffer.getvalue()
