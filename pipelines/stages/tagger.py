"""The tagger: the stage that runs the model, `siglip.actor.SiglipActor`, on Arrow blocks of decoded images."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.output.label_columns import make_label_columns
from siglip.actor import SiglipActor
from siglip.checkpoint import PinnedModel
from siglip.config import prefer_throughput
from siglip.heads import LinearHead, tag_embeddings
from siglip.labels import LabelSet


@dataclass(frozen=True)
class TaggerConfig:
    """The configuration of an actor: the model, the label set with its head, CPU threads and GPUs."""

    model: PinnedModel
    labels: LabelSet
    head: LinearHead
    threads: int
    gpus: float


class Tagger:
    """The class of the actor pool. Ray Data creates one instance in each actor.

    Raises `siglip.checkpoints.files.CheckpointError` if the weights are not the run's, or if the actor was given a
    GPU and would run on a CPU.
    """

    def __init__(self, config: TaggerConfig) -> None:
        prefer_throughput()
        self._config = config
        self._actor = SiglipActor(config.model, config.threads, gpus=config.gpus)
        about = self._actor.describe()
        self._name = (
            f"{about['device']} {about['dtype']}{' compiled' if about['compiled'] else ''} {uuid.uuid4().hex[:8]}"
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        """Replace a block's pixels by labels, scores and embeddings, which are null for rows without pixels.

        Raises `RuntimeError` if an embedding is not finite.
        """
        started = time.time()
        valid = pc.is_valid(block["pixels"])
        width = self._config.model.width
        before = self._actor.model_seconds
        embeddings = self._actor.embed(pixels_of(block["pixels"], self._config.model.spec.shape))
        seconds = self._actor.model_seconds - before
        if not np.isfinite(embeddings).all():
            raise RuntimeError("the model gave embeddings that are not finite")
        tagged = tag_embeddings(embeddings, self._config.labels, self._config.head)
        where = np.flatnonzero(valid.to_numpy())
        vectors = np.zeros((block.num_rows, width), np.float32)
        vectors[where] = embeddings
        count = max(1, len(where))
        added = {
            **make_label_columns(tagged, self._config.labels, valid.to_numpy()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width),
            "queue_s": pc.cast(pc.subtract(started, block["ready_at"]), pa.float32()),
            "model_s": pa.array(np.where(valid.to_numpy(), seconds / count, 0), pa.float32()),
            "actor": pa.array([self._name] * block.num_rows, pa.string()),
        }
        block = block.drop_columns(["pixels"])
        for name, column in added.items():
            block = block.append_column(name, column)
        return block


def pixels_of(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the images of a binary column, each of `shape`: uint8 (N, ...). Copies only if it has several chunks.

    Nulls are rows without an image. They take no bytes and are left out, so N is the number of the other rows.
    """
    chunks = []
    for chunk in column.chunks:
        if len(chunk):
            offsets = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            chunks.append(np.frombuffer(chunk.buffers()[2], np.uint8)[offsets[0] : offsets[-1]])
    flat = chunks[0] if len(chunks) == 1 else np.concatenate([*chunks, np.zeros(0, np.uint8)])
    return flat.reshape(-1, *shape)
