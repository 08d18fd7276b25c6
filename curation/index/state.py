"""The state of an index: which version of its table is used, which shards that version has, and a sample of them.

`index/state.npz` is written with one atomic put, after a build. Readers use the version that it names, so that a build
that is under way or was killed changes nothing for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from curation.index.labels import RowLabels
from curation.index.table import FOLDER, number_shard
from curation.tagged_output import TaggedOutput
from pipelines.output.ledger import ledger_path
from pipelines.output.markers import make_marker, parse_marker
from pipelines.output.output import MANIFEST
from storage.settings import ConfigError
from storage.store import NotFound, StoreError

_STATE, _LOCK = f"{FOLDER}/state.npz", f"{FOLDER}/building.json"
_FORMAT = 2


@dataclass(frozen=True)
class About:
    """What is known of an index.

    `version` is that of the table, and `previous` the one before it, or 0. `created` is the digest of the output's
    first ledger, which no other output shares. `trained` is the number of rows when the vector index was trained, 0 if
    there is none, and `probes` the number of partitions that a search looks into. `recall_images` and `recall_texts`
    are the shares of the ten nearest images that searches find.
    """

    version: int
    previous: int
    weights: str
    created: str
    rows: int
    trained: int
    probes: int
    recall_images: float
    recall_texts: float
    format: int = _FORMAT


@dataclass(frozen=True)
class IndexState:
    """An index as a search uses it. `shards`, `generations` and `counts` are int64 (S,): the shards of the table.

    `sample` are embeddings of images drawn at random, float16 (M, D), and `sample_shards` their shards, int64 (M,).
    `label_starts` and `label_numbers` are their labels: see `curation.index.labels.RowLabels`.
    """

    about: About
    shards: NDArray[np.int64]
    generations: NDArray[np.int64]
    counts: NDArray[np.int64]
    sample: NDArray[np.float16]
    sample_shards: NDArray[np.int64]
    label_starts: NDArray[np.int64]
    label_numbers: NDArray[np.int32]

    @property
    def sample_labels(self) -> RowLabels:
        """The labels of the sample's images."""
        return RowLabels(self.label_starts, self.label_numbers)

    def list_shards(self) -> dict[int, tuple[int, int]]:
        """Return for each shard its generation and its number of rows, as `list_shards` does for an output."""
        values = zip(self.shards.tolist(), self.generations.tolist(), self.counts.tolist(), strict=True)
        return {shard: (generation, count) for shard, generation, count in values}

    def write(self, output: TaggedOutput) -> None:
        """Put the state in the output. From then on searches use it."""
        buffer = io.BytesIO()
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        np.savez(buffer, about=np.frombuffer(json.dumps(asdict(self.about)).encode(), np.uint8), **arrays)
        output.store.put(output.output.uri_of(_STATE), buffer.getvalue())


_ARRAYS = ("shards", "generations", "counts", "sample", "sample_shards", "label_starts", "label_numbers")


def read_index_state(output: TaggedOutput, *, earlier: bool = False) -> IndexState | None:
    """Read the state of an output's index, or None if there is none. Memory holds 24 bytes a shard, and the sample.

    With `earlier`, an index of an earlier version of Sightline counts as none: it is made anew. Raises `ConfigError`
    for an index of another output, of other weights, or of another version of Sightline.
    """
    uri = output.output.uri_of(FOLDER)
    try:
        data = output.output.read(_STATE)
    except NotFound:
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            found = about.get("format")
            if earlier and isinstance(found, int) and found < _FORMAT:
                return None
            if found != _FORMAT:
                raise ConfigError(
                    f"{uri} was made by another version of Sightline: if it was an earlier one, run `sightline index "
                    f"{output.uri}`, which makes it anew; otherwise install that version"
                )
            state = IndexState(About(**about), **{name: file[name] for name in _ARRAYS})
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise StoreError(f"{output.output.uri_of(_STATE)} is damaged: {error}") from error
    if (state.about.weights, state.about.created) != (output.weights, identify(output)):
        raise ConfigError(f"{uri} is the index of another output: delete the folder, and run `index` again")
    return state


def stat_index(output: TaggedOutput) -> str:
    """Return a text that changes when a build ends, empty without an index. Reads nothing of the index."""
    entry = output.store.stat(output.output.uri_of(_STATE))
    return "" if entry is None else f"{entry.size} {entry.etag}"


def is_current(output: TaggedOutput, stamp: str) -> bool:
    """Tell whether no run has ended since an output was opened, and no build since `stat_index` returned `stamp`.

    Reads the manifest. Raises `StoreError`.
    """
    return output.output.read_json(MANIFEST) == output.manifest and stat_index(output) == stamp


def identify(output: TaggedOutput) -> str:
    """Return the digest of an output's first ledger. It stays the same while the output grows, and for its copies."""
    return hashlib.sha256(output.output.read(ledger_path(0))).hexdigest()


def list_shards(output: TaggedOutput) -> dict[int, tuple[int, int]]:
    """Return for each shard of an output with images its generation and their number. About 200 bytes a shard."""
    counts: dict[str, int] = {}
    for shard, file in output.ledger.list_files(["data"]):
        counts[shard] = counts.get(shard, 0) + file.rows
    return {number_shard(shard): (output.ledger.generation_of(shard), rows) for shard, rows in counts.items() if rows}


@contextlib.contextmanager
def lock_index(output: TaggedOutput) -> Iterator[None]:
    """Keep other builds of the index away. Raises `ConfigError` if one is at work.

    The lock of a process that was killed is taken over, on another machine after two days.
    """
    marker = make_marker(uuid.uuid4().hex, "index")
    data = marker.dump()
    uri = output.output.uri_of(_LOCK)
    while not output.output.put_if_absent(_LOCK, data):
        try:
            held = output.output.read(_LOCK)
        except NotFound:
            continue
        other = parse_marker("index", held)
        if not other.is_over():
            raise ConfigError(
                f"another `sightline index` of {output.uri} is at work since {other.started_at:%Y-%m-%d %H:%M} UTC; if "
                f"that is not so, delete {uri}"
            )
        output.output.delete(_LOCK)
    try:
        yield
    finally:
        output.output.delete(_LOCK)
