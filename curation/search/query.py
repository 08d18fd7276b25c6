"""A query: what images should show, what they must not show, and which rows are searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
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


def embed_query(query: Query, output: TaggedOutput, model: ModelConfig | None = None) -> Terms:
    """Embed a query's texts and images. The model is loaded if the output does not hold what is needed.

    A text gets the templates of the output's label set, so that its score is that of a label of this name.

    Raises `ConfigError` for an image that cannot be read, and for a key that no row or several rows have;
    `siglip.labels.LabelError` for texts that the model cannot read, and `siglip.checkpoint.CheckpointError`.
    """
    loaded = OutputModel(output, model)
    texts = [*dict.fromkeys([*query.texts, *query.without])]
    vectors = np.zeros((0, output.width), np.float32)
    head = LinearHead(vectors, np.zeros(0, np.float32), np.zeros(0, np.float32), ())
    if texts:
        labels = make_labels(texts, output)
        head = build_head(labels, loaded.embed_labels(labels), output.table.scale, output.weights)
    rows = find_rows(output, query.like)
    examples = [vectors]
    if rows:
        examples.append(read_embeddings(output.take(rows, ["embedding"])))
    if query.images:
        examples.append(loaded.embed_images(query.images))
    together = np.concatenate(examples)
    example = average_examples(together) if len(together) else None
    return Terms(head, len(dict.fromkeys(query.texts)), example, frozenset(rows))


def average_examples(embeddings: Floats) -> Floats:
    """Return the example that some images make, float32 (D,) of unit norm, from their embeddings, float32 (K, D)."""
    mean = embeddings.mean(axis=0, dtype=np.float64)
    return np.asarray(mean / np.linalg.norm(mean), np.float32)


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


def find_rows(output: TaggedOutput, names: Sequence[str]) -> list[int]:
    """Return the positions of the rows with these keys or ids. Reads the keys of the whole output.

    Raises `ConfigError` for a name that no row has, and for a key that several rows have.
    """
    wanted = set(names)
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in names}
    first = 0
    for batch in output.batches([ID, "key"]) if wanted else ():
        for column in (ID, "key"):
            for index, name in enumerate(batch[column].to_pylist()):
                if name in wanted and (first + index, batch[ID][index].as_py()) not in found[name]:
                    found[name].append((first + index, batch[ID][index].as_py()))
        first += len(batch)
    for name, rows in found.items():
        if not rows:
            raise ConfigError(f"--like {name!r}: {output.uri} has no image with this key or id")
        if len(rows) > 1:
            ids = ", ".join(id_ for _, id_ in rows[:4])
            raise ConfigError(f"--like {name!r}: {len(rows)} images have this key: give the id of one of them: {ids}")
    return [rows[0][0] for rows in found.values()]
