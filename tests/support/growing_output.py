"""An output that grows run by run, with all files of a real one. Made without images, a model or Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from benchmarks.outputs import SyntheticOutput, write_output
from curation.retag import RetagConfig, _add_files, _list_pending, retag_shard
from curation.tagged_output import TaggedOutput, open_output
from pipelines.inputs.rows import Input
from pipelines.output.commit import commit_shard
from pipelines.output.fingerprint import claim_output, describe_labels, read_fingerprint
from pipelines.output.labels import claim_labels, make_format, read_label_table
from pipelines.output.output import FINGERPRINT, Output
from pipelines.output.state import OutputState, read_state
from pipelines.output.writer import OutputWriter
from pipelines.planning.packing import SegmentWriter
from pipelines.planning.plan import ShardRef, read_plan
from pipelines.stages.parts import ShardSummary, encode_rows
from pipelines.upkeep.retry import list_retries
from pipelines.upkeep.verify import verify_output
from siglip.families import siglip
from siglip.labels import LabelSet
from storage.store import StoreOptions
from tests.support.vectors import draw_vectors

Publish = Callable[[OutputState], bool]
WIDTH = 4
LABELS = LabelSet.model_validate({"names": ["cat", "dog", "bird"], "threshold": 0.001})


class GrowingOutput:
    """An output at a folder or URI, which has no shards at first. `plan` adds some, and a `Run` commits them.

    `made` is what it has at first, by default three labels and nothing. An output that is there is taken up.
    """

    def __init__(self, root: Path | str, made: SyntheticOutput | None = None) -> None:
        self.root, self.uri = Path(root), str(root)
        if self.output.exists(FINGERPRINT):
            return
        made = made or SyntheticOutput(
            LABELS, draw_vectors(3, WIDTH, 1), 0, lambda shard: draw_vectors(0, WIDTH, shard)
        )
        write_output(self.uri, made)

    @property
    def output(self) -> Output:
        """The output, as a new process opens it."""
        return Output(self.uri, StoreOptions.from_environment())

    def plan(self, shards: int, rows: int = 3) -> int:
        """Plan shards of `rows` images each, as a new segment. Return its number."""
        number = read_plan(self.output).next_number
        segment = SegmentWriter(number)
        for shard in range(shards):
            uri = f"made/{number}-{shard}.tar"
            segment.add([Input("tar", uri, uri, 1, "made-up", rows=rows)])
        assert self.output.put_if_absent(f"plan/{number:06d}.parquet", segment.close())
        return number

    def grow(
        self, shards: int, rows: int = 3, rejected: Collection[int] = (), publish: Publish | None = None
    ) -> dict[str, Any]:
        """Plan shards, commit them with these rows rejected, and finish. Return the manifest."""
        self.plan(shards, rows)
        run = self.run(publish)
        for ref in list(run.state.list_pending()):
            run.commit(ref, rejected)
        return run.finish()

    def run(self, publish: Publish | None = None) -> Run:
        """Start a run. `publish` brings the tables up to the output at its end."""
        output = self.output
        fingerprint = read_fingerprint(output)
        assert fingerprint is not None
        format_ = make_format(fingerprint, read_label_table(output))
        writer = OutputWriter(output, format_, output.read("fingerprint.json").decode())
        return Run(read_state(output, read_plan(output), publish), writer, fingerprint)

    def retry(
        self, reasons: Collection[str] = (), still: Collection[int] = (), publish: Publish | None = None
    ) -> dict[str, Any]:
        """Retry rejected rows, of which those numbered `still` are rejected once more. Return the manifest."""
        run = self.run(publish)
        for ref in run.retries(reasons):
            run.retry(ref, still)
        return run.finish()

    def retag(self, target: Path, labels: LabelSet) -> dict[str, Any]:
        """Do what `curation.retag.retag_output` does, without Ray. Return the manifest of the target."""
        source, new = open_output(str(self.root)), Output(str(target))
        kept = {key: value for key, value in source.fingerprint.items() if not key.startswith("labels.")}
        fingerprint = {**kept, **describe_labels(labels, siglip)}
        text = claim_output(new, fingerprint)
        table = claim_labels(new, replace(source.table, labels=labels))
        for segment in source.output.segments():
            path = source.output.path_of(segment.uri)
            new.put_if_absent(path, source.output.read(path))
        state = read_state(new, read_plan(new))
        planned, pending = _list_pending(source.ledger, state)
        state.announce({int(ref.shard[:6]) for ref in pending})
        config = RetagConfig(source.output, OutputWriter(new, source.format, text), table)
        for ref in _add_files(pending, source.ledger):
            state.add(retag_shard(ref, config)[2])
        return state.finish(fingerprint, {"retagged_from": source.uri}, [], planned)

    def check(self) -> None:
        """Check that the output verifies, and that no file is there that no ledger names."""
        report = verify_output(self.output)
        assert report.ok, report.problems
        assert self.leftovers() == set()

    def leftovers(self) -> set[str]:
        """The files in `data`, `rejects` and `parts` that no ledger names."""
        named = {file.path for _, file in read_state(self.output, read_plan(self.output)).ledger.list_files()}
        return set(self.output.files()) - named

    def data_files(self, kind: str = "data") -> list[str]:
        """The names of the files in a folder."""
        return sorted(path.name for path in (self.root / kind).glob("*"))

    def stored_keys(self, kind: str = "data") -> list[str]:
        """The keys of all rows in a folder, as a reader finds them that does not read the ledgers."""
        table = pyarrow.dataset.dataset(self.root / kind, format="parquet").to_table(columns=["key"])
        return sorted(table["key"].to_pylist())


class Run:
    """A run that works on all planned shards. It commits and seals them when the test says so."""

    def __init__(self, state: OutputState, writer: OutputWriter, fingerprint: dict[str, Any]) -> None:
        self.state, self.writer, self.fingerprint = state, writer, fingerprint
        state.announce({segment.number for segment in state.plan.segments})

    def commit(self, ref: ShardRef, rejected: Collection[int] = (), *, add: bool = True) -> dict[str, Any]:
        """Commit a shard with these rows rejected. Without `add`, the run is killed before it knows of the commit."""
        rows = list(range(ref.rows))
        return self._commit(ref, rows, rejected, ref.rows, add)

    def retries(self, reasons: Collection[str] = ()) -> list[ShardRef]:
        """The shards with rejected rows, as the shards of a retry."""
        return self.state.ledger.with_files(list(list_retries(self.state.ledger, self.state.plan, reasons)))

    def retry(self, ref: ShardRef, still: Collection[int] = (), *, add: bool = True) -> dict[str, Any]:
        """Commit the next generation of a shard, in which all rejected rows are read, and some rejected again."""
        before = self.writer.output.read_commit(ref.shard, ref.generation - 1)
        rows = [
            number
            for file in self.state.ledger.find_files([ref.shard])[ref.shard]
            if file.kind == "rejects"
            for number in self._numbers(file)
        ]
        return self._commit(ref, sorted(rows), still, before["rows_in"], add)

    def finish(self) -> dict[str, Any]:
        """End the run. Return the manifest."""
        return self.state.finish(self.fingerprint, {"rows": 1, "started_at": self.state.run}, [])

    def _numbers(self, file: Any) -> list[int]:
        with self.writer.output.open_rows(file.path, file.bytes) as parquet:
            numbers: list[int] = parquet.read(["row"])["row"].to_pylist()
            return numbers[file.first : file.first + file.rows]

    def _commit(
        self, ref: ShardRef, rows: Sequence[int], rejected: Collection[int], rows_in: int, add: bool
    ) -> dict[str, Any]:
        runs = encode_rows(np.array(rows, np.int64))
        parts = {self.writer.write_part(ref.name, self._make_rows(ref, rows, rejected)): runs} if rows else {}
        record = commit_shard(self.writer, ref, parts, ShardSummary(runs, rows_in))
        if add:
            self.state.add(record)
        return record

    def _make_rows(self, ref: ShardRef, rows: Sequence[int], rejected: Collection[int]) -> pa.Table:
        count = len(rows)
        keys = [f"{ref.shard}/{row}" for row in rows]
        seed = int(ref.shard.replace("-", ""))
        width = self.writer.format.width
        vectors = [draw_vectors(1, width, 100 * seed + row)[0].tolist() for row in rows]
        values: Mapping[str, list[Any]] = {
            "key": keys,
            "source": [f"made/{ref.shard}.tar"] * count,
            "row": list(rows),
            "width": [1] * count,
            "height": [1] * count,
            "labels": [["cat"]] * count,
            "scores": [[0.5]] * count,
            "embedding": vectors,
            "sha256": [hashlib.sha256(key.encode()).hexdigest() for key in keys],
            "stage": ["decode" if row in rejected else None for row in rows],
            "reason": ["corrupt" if row in rejected else None for row in rows],
        }
        schema = self.writer.format.part_schema()
        columns = {field.name: pa.array(values.get(field.name, [None] * count), field.type) for field in schema}
        return pa.table(columns, schema=schema)


def read_rows_by_id(output: TaggedOutput) -> dict[str, dict[str, Any]]:
    """All tagged and rejected rows of an output, by id. Each id must be there once."""
    found: dict[str, dict[str, Any]] = {}
    for batches in (output.batches([*output.columns, "id"]), output.rejects(["id", "key", "row", "reason"])):
        for batch in batches:
            for row in batch.to_pylist():
                assert row["id"] not in found, row["id"]
                found[row["id"]] = row
    return found
