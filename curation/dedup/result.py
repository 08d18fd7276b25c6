"""The result of `sightline dedup`: files with the groups and with the images to keep, to which later runs add."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.dedup.dedup import COPY, SIMILAR, Earlier, Found, find_copies
from curation.dedup.groups import NONE
from curation.dedup.rows import LARGEST, Rows
from curation.tagged_output import ID, TaggedOutput
from storage.settings import ConfigError

GROUPS, KEEP, ABOUT = "groups.parquet", "keep.txt", "dedup.json"
_COLUMNS = (ID, "key", "source", "width", "height")
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

    Memory holds about 150 bytes a row, and 500 bytes for each image that is in a group. A temporary folder beside
    `target` holds 2 bytes for each number of an embedding, and 2.7 kB for each image that is close to another.

    Raises `ConfigError` if the outputs do not fit each other or the earlier result, and `storage.store.StoreError`.
    """
    about = {
        "output": output.uri,
        "against": against.uri if against else None,
        "prefer": prefer,
        "copy": copy,
        "similar": similar,
        "weights": output.weights,
    }
    _check(output, against, copy, similar)
    seen, groups = _read_earlier(target, about)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        outputs = [against, output] if against else [output]
        rows = Rows(outputs, 1 if against else 0, {hash(id_) for id_ in seen}, prefer, folder)
        earlier = _locate(groups, rows) if groups is not None else Earlier()
        found = find_copies(rows, folder, against=against is not None, copy=copy, similar=similar, earlier=earlier)
        made = folder / "result"
        made.mkdir()
        counts = _write(found, made, int((~rows.base).sum()))
        (made / ABOUT).write_text(json.dumps({"settings": about, "counts": vars(counts)}, indent=1, ensure_ascii=False))
        del rows, found
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


def _read_earlier(target: Path, about: dict[str, Any]) -> tuple[list[str], pa.Table | None]:
    """Return the ids of the rows that an earlier run has looked at, and its groups, None if there was none."""
    if not target.exists():
        return [], None
    try:
        before = json.loads((target / ABOUT).read_text())["settings"]
        groups = pq.read_table(target / GROUPS)
        seen = (target / KEEP).read_text().splitlines()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        if target.is_dir() and not any(target.iterdir()):
            return [], None
        raise ConfigError(f"--to {target}: it is not empty, and has no result of `sightline dedup`") from None
    for name, value in about.items():
        if before.get(name) != value:
            raise ConfigError(
                f"--to {target}: its result was made with {name} {before.get(name)}, not {value}: give another folder"
            )
    members = groups.filter(pa.compute.invert(groups["representative"]))
    return [*seen, *members[ID].to_pylist()], groups


def _locate(groups: pa.Table, rows: Rows) -> Earlier:
    """Return an earlier run's groups by the rows' positions."""
    wanted = set(groups[ID].to_pylist())
    places: dict[str, int] = {}
    for position, row in _iterate(rows, (ID,)):
        if row[ID] in wanted:
            places[row[ID]] = position
    copies: list[tuple[int, int, float]] = []
    similar: list[tuple[int, int, float]] = []
    for row in groups.select([ID, "group", "kind", "representative", "cosine"]).to_pylist():
        # A row may be gone: a retry replaces rejected rows, and a shard may be tagged anew.
        if row["representative"] or row[ID] not in places or row["group"] not in places:
            continue
        pair = (places[row["group"]], places[row[ID]], row["cosine"])
        if row["kind"] != "identical":  # those are found anew
            (similar if row["kind"] == "similar" else copies).append(pair)
    return Earlier(copies, similar)


def _iterate(rows: Rows, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    position = 0
    for output in rows.outputs:
        for batch in output.batches(columns):
            for row in batch.to_pylist():
                yield position, row
                position += 1


def _write(found: Found, folder: Path, new: int) -> Deduplicated:
    """Write the groups and the ids to keep. Returns the counts."""
    rows, count = found.rows, len(found.rows)
    dropped = found.representatives() != np.arange(count)
    identical = found.identical != np.arange(count)
    copies = dropped & ~identical
    similar = (found.similar.leader != NONE) & (found.similar.leader != np.arange(count)) & ~dropped
    leaders = {
        "identical": np.where(identical, found.identical, NONE),
        "copy": np.where(copies, found.copies.leader, NONE),
        "similar": np.where(similar, found.similar.leader, NONE),
    }
    cosines = {"identical": np.ones(count, np.float32), "copy": found.copies.cosine, "similar": found.similar.cosine}
    told = np.zeros(count, np.bool_)
    for leader in leaders.values():
        told |= leader != NONE
        told[leader[leader != NONE]] = True
    own = rows.starts[len(rows.outputs) - 1]  # rows of the other output are not to be kept or dropped
    described: dict[int, dict[str, Any]] = {}
    kept = 0
    with (folder / KEEP).open("w") as file:
        for position, row in _iterate(rows, _COLUMNS):
            if told[position]:
                described[position] = row
            if position >= own and not dropped[position]:
                file.write(row[ID] + "\n")
                kept += 1
    with pq.ParquetWriter(folder / GROUPS, SCHEMA, compression="zstd") as writer:
        for kind, leader in leaders.items():
            members = np.flatnonzero(leader != NONE)
            members = members[np.lexsort((members, leader[members]))]
            lines: list[dict[str, Any]] = []
            last = NONE
            for member in members.tolist():
                head = int(leader[member])
                for place in [head, member] if head != last else [member]:
                    lines.append(
                        {
                            "group": described[head][ID],
                            "kind": kind,
                            "representative": place == head,
                            "cosine": 1.0 if place == head else float(cosines[kind][place]),
                            "output": rows.outputs[int(np.searchsorted(rows.starts, place, "right")) - 1].uri,
                            **described[place],
                        }
                    )
                last = head
                if len(lines) >= 100_000:
                    writer.write_table(pa.Table.from_pylist(lines, SCHEMA))
                    lines.clear()
            writer.write_table(pa.Table.from_pylist(lines, SCHEMA))
    same, copied, alike = (int(mask[own:].sum()) for mask in (identical, copies, similar))
    return Deduplicated(count - int(own), new, same, copied, alike, kept, found.confirmed)


def _replace(made: Path, target: Path) -> None:
    """Put a result in the place of an earlier one. A run that is killed leaves the earlier one, under another name."""
    if not target.exists():
        os.rename(made, target)
        return
    for name in (GROUPS, KEEP, ABOUT):
        os.replace(made / name, target / name)
