"""The result of `sightline dedup`: files with the groups and with the images to keep, to which later runs add."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curation.dedup.dedup import COPY, SIMILAR, Found, find_copies
from curation.dedup.described import Described
from curation.dedup.earlier import ABOUT, GROUPS, KEEP, OTHER_STATE, read_earlier
from curation.dedup.groups import NONE
from curation.dedup.rows import LARGEST, Rows
from curation.tagged_output import ID, TaggedOutput
from storage.settings import ConfigError

SCHEMA = pa.schema(
    [
        ("group", pa.string()),
        ("kind", pa.string()),
        ("representative", pa.bool_()),
        ("cosine", pa.float32()),
        ("output", pa.string()),
        (ID, pa.string()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
"""The columns of `groups.parquet`, which is sorted by `kind` and `group`, representatives first.

`group` is the id of the group's representative. `kind` is `identical`, `copy` or `similar`: an image may be in a group
of copies or identical images, and its representative in one of similar images. `cosine` is that with the
representative. `output` is the output that the image is in.
"""


_DESCRIBED = pa.schema([SCHEMA.field(name) for name in (ID, "key", "source", "width", "height")])
_LINES = 100_000


@dataclass(frozen=True)
class Deduplicated:
    """The counts of a run: `rows` of the output, of which `new` were not in an earlier result.

    `identical` and `copies` images have another one in their place, and are not to be kept; `similar` ones only look
    like another one, and are kept. `keep` images are left. `confirmed` is False if there are no thumbnails, so that no
    copies could be confirmed.
    """

    rows: int
    new: int
    identical: int
    copies: int
    similar: int
    keep: int
    confirmed: bool


def dedup_output(
    output: TaggedOutput,
    target: Path,
    against: TaggedOutput | None = None,
    *,
    prefer: str = LARGEST,
    copy: float = COPY,
    similar: float = SIMILAR,
) -> Deduplicated:
    """Find the copies among an output's images, and write the groups and the images to keep to a folder.

    If `target` has the result of an earlier run, only images that are new since are looked at: they are compared with
    all, and those that were kept stay. With `against`, images of `output` are looked for that are copies of images of
    that other output, such as test images among training images; what is to be kept are the others.

    `prefer` decides which image represents a group: `largest` (most pixels), `newest` (planned last) or a pattern of
    keys such as `originals/*`. `copy` and `similar` are the lowest cosines.

    Memory holds about 150 bytes a row, 20 to 40 for each image in a group, and about 60 MB for each core at 768
    dimensions. Cells are fitted on up to 64 embeddings for each of up to 4,096 cells, which takes 1.1 GB, and a part in
    which many pairs are close takes up to 0.6 GB. A temporary folder beside `target` holds 2 bytes for each number of
    an embedding, 50 bytes and the close pairs (`curation.dedup.parts`) of each image, about 150 bytes for each image in
    a group, and 5.8 kB for each that is close to another one.

    Raises `ConfigError` if the outputs do not fit each other or the earlier result, and `storage.store.StoreError`.
    """
    about = {
        "output": output.uri,
        "against": against.uri if against else None,
        "prefer": prefer,
        "copy": copy,
        "similar": similar,
        "weights": output.weights,
        OTHER_STATE: against.manifest["ledgers"] if against else None,
    }
    _check(output, against, copy, similar)
    outputs = [against, output] if against else [output]
    earlier = read_earlier(target, about, outputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        rows = Rows(outputs, len(outputs) - 1, earlier.seen if earlier else None, prefer, folder)
        found = find_copies(rows, folder, against=against is not None, copy=copy, similar=similar, earlier=earlier)
        made = folder / "result"
        made.mkdir()
        counts = _write(found, made, int((~rows.base).sum()))
        (made / ABOUT).write_text(json.dumps({"settings": about, "counts": vars(counts)}, indent=1, ensure_ascii=False))
        del rows, found, earlier
        _replace(made, target)
        return counts
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(output: TaggedOutput, against: TaggedOutput | None, copy: float, similar: float) -> None:
    if against is not None and against.weights != output.weights:
        raise ConfigError(f"--against {against.uri}: it was tagged by another model, so its embeddings do not compare")
    if against is not None and against.uri == output.uri:
        raise ConfigError(f"--against {against.uri}: it is the output itself")
    for name, value in (("--copy", copy), ("--similar", similar)):
        if not 0.5 <= value < 1:
            raise ConfigError(f"{name} {value}: give a cosine from 0.5 to 1")


def _write(found: Found, folder: Path, new: int) -> Deduplicated:
    """Write the groups and the ids to keep. Returns the counts.

    Memory holds 60 bytes a row, and 40 for each image in a group of the kind that is being written.
    """
    rows, count = found.rows, len(found.rows)
    number = np.arange(count)
    dropped = found.representatives() != number
    identical = found.identical != number
    copies = dropped & ~identical
    similar = (found.similar.leader != NONE) & (found.similar.leader != number) & ~dropped
    del number
    kinds = {
        "identical": (identical, found.identical, None),
        "copy": (copies, found.copies.leader, found.copies.cosine),
        "similar": (similar, found.similar.leader, found.similar.cosine),
    }
    told = identical | copies | similar
    for members, leader, _ in kinds.values():
        told[leader[members]] = True
    own = int(rows.starts[len(rows.outputs) - 1])  # rows of the other output are not to be kept or dropped
    with Described(folder.parent / "described", _DESCRIBED) as described:
        kept = _write_keep(rows, folder / KEEP, ~dropped, own, told, described)
    with pq.ParquetWriter(folder / GROUPS, SCHEMA, compression="zstd") as writer:
        for kind, (members, leader, cosine) in kinds.items():
            places, heads = _list_lines(members, leader)
            for start in range(0, len(places), _LINES):
                part = slice(start, start + _LINES)
                cosines = np.where(places[part] == heads[part], 1, 1 if cosine is None else cosine[places[part]])
                writer.write_table(_make_lines(rows, described, kind, places[part], heads[part], cosines))
    same, copied, alike = (int(mask[own:].sum()) for mask in (identical, copies, similar))
    return Deduplicated(count - own, new, same, copied, alike, kept, found.confirmed)


def _write_keep(
    rows: Rows, path: Path, kept: NDArray[np.bool_], own: int, told: NDArray[np.bool_], described: Described
) -> int:
    """Write the ids of the rows that are `kept`, from the position `own` on, and describe those that are `told`.

    Returns how many are kept. Reads the outputs once.
    """
    first = count = 0
    with path.open("w") as file:
        for output in rows.outputs:
            for batch in output.batches(_DESCRIBED.names):
                part = slice(first, first + len(batch))
                described.add(batch.filter(pa.array(told[part])), first + np.flatnonzero(told[part]))
                if first >= own:
                    ids = batch[ID].filter(pa.array(kept[part])).to_pylist()
                    file.writelines(id_ + "\n" for id_ in ids)
                    count += len(ids)
                first += len(batch)
    return count


def _list_lines(members: NDArray[np.bool_], leader: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of the groups and their representatives, int64 (M,) each: sorted, the representatives first."""
    rows = np.flatnonzero(members)
    rows = rows[np.argsort(leader[rows], kind="stable")]
    heads = leader[rows]
    starts = np.flatnonzero(np.r_[True, heads[1:] != heads[:-1]]) if len(heads) else heads
    return np.insert(rows, starts, heads[starts]), np.insert(heads, starts, heads[starts])


def _make_lines(
    rows: Rows,
    described: Described,
    kind: str,
    places: NDArray[np.int64],
    heads: NDArray[np.int64],
    cosines: NDArray[np.float32],
) -> pa.Table:
    """Return lines of `groups.parquet`, for some rows and their representatives."""
    uris = pa.array([output.uri for output in rows.outputs])
    columns = described.take(places, _DESCRIBED.names)
    return pa.table(
        {
            "group": described.take(heads, [ID])[ID],
            "kind": pa.repeat(kind, len(places)),
            "representative": places == heads,
            "cosine": pa.array(cosines, pa.float32()),
            "output": uris.take(pa.array(np.searchsorted(rows.starts, places, "right") - 1)),
            **{name: columns[name] for name in _DESCRIBED.names},
        },
        SCHEMA,
    )


def _replace(made: Path, target: Path) -> None:
    """Put a result in the place of an earlier one. A run that is killed leaves the earlier one, under another name."""
    if not target.exists():
        os.rename(made, target)
        return
    for name in (GROUPS, KEEP, ABOUT):
        os.replace(made / name, target / name)
