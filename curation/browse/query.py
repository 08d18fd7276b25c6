"""What the page asks for, and the vectors that it is compared with."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from curation.browse.snapshot import Snapshot
from curation.model import OutputModel
from curation.search.query import Terms, average_examples, make_labels
from curation.tagged_output import read_embeddings
from siglip.checkpoints.files import CheckpointError
from siglip.config import ModelConfig
from siglip.heads import LinearHead, build_head
from siglip.labels import LabelError
from siglip.scoring import Floats
from storage.settings import ConfigError

_KEPT = 1000
"""Vectors of texts and images that are kept."""
Text = Annotated[str, Field(min_length=1, max_length=2000)]


class LabelCondition(BaseModel):
    """A label that images have: that the output has given them, or whose score is at least `min`."""

    model_config = ConfigDict(extra="forbid")

    label: str
    min: float | None = Field(default=None, ge=0, le=1)


class BrowseQuery(BaseModel):
    """What the page asks for. Images satisfy all of it.

    `texts`, `without`, `cutoff`, `fold` and `where` are those of `curation.search.query.Query`. `images` are tokens of
    images that were sent, `like` positions. With `unlabelled`, images have no label. `order` is that of the images:
    the best first, or the order in which they were tagged, forwards or backwards.
    """

    model_config = ConfigDict(extra="forbid")

    texts: list[Text] = Field(default=[], max_length=20)
    without: list[Text] = Field(default=[], max_length=20)
    images: list[str] = Field(default=[], max_length=20)
    like: list[int] = Field(default=[], max_length=100)
    labels: list[LabelCondition] = Field(default=[], max_length=50)
    unlabelled: bool = False
    where: str = Field(default="", max_length=5000)
    cutoff: Literal["auto", "none"] = "auto"
    fold: bool = False
    order: Literal["best", "first", "last"] = "best"


class Embedder:
    """Embeds texts and images with the model of an output, and keeps their vectors. Threads may share it.

    The model is loaded when it is first needed: texts that are labels of the output need none.
    """

    def __init__(self, config: ModelConfig | None) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._model: tuple[str, OutputModel] | None = None
        self._vectors: OrderedDict[tuple[str, str, str], Floats] = OrderedDict()
        self._images: OrderedDict[tuple[str, str], Floats] = OrderedDict()

    def make_terms(self, query: BrowseQuery, snapshot: Snapshot) -> Terms:
        """Return a query as vectors.

        Raises `ConfigError`, in one line, for what cannot be asked: a text that the model cannot read, a text that is
        both wanted and unwanted, a position that there is not, an image that was sent too long ago.
        """
        if both := set(query.texts) & set(query.without):
            raise ConfigError(f"{both.pop()!r} is both wanted and unwanted")
        wanted = list(dict.fromkeys(query.texts))
        texts = [*wanted, *dict.fromkeys(query.without)]
        if any(not 0 <= position < snapshot.rows for position in query.like):
            raise ConfigError("there is no such image")
        return Terms(
            self._make_head(texts, snapshot),
            len(wanted),
            self._average(query, snapshot),
            frozenset(query.like),
        )

    def add_image(self, data: bytes, snapshot: Snapshot) -> str:
        """Embed the image in a file's bytes, and return a token for it. Raises `ConfigError` if it is no image."""
        token = hashlib.sha256(data).hexdigest()[:32]
        key = snapshot.output.weights, token
        with self._lock:
            if key not in self._images:
                with _explain():
                    self._images[key] = self._find_model(snapshot).embed_image_bytes([("the image", data)])[0]
                while len(self._images) > _KEPT:
                    self._images.popitem(last=False)
        return token

    def load_in_background(self, snapshot: Snapshot, tell: Callable[[str], None]) -> None:
        """Start to load the model, so that the first query need not. `tell` gets a line if that is not possible."""

        def load() -> None:
            try:
                with self._lock, _explain():
                    self._find_model(snapshot).load()
            except ConfigError as error:
                tell(f"texts and images cannot be searched for: {error}")

        threading.Thread(target=load, name="model", daemon=True).start()

    def _make_head(self, texts: Sequence[str], snapshot: Snapshot) -> LinearHead:
        output = snapshot.output
        if not texts:
            nothing = np.zeros(0, np.float32)
            return LinearHead(np.zeros((0, output.width), np.float32), nothing, nothing)
        with self._lock:
            vectors = self._embed(texts, snapshot)
        return build_head(make_labels(texts, output), vectors, output.table.scale, output.weights)

    def _embed(self, texts: Sequence[str], snapshot: Snapshot) -> Floats:
        # Templates are a part of the labels' digest, and the model is not.
        of = snapshot.output.weights, str(snapshot.output.fingerprint["labels.digest"])
        missing = [text for text in texts if (*of, text) not in self._vectors]
        if missing:
            with _explain():
                found = self._find_model(snapshot).embed_labels(make_labels(missing, snapshot.output))
            self._vectors |= {(*of, text): vector for text, vector in zip(missing, found, strict=True)}
        vectors = np.stack([self._vectors[*of, text] for text in texts])
        while len(self._vectors) > _KEPT:
            self._vectors.popitem(last=False)
        return vectors

    def _find_model(self, snapshot: Snapshot) -> OutputModel:
        weights = snapshot.output.weights
        if self._model is None or self._model[0] != weights:
            self._model = weights, OutputModel(snapshot.output, self._config)
        return self._model[1]

    def _average(self, query: BrowseQuery, snapshot: Snapshot) -> Floats | None:
        parts = []
        with self._lock:
            for token in query.images:
                vector = self._images.get((snapshot.output.weights, token))
                if vector is None:
                    raise ConfigError("the image is no longer known: drop it again")
                parts.append(vector[None])
        if query.like:
            parts.append(read_embeddings(snapshot.take(query.like, ["embedding"])))
        return average_examples(np.concatenate(parts)) if parts else None


@contextmanager
def _explain() -> Iterator[None]:
    """Raise what the model raises as a `ConfigError`."""
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(f"the model cannot be loaded: {error}: name it with --model") from error
    except LabelError as error:
        raise ConfigError(str(error)) from error
