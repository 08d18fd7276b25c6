"""The plan: inputs packed into shards. It is written before any work, and later runs only append to it.

Each run that finds new inputs appends plan files (*segments*): `plan/000000.parquet` and so on. A shard is a number of
rows in a row: the column `shard` has its name. Row groups end where a shard ends, and have at least
`packing.GROUP_INPUTS` inputs, so that a reader fetches little more than its shard, and a million shards need few row
groups.

A segment is published when it is full, while the listing goes on. A run that is killed while it lists has lost at most
the inputs of one segment, and the next run goes on behind them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.config import JobConfig
from pipelines.inputs.columns import PassedColumns
from pipelines.inputs.rows import Input
from pipelines.output.output import Output, shard_name
from pipelines.planning.known import PLAN_COLUMNS, KnownInputs
from pipelines.planning.listing import InputLister, PlanReport
from pipelines.planning.packing import write_segments
from pipelines.planning.partial import note_partial
from storage.files import StoreFile, read_ahead
from storage.settings import ConfigError

_OLD_IMAGES = "rows"
"""The name of the column `images` in plans of versions that had a row group for each shard. Those versions cannot read
a plan of this version: the other name makes them fail, where they would take a row group for a shard."""


@dataclass(frozen=True)
class ShardRef:
    """A shard to process: its inputs are in the row group `group` of the plan file `segment`.

    `rows` is the expected number of images, an estimate if tars are among the inputs. `generation` is the generation
    that the commit will have: 0 at first, and one more each time that rejected rows are retried. For a generation
    above 0, `files` are the shard's files before, as `pipelines.output.row_files.dump_files` writes them.
    """

    shard: str
    segment: str
    group: int
    rows: int
    generation: int = 0
    files: str = ""

    @property
    def name(self) -> str:
        """The name of this generation of the shard, as file names, blocks and receipts have it."""
        return shard_name(self.shard, self.generation)


@dataclass(frozen=True)
class Segment:
    """A plan file: its number and URI, and for each of its S shards the expected `images` and the row `group`."""

    number: int
    uri: str
    images: NDArray[np.int64]
    group: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.images)

    def ref(self, index: int) -> ShardRef:
        """The reference of the segment's shard with this index."""
        return ShardRef(f"{self.number:06d}-{index:06d}", self.uri, int(self.group[index]), int(self.images[index]))


@dataclass
class Plan:
    """The plan of an output: its segments, by number.

    `known` are the planned inputs, and `columns` the image columns of the planned Parquet files. Both are empty if the
    plan was read without its inputs.
    """

    output: Output
    segments: list[Segment] = field(default_factory=list)
    known: KnownInputs = field(default_factory=KnownInputs)
    columns: set[str] = field(default_factory=set)
    has_inputs: bool = True

    @property
    def shards(self) -> int:
        """The number of planned shards."""
        return sum(map(len, self.segments))

    @property
    def next_number(self) -> int:
        """The number of the next segment."""
        return self.segments[-1].number + 1 if self.segments else 0

    def holds(self, uri: str) -> bool:
        """Tell whether this URI, or an object below it, is planned. Reads the plan until it finds one."""
        for _, data in read_ahead(self.output.store, self.output.segments()):
            uris = pq.read_table(pa.BufferReader(data), columns=["uri"])["uri"]
            if pc.any(pc.or_(pc.equal(uris, uri), pc.starts_with(uris, f"{uri}/"))).as_py():
                return True
        return False


def read_plan(output: Output, roots: Iterable[str] = (), *, inputs: bool = True) -> Plan:
    """Read an output's plan: the numbers of each shard, and hashes of all inputs. Files are read a few at a time.

    `roots` are folders and files below which links are resolved: the configured inputs. Without `inputs`, only the
    shards are read: ten million inputs take 15 s and 500 MB.
    """
    plan = Plan(output, known=KnownInputs(roots), has_inputs=inputs)
    for entry, data in read_ahead(output.store, output.segments()):
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            plan.segments.append(_read_segment(_number_of(entry.uri), entry.uri, file))
            if not inputs:
                continue
            plan.known.add(file.read(columns=list(PLAN_COLUMNS)))
            # Plans of earlier versions have no image column; a column that a file does not have is not read.
            columns = file.read(columns=["column"])
            if columns.num_columns:
                plan.columns.update(pc.unique(columns["column"]).drop_null().to_pylist())
    return plan


def count_shards(output: Output, plan: Plan) -> int:
    """Return the number of shards that are planned now. Other runs may have appended to the plan since it was read."""
    known = {segment.number for segment in plan.segments}
    new = [entry for entry in output.segments() if _number_of(entry.uri) not in known]
    shards = plan.shards
    for entry, data in read_ahead(output.store, new):
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            shards += len(_read_segment(_number_of(entry.uri), entry.uri, file))
    return shards


def list_shards(output: Output) -> Iterator[ShardRef]:
    """Yield all planned shards, in order."""
    for segment in read_plan(output, inputs=False).segments:
        for index in range(len(segment)):
            yield segment.ref(index)


def read_shard_inputs(output: Output, ref: ShardRef) -> list[Input]:
    """Return the inputs of a shard. Raises `ConfigError` as `read_inputs_of` does."""
    [(_, inputs)] = read_inputs_of(output, [ref])
    return inputs


def read_inputs_of(output: Output, refs: Sequence[ShardRef]) -> Iterator[tuple[ShardRef, list[Input]]]:
    """Yield shards with their inputs. A row group is read once for the shards in a row that it has.

    Raises `ConfigError` if the plan file is missing, or has not the shard.
    """
    for (segment, group), together in groupby(refs, lambda ref: (ref.segment, ref.group)):
        found: dict[str, list[Input]] = {}
        wanted = [*together]
        names = pa.array([ref.shard for ref in wanted])
        entry = output.store.stat(segment)
        if entry is None:
            raise ConfigError(f"{segment} is gone: the plan is part of the output and must stay with it")
        with StoreFile(output.store, entry) as raw, pq.ParquetFile(raw) as file:
            for batch in file.iter_batches(1024, row_groups=[group]):
                for record in batch.filter(pc.is_in(batch["shard"], names)).to_pylist():
                    shard, images = record.pop("shard"), record.pop("images" if "images" in record else _OLD_IMAGES)
                    found.setdefault(shard, []).append(Input(**record, rows=images))
        for ref in wanted:
            if ref.shard not in found:
                raise ConfigError(f"{segment} has no shard {ref.shard} any more: restore the file as the run wrote it")
            yield ref, found[ref.shard]


def group_shards(shards: Iterable[ShardRef], rows: int) -> Iterator[list[ShardRef]]:
    """Yield lists of consecutive shards that have up to `rows` expected images together, or of one shard."""
    group: list[ShardRef] = []
    images = 0
    for ref in shards:
        size = max(1, ref.rows)  # the estimate for a tar may be none
        if group and images + size > rows:
            yield group
            group, images = [], 0
        group.append(ref)
        images += size
    if group:
        yield group


def append_inputs(
    config: JobConfig, output: Output, plan: Plan, columns: PassedColumns, claim: Callable[[], object] | None
) -> PlanReport | None:
    """List the inputs, and append those that are not planned to the plan, as new shards.

    Adds the passed-through columns of new inputs to `columns`, and the new segments to `plan`. Calls `claim` before
    anything is written. If it is None, nothing is written, and the report says what would be. Returns None if another
    run has appended to the plan meanwhile: it may have planned the same inputs, so the caller must read the plan again.
    What was appended until then stays in the plan.

    Raises `ConfigError` when the configuration does not fit an input, or when there is no input at all. Full segments
    may be appended by then, and the output be claimed.
    """
    if not plan.has_inputs:
        raise ValueError("the plan was read without its inputs, which would be planned once more")
    report = PlanReport()
    wanted = config.parquet.image_column
    if wanted is not None and (others := plan.columns - {wanted}):
        report.notes.append(
            f"Parquet files of earlier runs are read from column {', '.join(sorted(others))} as planned, new ones "
            f"from {wanted} (parquet.image_column): give a new output to read all from {wanted}"
        )
    planned_before = bool(plan.segments)
    # The types of passed-through columns are part of the claim. They are known when all inputs are listed.
    early = columns.fixed is not None or not columns.wanted
    with ExitStack() as stack:
        waiting: list[tuple[int, Any]] = []
        inputs = InputLister(config, output.options, plan.known, plan.holds, columns, report).list_new()
        inputs = note_partial(inputs, report.notes)
        for number, data in write_segments(config, plan.next_number, inputs, report):
            if claim is None:
                continue
            if early:
                claim()
                if not _publish(output, plan, number, data):
                    return None
            else:
                file = stack.enter_context(tempfile.TemporaryFile())
                file.write(data)
                waiting.append((number, file))
        if not (report.inputs or report.known or report.waiting or planned_before):
            counts = ", ".join(f"{count} {why}" for why, count in report.skipped.counts.most_common(4))
            skipped = f" ({counts} skipped)" if counts else ""
            raise ConfigError(f"input: no image, tar or Parquet file under {', '.join(config.input)}{skipped}")
        if claim is not None and waiting:
            claim()
        for number, file in waiting:
            file.seek(0)
            if not _publish(output, plan, number, file.read()):
                return None
    return report


def _number_of(uri: str) -> int:
    return int(uri.rpartition("/")[2].removesuffix(".parquet"))


def _publish(output: Output, plan: Plan, number: int, data: bytes) -> bool:
    path = f"plan/{number:06d}.parquet"
    if not output.put_if_absent(path, data):
        return False
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        plan.segments.append(_read_segment(number, output.uri_of(path), file))
    return True


def _read_segment(number: int, uri: str, file: pq.ParquetFile) -> Segment:
    images = "images" if "images" in file.schema_arrow.names else _OLD_IMAGES
    table = file.read(columns=["shard", images]).combine_chunks()
    if not table.num_rows:
        return Segment(number, uri, np.zeros(0, np.int64), np.zeros(0, np.int32))
    shard, counts = table["shard"], table[images].to_numpy()
    starts = np.flatnonzero(np.r_[True, pc.not_equal(shard[1:], shard[:-1]).to_numpy()])
    ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
    group = np.searchsorted(ends, starts, side="right").astype(np.int32)
    return Segment(number, uri, np.add.reduceat(counts, starts).astype(np.int64), group)
