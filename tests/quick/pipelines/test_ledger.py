"""Ledgers and the state of an output: sealed by several runs, in several generations, damaged, killed at any write."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from curation.tagged_output import open_output
from pipelines.output import state as state_module
from pipelines.output import totals as totals_module
from pipelines.output.ledger import Ledger, ledger_path
from pipelines.output.markers import marker_path, read_markers
from pipelines.output.output import Output
from pipelines.output.state import read_state
from pipelines.output.totals import Totals
from pipelines.planning.plan import ShardRef, read_plan
from pipelines.upkeep.verify import verify_output
from storage.settings import ConfigError
from storage.store import Entry, StoreError
from tests.support.growing_output import GrowingOutput, Run, read_rows_by_id
from tests.support.stores.interrupted import kill_everywhere


@pytest.fixture
def growing(tmp_path: Path) -> GrowingOutput:
    """An output with a plan of six shards with three images each."""
    made = GrowingOutput(tmp_path / "output")
    made.plan(6)
    return made


def pending(run: Run) -> list[ShardRef]:
    return list(run.state.list_pending())


def check_totals(growing: GrowingOutput) -> Ledger:
    """Compare the totals with the sums over the records that count. Return the ledger."""
    output = growing.output
    ledger, expected = Ledger.read(output), Totals()
    for segment in read_plan(output).segments:
        for index in range(len(segment)):
            shard = segment.ref(index).shard
            if (generation := ledger.generation_of(shard)) >= 0:
                expected.add(output.read_commit(shard, generation))
    assert ledger.totals.as_dict() == expected.as_dict()
    counts: Counter[str] = Counter()
    for shard, file in ledger.list_files():
        counts[file.kind] += file.rows
        assert ledger.generation_of(shard) >= 0
    assert (counts["data"], counts["rejects"]) == (expected.rows_tagged, expected.rows_rejected)
    return ledger


def test_a_sealed_shard_has_its_files(growing: GrowingOutput) -> None:
    run = growing.run()
    one, two, three, *others = pending(run)
    records = [run.commit(one), run.commit(two, [1]), run.commit(three, [0, 1, 2])]
    assert run.state.ledger.waiting == 3
    assert run.state.ledger.seal() == {one.shard, two.shard, three.shard}
    assert run.state.ledger.seal() == set()
    ledger = check_totals(growing)
    assert ledger.count == 1
    assert [ledger.generation_of(ref.shard) for ref in (one, two, three, *others)] == [0, 0, 0, -1, -1, -1]
    assert ledger.generation_of("000007-000000") == -1
    assert ledger.generations(0, 4).tolist() == [0, 0, 0, -1]
    assert ledger.generations(7, 2).tolist() == [-1, -1]
    for ref, record in zip((one, two, three), records, strict=True):
        [found] = ledger.find_files([ref.shard]).values()
        assert [file.path for file in found] == [file["path"] for file in record["files"]]
    assert ledger.find_files([]) == {}


def test_a_shard_without_rows_is_sealed(growing: GrowingOutput) -> None:
    number = growing.plan(1, rows=0)
    run = growing.run()
    [ref] = [ref for ref in pending(run) if ref.shard.startswith(f"{number:06d}")]
    record = run.commit(ref)
    assert record["files"] == []
    run.state.ledger.seal()
    ledger = check_totals(growing)
    assert ledger.generation_of(ref.shard) == 0
    assert ledger.find_files([ref.shard]) == {ref.shard: []}
    assert list(ledger.list_files()) == []


def test_what_was_sealed_at_some_time_can_be_read_later(growing: GrowingOutput) -> None:
    run = growing.run()
    for ref in pending(run):
        run.commit(ref, [1])
        run.state.ledger.seal()
    growing.retry()
    for count in range(8):
        ledger = Ledger.read(growing.output, count)
        assert (ledger.count, ledger.totals.shards) == (count, min(count, 6))
        assert ledger.totals.rows_rejected == (0 if count == 7 else count)
    with pytest.raises(StoreError, match=r"names 8 ledgers, and there are 7"):
        Ledger.read(growing.output, 8)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("shards", ["the same", "others", "some of them"])
def test_two_runs_seal_one_after_the_other(growing: GrowingOutput, shards: str, first: int) -> None:
    runs = [growing.run(), growing.run()]
    refs = pending(runs[0])
    mine, others = refs[:4], {"the same": refs[:4], "others": refs[4:], "some of them": refs[2:]}[shards]
    for run, some in zip(runs, (mine, others), strict=True):
        for ref in some:
            run.commit(ref, [1])
    runs[first].state.ledger.seal()
    runs[1 - first].state.ledger.seal()
    ledger = check_totals(growing)
    assert ledger.totals.shards == len({ref.shard for ref in [*mine, *others]})
    assert ledger.count == (1 if shards == "the same" else 2)
    for run in runs:
        run.state.ledger.refresh()
        assert run.state.ledger.totals == ledger.totals
        assert run.state.ledger.waiting == 0


@pytest.mark.parametrize("shards", ["the same", "others", "some of them"])
def test_runs_seal_at_once(growing: GrowingOutput, shards: str) -> None:
    runs = [growing.run() for _ in range(4)]
    refs = pending(runs[0])
    for number, run in enumerate(runs):
        for ref in {"the same": refs, "others": refs[number::4], "some of them": refs[: number + 3]}[shards]:
            run.commit(ref, [1])
    start = threading.Barrier(4)
    errors: list[BaseException] = []

    def seal(run: Run) -> None:
        start.wait()
        try:
            run.finish()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=seal, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert check_totals(growing).totals.shards == 6
    assert open_output(str(growing.root)).manifest["shards"] == 6
    assert list(read_markers(growing.output)) == []
    growing.check()


@pytest.mark.parametrize("sealed", [True, False])
def test_a_later_generation_after_one_that_is_sealed_or_not(growing: GrowingOutput, sealed: bool) -> None:
    run = growing.run()
    for ref in pending(run):
        run.commit(ref, [0, 1])
    run.finish()
    run = growing.run()
    refs = run.retries()
    for ref in refs:
        run.retry(ref, [1], add=sealed)
    if sealed:
        run.finish()
        assert check_totals(growing).totals.rows_rejected == 6
    # Of some shards the next generation is committed too, from the files that the ledger will have.
    run = growing.run()
    again = run.retries()
    assert [ref.generation for ref in again] == [2] * 6
    for ref in again[:3]:
        run.retry(ref)
    manifest = run.finish()
    assert (manifest["generations"], manifest["rows_tagged"], manifest["rows_rejected"]) == (9, 15, 3)
    assert manifest["reasons"] == {"corrupt": 3}
    check_totals(growing)
    growing.check()
    assert len(read_rows_by_id(open_output(str(growing.root)))) == 18


def test_several_generations_that_were_never_sealed(growing: GrowingOutput) -> None:
    """So it is in an output of an earlier version, which has no ledger."""
    growing.plan(1)
    run = growing.run()
    for ref in pending(run):
        run.commit(ref, [0, 1])
    run.finish()
    growing.retry(still=[1])
    growing.retry()
    before = read_rows_by_id(open_output(str(growing.root)))
    shutil.rmtree(growing.root / "ledger")
    manifest = growing.run().finish()
    assert (manifest["ledgers"], manifest["generations"], manifest["rows_tagged"]) == (1, 14, 21)
    assert read_rows_by_id(open_output(str(growing.root))) == before
    check_totals(growing)
    growing.check()


def test_both_runs_have_retried_the_same_shard(growing: GrowingOutput) -> None:
    run = growing.run()
    for ref in pending(run):
        run.commit(ref, [0, 1])
    run.finish()
    one, two = growing.run(), growing.run()
    mine, others = one.retries(), two.retries()
    for ref in mine:
        one.retry(ref, [1])
    for ref in others:
        assert two.retry(ref)["rows_rejected"] == 1  # the first record stays
    two.finish()
    manifest = one.finish()
    assert (manifest["rows_rejected"], manifest["generations"]) == (6, 6)
    # A third run is one generation ahead of the first, which comes late.
    late = growing.run()
    ahead = growing.run()
    for ref in ahead.retries():
        record = ahead.retry(ref, add=False)
        late.state.add(growing.output.read_commit(ref.shard, 1))
        late.state.add(record)
    assert late.finish()["rows_rejected"] == 0
    ahead.finish()
    check_totals(growing)
    growing.check()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "no Parquet": lambda data: b"not Parquet",
    "another file": lambda data: make_parquet({"a": [1]}),
    "other columns": lambda data: make_parquet({"a": [1]}, pq.read_schema(as_file(data)).metadata),
    "other totals": lambda data: rewrite(data, lambda about: about["totals"].update(more=1)),
    "no totals": lambda data: rewrite(data, lambda about: about.pop("totals")),
    "no version": lambda data: rewrite(data, lambda about: about.pop("version")),
    "no time": lambda data: rewrite(data, lambda about: about.update(sealed_at="now")),
}


def as_file(data: bytes) -> Any:
    import io

    return io.BytesIO(data)


def make_parquet(columns: dict[str, list[Any]], metadata: Any = None) -> bytes:
    import pyarrow as pa

    buffer = as_file(b"")
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), buffer)
    return bytes(buffer.getvalue())


def rewrite(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A ledger with other metadata."""
    table = pq.read_table(as_file(data))
    [(key, text)] = table.schema.metadata.items()
    about = json.loads(text)
    change(about)
    buffer = as_file(b"")
    pq.write_table(table.replace_schema_metadata({key: json.dumps(about)}), buffer)
    return bytes(buffer.getvalue())


def snapshot(growing: GrowingOutput) -> dict[str, bytes]:
    root = growing.root
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_ledger_is_an_error_and_changes_nothing(growing: GrowingOutput, damage: str) -> None:
    from sightline import api

    run = growing.run()
    for ref in pending(run):
        run.commit(ref, [1])
        run.state.ledger.seal()
    run.finish()
    path = growing.root / ledger_path(2)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = snapshot(growing)
    message = r"ledger/000002\.parquet is damaged"
    with pytest.raises(StoreError, match=message):
        Ledger.read(growing.output)
    with pytest.raises(StoreError, match=message):
        growing.run()
    with pytest.raises(StoreError, match=message):
        verify_output(growing.output, remove_orphans=True)
    with pytest.raises(ConfigError, match=message):
        open_output(str(growing.root))
    (growing.root / "manifest.json").unlink()  # the status needs the ledgers then
    with pytest.raises(StoreError, match=message):
        api.status(growing.root)
    assert snapshot(growing) == {name: data for name, data in before.items() if name != "manifest.json"}


def test_a_ledger_of_a_later_version_is_refused(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    run = growing.run()
    run.commit(pending(run)[0])
    with monkeypatch.context() as patch:
        patch.setattr(totals_module, "LEDGER_VERSION", totals_module.LEDGER_VERSION + 1)
        run.finish()
    with pytest.raises(
        StoreError, match=r"ledger/000000\.parquet was written by another version of Sightline: install"
    ):
        Ledger.read(growing.output)


@pytest.mark.parametrize("number", [0, 2])
def test_a_ledger_that_is_gone_is_an_error(growing: GrowingOutput, number: int) -> None:
    run = growing.run()
    for ref in pending(run):
        run.commit(ref)
        run.state.ledger.seal()
    run.finish()
    (growing.root / ledger_path(number)).unlink()
    with pytest.raises(StoreError, match=rf"ledger/00000{number}\.parquet is missing"):
        Ledger.read(growing.output)
    with pytest.raises(ConfigError, match=r"manifest\.json names 6 ledgers, and there are 5"):
        open_output(str(growing.root))


def test_a_run_killed_between_its_commits_and_its_ledger(growing: GrowingOutput) -> None:
    run = growing.run()
    for ref in pending(run)[:4]:
        run.commit(ref, [1], add=False)
    assert [about.segments for about in read_markers(growing.output)] == [(0,)]
    run = growing.run()
    assert check_totals(growing).totals.shards == 4
    assert len(pending(run)) == 2
    for ref in pending(run):
        run.commit(ref)
    manifest = run.finish()
    assert (manifest["shards"], manifest["rows_in"], manifest["rows_rejected"]) == (6, 18, 4)
    growing.check()
    # The marker of the killed run stays for two days: it might go on.
    [about] = read_markers(growing.output)
    assert not run.state.is_current(manifest)
    assert not read_state(growing.output, read_plan(growing.output)).is_current(manifest)
    growing.output.store.put(
        growing.output.uri_of(marker_path(about.id)),
        json.dumps({"segments": [0], "updated_at": "2020-01-01T00:00:00+00:00"}).encode(),
    )
    growing.run().finish()
    assert list(read_markers(growing.output)) == []
    state = read_state(growing.output, read_plan(growing.output))
    assert state.is_current(growing.output.read_json("manifest.json"))


def test_a_retry_killed_between_its_commits_and_its_ledger(growing: GrowingOutput) -> None:
    """All shards of the segment are sealed, so that only the marker tells of the commits."""
    run = growing.run()
    for ref in pending(run):
        run.commit(ref, [0, 1])
    run.finish()
    run = growing.run()
    for ref in run.retries()[:3]:
        run.retry(ref, add=False)
    run = growing.run()
    assert check_totals(growing).totals.rows_rejected == 6
    assert [ref.generation for ref in run.retries()] == [1, 1, 1]
    run.finish()
    growing.check()


def test_a_retry_without_its_marker_is_found_by_the_next_retry(growing: GrowingOutput) -> None:
    run = growing.run()
    for ref in pending(run):
        run.commit(ref, [0, 1])
    run.finish()
    run = growing.run()
    for ref in run.retries():
        run.retry(ref, [1], add=False)
    for about in read_markers(growing.output):
        growing.output.store.delete(growing.output.uri_of(marker_path(about.id)))
    run = growing.run()
    assert check_totals(growing).totals.rows_rejected == 12
    for ref in run.retries():
        assert run.retry(ref)["rows_rejected"] == 1
    assert run.finish()["rows_rejected"] == 6
    growing.check()


def test_leftovers_are_deleted_of_sealed_shards_of_touched_segments_only(growing: GrowingOutput) -> None:
    other = growing.plan(2)
    run = growing.run()
    refs = pending(run)
    for ref in refs[:4]:
        run.commit(ref)
    run.finish()
    left = {
        "data/000000-000000-0123456789ab.parquet": True,
        "rejects/000000-000001-0123456789ab.parquet": True,
        f"data/.000000-000002-0123456789ab.parquet.{'0' * 32}.tmp": True,
        f"parts/000000-000003/{'0' * 32}.arrow": True,
        "data/000000-000000.1-0123456789ab.parquet": False,  # of a retry, perhaps in progress
        "data/000000-000005-0123456789ab.parquet": False,  # of a shard that another run may commit
        f"data/.000000-000005-0123456789ab.parquet.{'0' * 32}.tmp": False,
        f"parts/000000-000004/{'0' * 32}.arrow": True,  # no run is at work that might need it
        f"data/{other:06d}-000000-0123456789ab.parquet": False,
        "data/mine.parquet": False,
    }
    for path in left:
        growing.output.store.put(growing.output.uri_of(path), b"x")
    state = read_state(growing.output, read_plan(growing.output))
    state.announce({0})
    state.finish(run.fingerprint, {}, [])
    assert {path: not growing.output.exists(path) for path in left} == left
    assert len(growing.data_files()) == 4 + 5


def test_another_run_that_is_in_progress_loses_nothing(growing: GrowingOutput) -> None:
    other = growing.run()
    refs = pending(other)
    parts = [other.writer.write_part(ref.name, other._make_rows(ref, [0, 1, 2], [])) for ref in refs[3:]]
    run = growing.run()
    for ref in refs[:3]:
        run.commit(ref)
    manifest = run.finish()
    assert (manifest["planned_shards"], manifest["shards"]) == (6, 3)
    assert all(Path(part).exists() for part in parts)
    [about] = read_markers(growing.output)
    assert about.id == other.state.run
    for ref in refs[3:]:
        other.commit(ref)
    assert other.finish()["shards"] == 6
    assert check_totals(growing).totals.shards == 6
    assert list(read_markers(growing.output)) == []


def test_a_run_that_ends_last_says_what_others_have_planned_and_sealed(
    growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers take the manifest for the state of the output."""
    run = growing.run()
    for ref in pending(run):
        run.commit(ref)
    growing.grow(2)
    manifest = run.finish()
    assert (manifest["planned_shards"], manifest["shards"]) == (8, 8)
    # The other one seals when this run has counted, and has ended when this one writes its manifest.
    run, make = growing.run(), state_module.OutputState._make_manifest
    calls: list[int] = []

    def grow_first(state: Any, *arguments: Any) -> dict[str, Any]:
        made = make(state, *arguments)
        if not calls:
            calls.append(1)
            growing.grow(1)
        return made

    monkeypatch.setattr(state_module.OutputState, "_make_manifest", grow_first)
    run.finish()
    manifest = open_output(str(growing.root)).manifest
    assert (manifest["planned_shards"], manifest["shards"]) == (9, 9)


def test_finish_twice_is_finish_once(growing: GrowingOutput) -> None:
    run = growing.run()
    for ref in pending(run):
        run.commit(ref, [1])
    first = run.finish()
    before = snapshot(growing)
    assert run.finish() == first
    assert snapshot(growing) == before
    assert first["runs"] == [{"started_at": run.state.run, "rows": 1}]
    assert growing.run().finish()["runs"][1:] == first["runs"]


def test_many_shards_are_sealed_before_the_end(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "SEAL_SHARDS", 4)
    run = growing.run()
    for ref in pending(run):
        run.commit(ref)
    assert (run.state.ledger.count, run.state.ledger.waiting) == (1, 2)
    assert check_totals(growing).totals.shards == 4
    assert run.finish()["ledgers"] == 2


def test_a_run_ends_while_another_one_begins(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its marker is listed, and is gone when it is read. Temporary files and damaged markers say nothing."""
    run = growing.run()
    runs = growing.root / "runs"
    (runs / f".{run.state.run}.json.{'0' * 32}.tmp").write_bytes(b'{"segments')
    names = type(growing.output.store).names

    def list_more(store: Any, folder: str, start: str = "") -> Any:
        yield from names(store, folder, start)
        if folder.endswith("runs"):
            yield "gone.json"

    monkeypatch.setattr(type(growing.output.store), "names", list_more)
    assert [about.segments for about in read_markers(growing.output)] == [(0,)]
    for text in ("", "[]", "{}", '{"segments": [0]}', '{"segments": ["x"], "updated_at": "2026-01-01"}'):
        (runs / "damaged.json").write_text(text)
        assert sorted(about.segments for about in read_markers(growing.output)) == [(), (0,)]
    (runs / "damaged.json").write_text('{"segments": [0], "updated_at": "2026-01-01"}')
    growing.run().finish()
    assert not (runs / "damaged.json").exists()


JUMPS = [timedelta(days=-400), timedelta(days=400), timedelta(hours=-1)]


@pytest.mark.parametrize("jump", JUMPS, ids=str)
def test_a_clock_that_jumps_changes_nothing_but_times(
    growing: GrowingOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: timedelta
) -> None:
    now = timedelta(0)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + now

    monkeypatch.setattr(state_module, "datetime", Clock)
    monkeypatch.setattr(totals_module, "datetime", Clock)
    killed = growing.run()
    killed.commit(pending(killed)[0], [1], add=False)
    now = jump
    run = growing.run()
    for ref in pending(run):
        run.commit(ref, [1])
    manifest = run.finish()
    assert (manifest["shards"], manifest["rows_in"], manifest["rows_rejected"]) == (6, 18, 6)
    now = timedelta(0)
    retry = growing.run()
    for ref in retry.retries()[:3]:
        retry.retry(ref, add=False)
    now = jump
    growing.run().finish()  # the marker is perhaps taken for a dead run's
    now = timedelta(0)
    assert growing.retry()["rows_rejected"] == 0
    check_totals(growing)
    growing.check()


def test_verify_since_reads_what_any_clock_says_is_since_then(growing: GrowingOutput) -> None:
    run = growing.run()
    for ref, day in zip(pending(run)[:3], (5, 1, 6), strict=True):
        run.commit(ref)
        run.state.ledger.seal()
        path = growing.root / ledger_path(run.state.ledger.count - 1)
        time = {"sealed_at": f"2026-03-0{day}T12:00:00+00:00"}
        path.write_bytes(rewrite(path.read_bytes(), partial(dict.update, **time)))
    for since, rows in ((1, 9), (4, 9), (5, 9), (6, 3), (7, 0)):
        assert verify_output(growing.output, since=date(2026, 3, since)).rows_in == rows


def finished(growing: GrowingOutput) -> tuple[dict[str, Any], set[str]]:
    """What a finished output is, without times and ids of runs."""
    manifest = growing.output.read_json("manifest.json")
    for name in ("runs", "run", "ledgers"):
        manifest.pop(name)
    files = {name.rpartition("-")[0] if name[:4] in ("data", "reje") else name for name in snapshot(growing)}
    return manifest, {name for name in files if not name.startswith(("runs/", "ledger/", ".")) and "/." not in name}


@pytest.mark.parametrize("again", ["the same run", "another run"])
def test_a_finish_that_is_killed_anywhere_is_done_again(tmp_path: Path, again: str) -> None:
    def work(made: GrowingOutput) -> Run:
        made.grow(3, rejected=[0, 1])
        run = made.run()
        for ref in run.retries():
            run.retry(ref, [1])
        made.plan(2)
        run = made.run()
        for ref in run.retries():
            run.retry(ref)
        for ref in pending(run):
            run.commit(ref, [2])
        for path in ("data/000000-000000-0123456789ab.parquet", "rejects/000001-000001-0123456789ab.parquet"):
            made.output.store.put(made.output.uri_of(path), b"left over")
        return run

    plain = GrowingOutput(tmp_path / "plain")
    work(plain).finish()
    expected = finished(plain)
    template = GrowingOutput(tmp_path / "template")
    run = work(template)
    kills = 0

    def finish(left: int) -> None:
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        shutil.copytree(template.root, tmp_path / "made")
        output = Output(str(tmp_path / "made"))
        state = read_state_without_sealing(output)
        state.run = run.state.run
        state.announce({0, 1})
        for record in records:
            state.add(record)
        state.finish(run.fingerprint, {"rows": 1}, [])

    records = [template.output.read_commit(ref, 2) for ref in run.state.ledger._waiting if ref.startswith("000000")]
    records += [template.output.read_commit(ref, 0) for ref in run.state.ledger._waiting if ref.startswith("000001")]
    made = GrowingOutput(tmp_path / "made")
    for _ in kill_everywhere(finish):
        kills += 1
        state = read_state(made.output, read_plan(made.output))
        if again == "the same run":
            state.run = run.state.run
        state.finish(run.fingerprint, {"rows": 1}, [])
        assert finished(made) == expected
        made.check()
        assert read_rows_by_id(open_output(str(made.root))) == read_rows_by_id(open_output(str(plain.root)))
    assert kills > 7
    assert finished(made) == expected
    made.check()


def read_state_without_sealing(output: Output) -> state_module.OutputState:
    return state_module.OutputState(output, read_plan(output), Ledger.read(output))


def test_totals_are_added_and_subtracted() -> None:
    record = {
        "generation": 2,
        "rows_in": 5,
        "rows_tagged": 3,
        "rows_rejected": 2,
        "reasons": {"corrupt": 2},
        "labels": {"a": 3},
        "skipped": {".md files": 1},
    }
    totals = Totals()
    totals.add(record)
    totals.add({**record, "generation": 0})
    totals.add(record, -1)
    assert totals.as_dict() == {
        "shards": 1,
        "generations": 0,
        "rows_in": 5,
        "rows_tagged": 3,
        "rows_rejected": 2,
        "reasons": {"corrupt": 2},
        "labels": {"a": 3},
        "skipped": {".md files": 1},
    }
    totals.merge({"shards": -1, "reasons": {"corrupt": -2, "empty": 1}})
    assert (totals.shards, totals.as_dict()["reasons"]) == (0, {"empty": 1})


def test_entries_of_the_ledgers_are_in_order(growing: GrowingOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing of a store has no order."""
    run = growing.run()
    for ref in pending(run):
        run.commit(ref)
        run.state.ledger.seal()
    store = type(growing.output.store)
    list_all = store.list

    def reverse(self: Any, *arguments: Any) -> Any:
        return iter([*list_all(self, *arguments)][::-1])

    monkeypatch.setattr(store, "list", reverse)
    assert isinstance(next(iter(growing.output.store.list(str(growing.root)))), Entry)
    check_totals(growing)
