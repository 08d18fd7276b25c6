"""`labels.parquet`: what an output's labels are made of, so that its embeddings can be scored again without the model.

A row for each label: `name`, `prompts` as the model saw them, `threshold`, `accept`, and its row of the head: `vector`,
`gain`, `offset`. The label set as it was written, its groups among it, and the model's settings stand in the metadata.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from siglip.checkpoint import PinnedModel
from siglip.config import ModelConfig
from siglip.heads import Head, build_head
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale
from storage.store import Store, StoreError, join

_NAME = "labels.parquet"
_KEY = b"sightline.labels"


@dataclass(frozen=True)
class LabelTable:
    """An output's label set with its head, the canonical prompts of each label, and the model that embedded them.

    `model` is as the run was configured: its source may since be gone. `weights` is the model's digest, `family` a key
    of `siglip.families.FAMILIES`, `scale` the checkpoint's own.
    """

    labels: LabelSet
    head: Head
    prompts: list[list[str]]
    model: ModelConfig
    weights: str
    family: str
    scale: Scale


def make_label_table(labels: LabelSet, texts: Floats, scale: Scale, model: PinnedModel) -> LabelTable:
    """What a run is about to ask: `texts` are the embeddings (L, D) of the label set's prompts, averaged.

    Raises `siglip.labels.LabelError` for a probe of another model.
    """
    head = build_head(labels, texts, scale, model.identity)
    prompts = labels.prompts(model.rule)
    return LabelTable(labels, head, prompts, model.config, model.identity, model.rule.NAME, scale)


def claim_labels(store: Store, output: str, table: LabelTable) -> LabelTable:
    """Put an output's label table, or take the one there: all runs over an output score with the same numbers.

    The fingerprint has seen to it that labels and model are the same; another device's last bits may not be.
    """
    if store.put_if_absent(join(output, _NAME), _to_bytes(table)):
        return table
    return read_label_table(store, output)


def read_label_table(store: Store, output: str) -> LabelTable:
    """An output's label table. Raises `storage.store.NotFound` where there is none, `StoreError` if it is damaged."""
    uri = join(output, _NAME)
    data = store.read(uri)
    try:
        table = pq.read_table(io.BytesIO(data))
        about = json.loads(table.schema.metadata[_KEY])
        labels = LabelSet.model_validate(about["labels"])
        vectors = table["vector"].combine_chunks()
        head = Head(
            np.array(vectors.flatten().to_numpy().reshape(len(vectors), -1), np.float32),
            np.array(table["gain"].to_numpy(), np.float32),
            np.array(table["offset"].to_numpy(), np.float32),
            tuple(labels.positions(members) for members in labels.groups.values()),
        )
        model = ModelConfig.model_validate(about["model"])
        prompts, scale = table["prompts"].to_pylist(), Scale(*about["scale"])
        return LabelTable(labels, head, prompts, model, about["weights"], about["family"], scale)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, ValidationError) as error:
        raise StoreError(f"{uri} is damaged: {error}") from error


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
