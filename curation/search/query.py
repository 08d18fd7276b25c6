"""A query: what images should show, what they must not show, and which rows are searched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from curation.model import OutputModel
from curation.tagged_output import ID, TaggedOutput, read_embeddings
from curation.where import Where, join_conditions, make_where, quote_label
from siglip.config import ModelConfig
from siglip.heads import LinearHead, build_head
from siglip.labels import LabelSet
from siglip.scoring import Floats
from storage.settings import ConfigError, describe_error

Cutoff = Literal["auto", "none"]
_ID = re.compile(r"\d{6}-\d{6}/\d{1,18}")


@dataclass(frozen=True)
class Query:
    """What to search for. An image must satisfy all of it.

    `texts` are what an image should show: its score for several is the lowest of them. `without` are texts that it must
    not show: an image that a search for one of them would find relevant is left out. `images` are files, and `like`
    keys or ids of rows of the output: several of both are averaged to one example. With texts and an example, images
    are ordered by the worse of the two similarities, each in standard deviations above the mean of the rows searched:
    cosines of images with texts and with images have different ranges.

    `where` is a condition in SQL (see `curation.where.Where`) and `labels` are labels that the row must have. `top` is
    the number of results. `cutoff` says whether results end where the images are no longer relevant (see
    `curation.search.cutoff`): this needs a text, because the similarity of two images is not a probability. With
    `fold`, near-duplicates are one result.
    """

    texts: Sequence[str] = ()
    without: Sequence[str] = ()
    images: Sequence[Path] = ()
    like: Sequence[str] = ()
    where: str | None = None
    labels: Sequence[str] = ()
    top: int = 20
    cutoff: Cutoff = "auto"
    fold: bool = False

    def check(self, output: TaggedOutput) -> Where | None:
        """Check a query, and return its condition on rows. Raises `ConfigError` before anything is read."""
        if not (self.texts or self.images or self.like):
            raise ConfigError("give at least one --text, --image or --like: rows cannot be ordered without one")
        if any(not text.strip() for text in (*self.texts, *self.without)):
            raise ConfigError("--text or --not: a text is empty")
        if self.top < 1:
            raise ConfigError(f"--top {self.top}: give a number from 1 on")
        known = set(output.labels.label_names())
        if unknown := [label for label in self.labels if label not in known]:
            raise ConfigError(f"--label {unknown[0]!r}: {output.uri} has no such label: search for it with --text")
        if both := set(self.texts) & set(self.without):
            raise ConfigError(f"{both.pop()!r} is both wanted (--text) and unwanted (--not)")
        own = [self.where] if self.where is not None else []
        if own:
            make_where(own[0], output)  # its own message, before labels are added
        return make_where(join_conditions([*own, *map(quote_label, self.labels)]), output)


@dataclass(frozen=True)
class Terms:
    """A query as vectors: `head` scores its texts, the first `wanted` of which are wanted, and the others unwanted.

    `example` is the example's embedding, float32 (D,) of unit norm, or None. `shown` are the positions of the rows that
    it is made of, which are no results.
    """

    head: LinearHead
    wanted: int
    example: Floats | None
    shown: frozenset[int]

    @property
    def ordering(self) -> int:
        """The number of similarities that order images: one of the texts, and one of the example."""
        return int(self.wanted > 0) + (self.example is not None)


def embed_query(query: Query, output: TaggedOutput, model: ModelConfig | None = None) -> Terms:
    """Embed a query's texts and images. The model is loaded if the output does not hold what is needed.

    A text gets the templates of the output's label set, so that its score is that of a label of this name.

    Raises `ConfigError` for an image that cannot be read, and for a key that no row or several rows have;
    `siglip.labels.LabelError` for texts that the model cannot read, and `siglip.checkpoints.files.CheckpointError`.
    """
    loaded = OutputModel(output, model)
    texts = list_texts(query)
    labels = make_labels(texts, output) if texts else None
    vectors = None if labels is None else loaded.embed_labels(labels)
    rows = find_rows(output, query.like)
    examples = [np.zeros((0, output.width), np.float32)]
    if rows:
        examples.append(read_embeddings(output.take(rows, ["embedding"])))
    if query.images:
        examples.append(loaded.embed_images(query.images))
    return make_terms(query, output, labels, vectors, np.concatenate(examples), rows)


def average_examples(embeddings: Floats) -> Floats:
    """Return the example that some images make, float32 (D,) of unit norm, from their embeddings, float32 (K, D)."""
    mean = embeddings.mean(axis=0, dtype=np.float64)
    return np.asarray(mean / np.linalg.norm(mean), np.float32)


def list_texts(query: Query) -> list[str]:
    """Return a query's texts, each once: those that are wanted, then those that are not."""
    return [*dict.fromkeys([*query.texts, *query.without])]


def make_labels(texts: Sequence[str], output: TaggedOutput) -> LabelSet:
    """Return texts as a label set with the templates of an output, so that each has the score of a label of its name.

    Raises `ConfigError` for a text that is no label.
    """
    try:
        return LabelSet.model_validate(
            {"names": [{"name": text} for text in texts], "templates": output.labels.templates}
        )
    except ValidationError as error:
        raise ConfigError(f"--text or --not: {describe_error(error, LabelSet)}") from None


def make_terms(
    query: Query,
    output: TaggedOutput,
    labels: LabelSet | None,
    texts: Floats | None,
    examples: Floats,
    rows: Sequence[int],
) -> Terms:
    """Make a query's terms of vectors that its texts and example images were embedded to.

    `labels` is what `make_labels` makes of `list_texts`, and `texts` are its averaged prompts, float32 (L, D); both are
    None without texts. `examples` are float32 (M, D) of unit norm; those of rows of the output are at `rows` there.
    """
    empty = np.zeros(0, np.float32)
    head = LinearHead(np.zeros((0, output.width), np.float32), empty, empty, ())
    if labels is not None and texts is not None:
        head = build_head(labels, texts, output.table.scale, output.weights)
    example = average_examples(examples) if len(examples) else None
    return Terms(head, len(dict.fromkeys(query.texts)), example, frozenset(rows))


def find_rows(output: TaggedOutput, names: Sequence[str]) -> list[int]:
    """Return the positions of the rows with these keys or ids. Reads the keys of the whole output.

    Raises `ConfigError` for a name that no row has, and for a key that several rows have.
    """
    found: dict[str, list[int]] = {name: [] for name in names}
    ids = [name for name in found if is_id(name)]
    for name, position in zip(ids, output.find_positions(ids).tolist(), strict=True):
        if position >= 0:
            found[name].append(position)
    wanted, first = pa.array(list(found), pa.string()), 0
    for batch in output.batches(["key"]) if found else ():
        for index in np.flatnonzero(pc.is_in(batch["key"], wanted)).tolist():
            positions = found[batch["key"][index].as_py()]
            if first + index not in positions:
                positions.append(first + index)
        first += len(batch)
    for name, positions in found.items():
        if not positions:
            raise ConfigError(f"--like {name!r}: {output.uri} has no image with this key or id")
        if len(positions) > 1:
            ids = output.take(positions[:4], [ID])[ID].to_pylist()
            raise ConfigError(
                f"--like {name!r}: {len(positions)} images have this key: give the id of one of them: {', '.join(ids)}"
            )
    return [positions[0] for positions in found.values()]


def is_id(name: str) -> bool:
    """Tell whether a name has the form of an id, as the column `id` has it."""
    return _ID.fullmatch(name) is not None
