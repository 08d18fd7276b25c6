"""Compaction: no row is lost or doubled, with runs, retries and other compactions beside it, killed at any write."""

from __future__ import annotations

import threading
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from curation.tagged_output import open_output
from pipelines.config import JobConfig
from pipelines.inputs.columns import PassedColumns
from pipelines.output import markers, writer
from pipelines.output import output as output_module
from pipelines.output import state as state_module
from pipelines.output.markers import make_marker, read_markers
from pipelines.output.output import find_marker, merged_at, owner_of
from pipelines.planning.plan import append_inputs, read_plan
from pipelines.upkeep import compaction, merging
from pipelines.upkeep.compaction import compact_output
from pipelines.upkeep.merging import Compaction
from pipelines.upkeep.verify import verify_output
from siglip.labels import LabelSet
from storage.settings import ConfigError
from storage.store import NotFound, StoreError
from tests.support.growing_output import GrowingOutput, read_rows_by_id
from tests.support.jobs import RecordedProgress
from tests.support.stores.interrupted import kill_everywhere

OTHER = LabelSet.model_validate({"names": ["cat", "dog", "bird"], "threshold": 0.4, "top_k": 1})


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of three images have about 5,000 bytes, so that a merged file has the rows of four or five of them."""
    monkeypatch.setattr(compaction, "SMALL_BYTES", 9_000)
    monkeypatch.setattr(compaction, "FILE_BYTES", 26_000)
    monkeypatch.setattr(compaction, "LEAST_FILES", 3)


@pytest.fixture
def growing(tmp_path: Path) -> GrowingOutput:
    """An output of three nights. A row of each shard is rejected."""
    made = GrowingOutput(tmp_path / "output")
    for shards in (5, 4, 3):
        made.grow(shards, rejected=[1])
    return made


def compact(growing: GrowingOutput) -> Compaction:
    return compact_output(growing.output, RecordedProgress())


def rows(growing: GrowingOutput) -> dict[str, object]:
    return dict(read_rows_by_id(open_output(str(growing.root))))


def age(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let two days pass."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + timedelta(days=2)

    monkeypatch.setattr(state_module, "datetime", Later)
    monkeypatch.setattr(markers, "datetime", Later)


def test_every_row_and_id_is_the_same_after_a_compaction_and_after_another(growing: GrowingOutput) -> None:
    before, keys = rows(growing), growing.stored_keys()
    done = compact(growing)
    assert (done.before, done.kept) == (24, 0)
    assert done.after == len(growing.data_files()) + len(growing.data_files("rejects")) < 12
    assert done.bytes > 0
    assert rows(growing) == before
    assert growing.stored_keys() == keys == sorted(set(keys))
    growing.check()
    growing.grow(6, rejected=[0, 2])
    more = rows(growing)
    again = compact(growing)
    assert again.after < again.before
    assert rows(growing) == more
    assert before.items() <= more.items()
    assert growing.stored_keys() == sorted(set(growing.stored_keys()))
    growing.check()


def test_rows_can_be_taken_by_their_position(growing: GrowingOutput) -> None:
    compact(growing)
    growing.grow(3)
    compact(growing)
    output = open_output(str(growing.root))
    columns = ["id", "key", "embedding"]
    table = output.to_arrow(columns)
    assert table.num_rows == output.rows
    positions = np.random.default_rng(0).integers(0, output.rows, 200)
    assert output.take(positions, columns).equals(table.take(positions))
    assert output.take([], columns).num_rows == 0
    for size in (1, 2, 7):
        found = [batch["id"].to_pylist() for batch in output.batches(["id"], size)]
        assert [id for ids in found for id in ids] == table["id"].to_pylist()
        assert max(map(len, found)) <= size


def test_a_small_output_is_not_written_again_night_after_night(
    growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "SMALL_BYTES", 10**6)
    monkeypatch.setattr(compaction, "FILE_BYTES", 4 * 10**6)
    monkeypatch.setattr(compaction, "LEAST_FILES", 8)
    compact(growing)
    files = growing.data_files()
    assert len(files) == 1
    for _ in range(6):
        growing.grow(1)
        assert compact(growing).bytes == 0
    assert set(files) < set(growing.data_files())
    growing.grow(1)
    assert compact(growing).bytes > 0
    assert len(growing.data_files()) == 1
    assert compact(growing) == Compaction(2, 2, 0, 0)
    growing.check()


def test_a_merged_file_may_become_several(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FILE_BYTES", 1)
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 4)  # the rows of a shard are in two files then
    before = rows(growing)
    compact(growing)
    assert rows(growing) == before
    growing.check()
    growing.retry(still=[1])
    compact(growing)
    assert rows(growing) == before
    growing.check()


@pytest.mark.parametrize("compacted", ["before", "between", "before and between"])
def test_a_retry_gives_the_same_after_a_compaction(tmp_path: Path, compacted: str) -> None:
    plain, merged = GrowingOutput(tmp_path / "plain"), GrowingOutput(tmp_path / "merged")
    for one in (plain, merged):
        one.grow(5, rows=4, rejected=[1, 2])
        one.grow(4, rows=3, rejected=[0])
    if "before" in compacted:
        compact(merged)
    for one in (plain, merged):
        one.retry(still=[2])
    merged.check()
    if "between" in compacted:
        compact(merged)
        merged.check()
    for one in (plain, merged):
        manifest = one.retry(["corrupt"])
        assert (manifest["rows_tagged"], manifest["rows_rejected"]) == (32, 0)
        one.grow(2)
    assert rows(merged) == rows(plain)
    assert verify_output(merged.output).ok


def test_a_merged_file_that_no_shard_needs_any_more_is_deleted(growing: GrowingOutput) -> None:
    compact(growing)
    run = growing.run()
    for ref in run.retries()[1:]:
        run.retry(ref)
    run.finish()
    assert any(merged_at(f"rejects/{name}") for name in growing.data_files("rejects"))
    growing.check()
    growing.retry()
    assert growing.data_files("rejects") == []
    growing.check()


def test_a_merged_file_of_a_killed_run_is_an_orphan_for_a_day(
    growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compaction that has written such a file, and no ledger yet, may be under way."""
    compact(growing)
    run = growing.run()
    for ref in run.retries():
        run.retry(ref)
    run.state.ledger.seal()
    growing.run().finish()
    left = growing.leftovers()
    assert left
    assert all(path.startswith("rejects/merged-") for path in left)
    report = verify_output(growing.output)
    assert (report.orphans, len(report.problems)) == (len(left), len(left))
    assert "belongs to no commit: remove it with --remove-orphans" in report.problems[0]
    # A compaction that may be at work has perhaps written them.
    other = make_marker("other", "compaction")
    other.write(growing.output)
    compact(growing)
    assert growing.leftovers() == left
    assert verify_output(growing.output, since=date(2020, 1, 1)).ok
    age(growing, monkeypatch)
    assert verify_output(growing.output, since=date(2020, 1, 1)).orphans == len(left)
    growing.run().finish()  # a run removes what a compaction has left, too
    growing.check()
    assert list(read_markers(growing.output)) == []


def test_verify_reads_the_rows_of_a_merged_file_that_count(growing: GrowingOutput) -> None:
    """The first shard of a merged file of rejects is the only one that still has rows there."""
    compact(growing)
    run = growing.run()
    for ref in run.retries()[1:]:
        run.retry(ref)
    run.finish()
    report = verify_output(growing.output)
    assert report.rows_rejected == 1
    assert [problem for problem in report.problems if "belongs to no commit" not in problem] == []


def test_a_retagging_gives_the_same_after_a_compaction(growing: GrowingOutput, tmp_path: Path) -> None:
    growing.retag(tmp_path / "plain", OTHER)
    compact(growing)
    growing.retag(tmp_path / "merged", OTHER)
    plain, merged = (read_rows_by_id(open_output(str(tmp_path / name))) for name in ("plain", "merged"))
    assert plain == merged
    assert [verify_output(open_output(str(tmp_path / name)).output).problems for name in ("plain", "merged")] == [
        [],
        [],
    ]


@pytest.mark.parametrize("merged", ["neither", "source", "target"])
def test_a_retried_shard_is_retagged_once(growing: GrowingOutput, tmp_path: Path, merged: str) -> None:
    """Its new generation has all its rows, so that none of the generation before may stay."""
    target = tmp_path / "target"
    growing.retag(target, OTHER)
    if merged == "target":
        compact_output(open_output(str(target)).output, RecordedProgress())
    growing.retry(still=[1])
    growing.retry()
    if merged == "source":
        compact(growing)
    manifest = growing.retag(target, OTHER)
    assert (manifest["rows_in"], manifest["rows_tagged"], manifest["shards"]) == (36, 36, 12)
    found = read_rows_by_id(open_output(str(target)))
    assert found.keys() == rows(growing).keys()
    report = verify_output(open_output(str(target)).output)
    assert (report.duplicates, report.missing, report.rows_tagged) == (0, 0, 36)
    assert [problem for problem in report.problems if "belongs to no commit" not in problem] == []


def test_a_retry_committed_before_a_compaction_and_sealed_after_it(growing: GrowingOutput) -> None:
    run = growing.run()
    records = [run.retry(ref, add=False) for ref in run.retries()]
    # A compaction that read the state before: it does not know of the commits.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.output.state.OutputState.find_unsealed", lambda state: {})
        compact(growing)
    report = verify_output(growing.output)
    assert (report.missing, report.duplicates) == (0, 0)
    assert not [problem for problem in report.problems if "is missing" in problem], report.problems
    for record in records:
        run.state.add(record)
    manifest = run.finish()
    assert (manifest["rows_tagged"], manifest["rows_rejected"]) == (36, 0)
    assert len(rows(growing)) == 36
    assert growing.stored_keys() == sorted(set(growing.stored_keys()))
    assert verify_output(growing.output).missing == 0


def test_a_retry_that_is_sealed_while_a_compaction_merges(growing: GrowingOutput) -> None:
    """The compaction leaves these files, and says so."""
    before = rows(growing)
    write = merging._write_merged

    def retry_first(*arguments: object) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merging, "_write_merged", write)
            if growing.run().retries()[0].generation == 1:
                growing.retry(still=[1])
        return write(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_write_merged", retry_first)
        done = compact(growing)
    assert done.kept > 0
    assert rows(growing) == before
    assert compact(growing).kept == 0
    assert rows(growing) == before
    growing.check()


def test_new_shards_are_sealed_while_a_compaction_merges(growing: GrowingOutput) -> None:
    before = rows(growing)
    write, calls = merging._write_merged, []

    def grow_first(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            growing.grow(2)
        return write(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_write_merged", grow_first)
        assert compact(growing).kept == 0
    manifest = open_output(str(growing.root)).manifest
    assert (manifest["planned_shards"], manifest["shards"]) == (14, 14)
    assert before.items() <= rows(growing).items()
    assert len(rows(growing)) == 42
    growing.check()


def test_a_compaction_after_a_killed_run_says_what_is_planned(growing: GrowingOutput) -> None:
    growing.plan(3)
    run = growing.run()
    run.commit(next(run.state.list_pending()), add=False)
    compact(growing)
    with pytest.raises(ConfigError, match="13 of 15 shards are committed"):
        open_output(str(growing.root))


def test_two_compactions_at_once(growing: GrowingOutput) -> None:
    before = rows(growing)
    results: list[Compaction | BaseException] = []

    def act() -> None:
        try:
            results.append(compact(growing))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=act) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one for one in results if not isinstance(one, Compaction)] == []
    assert rows(growing) == before
    assert growing.stored_keys() == sorted(set(growing.stored_keys()))
    compact(growing)
    assert rows(growing) == before
    growing.check()


@pytest.mark.parametrize("moment", ["before it reads", "after it wrote"])
def test_another_compaction_is_faster(growing: GrowingOutput, moment: str) -> None:
    before = rows(growing)
    write, calls = merging._write_merged, []

    def compact_first(*arguments: object) -> object:
        calls.append(1)
        found = write(*arguments) if moment == "after it wrote" else None  # type: ignore[arg-type]
        if len(calls) == 1:
            compact(growing)
        return write(*arguments) if found is None else found  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_write_merged", compact_first)
        assert compact(growing).kept > 0
    assert rows(growing) == before
    growing.check()


def test_killed_at_any_write_and_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = GrowingOutput(tmp_path / "output")
    for shards in (3, 3):
        made.grow(shards, rejected=[1])
    compact(made)
    made.grow(4, rejected=[1])
    made.retry(still=[0, 1])
    before = rows(made)
    kills = 0
    for _ in kill_everywhere(lambda left: compact(made)):
        kills += 1
        assert rows(made) == before
        report = verify_output(made.output)
        assert (report.missing, report.duplicates, report.rows_in) == (0, 0, 30), report.problems
    assert kills > 7
    assert rows(made) == before
    age(made, monkeypatch)
    compact(made)
    assert rows(made) == before
    made.check()
    assert made.stored_keys() == sorted(set(made.stored_keys()))


def test_killed_at_a_write_and_never_repeated_a_run_goes_on(tmp_path: Path) -> None:
    made = GrowingOutput(tmp_path / "output")
    made.grow(4, rejected=[1])
    count = 4
    for _ in kill_everywhere(lambda left: compact(made)):
        manifest = made.grow(1)
        count += 1
        assert (manifest["planned_shards"], manifest["shards"], manifest["rows_in"]) == (count, count, 3 * count)
        assert len(rows(made)) == 3 * count
        report = verify_output(made.output)
        assert (report.missing, report.duplicates) == (0, 0)
        if count > 12:
            break


def test_a_file_without_its_rows_is_not_merged(growing: GrowingOutput) -> None:
    files = growing.data_files()
    (growing.root / "data" / files[1]).write_bytes((growing.root / "data" / files[0]).read_bytes()[:-5])
    with pytest.raises(StoreError, match=files[1]):
        compact(growing)
    assert growing.data_files() == files
    (growing.root / "data" / files[1]).unlink()
    with pytest.raises(NotFound, match=files[1]):
        compact(growing)
    assert growing.data_files() == [files[0], *files[2:]]


def test_a_merged_file_that_was_deleted_before_it_counted_is_noticed(growing: GrowingOutput) -> None:
    """A compaction on a machine whose clock is days ahead takes it for abandoned."""
    before = rows(growing)
    write = merging._write_merged

    def delete(*arguments: object) -> object:
        found = write(*arguments)  # type: ignore[arg-type]
        growing.output.delete(found[0][1].path)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_write_merged", delete)
        with pytest.raises(StoreError, match="was deleted before it counted"):
            compact(growing)
    assert rows(growing) == before
    growing.check()


def test_an_output_that_is_none_cannot_be_compacted(tmp_path: Path) -> None:
    from pipelines.output.output import Output

    with pytest.raises(ConfigError, match="no output of `sightline tag`"):
        compact_output(Output(str(tmp_path)), RecordedProgress())
    made = GrowingOutput(tmp_path / "output")
    made.grow(2)
    (made.root / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="finish the output with `sightline tag` first"):
        compact(made)


def test_merged_files_are_no_inputs(growing: GrowingOutput, tmp_path: Path) -> None:
    """The output may lie in the folder of the inputs."""
    compact(growing)
    [name, *_] = [name for name in growing.data_files() if merged_at(f"data/{name}")]
    assert owner_of(f"data/{name}") is None
    assert find_marker(str(growing.root / "data" / name)) == str(growing.root / "fingerprint.json")
    (tmp_path / "a.jpg").write_bytes(b"x")
    config = JobConfig(input=str(tmp_path), output=str(tmp_path / "other"), labels=["a"])
    other = output_module.Output(config.output)
    report = append_inputs(config, other, read_plan(other), PassedColumns({}), lambda: None)
    assert report is not None
    assert (report.inputs, report.waiting) == (1, [])


@pytest.mark.parametrize(
    "path",
    [
        "data/merged-20260230T000000-0123456789ab.parquet",
        "data/merged-20260101T000000-0123456789ab.parquet.bak",
        "data/x/merged-20260101T000000-0123456789ab.parquet",
        "parts/merged-20260101T000000-0123456789ab.parquet",
        "data/000000-000000-0123456789ab.parquet",
    ],
)
def test_other_names_are_no_merged_files(path: str) -> None:
    assert merged_at(path) is None
