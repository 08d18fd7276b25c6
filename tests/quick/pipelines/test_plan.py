"""The plan: shards, row groups and segments, which are published while the listing goes on, by several runs."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.config import JobConfig
from pipelines.inputs.columns import PassedColumns
from pipelines.inputs.rows import Input
from pipelines.output.output import Output
from pipelines.planning import packing
from pipelines.planning.listing import InputLister, PlanReport
from pipelines.planning.packing import SegmentWriter
from pipelines.planning.plan import (
    append_inputs,
    count_shards,
    list_shards,
    read_plan,
    read_shard_inputs,
)
from storage.settings import ConfigError
from tests.support.input_folder import Folder
from tests.support.jobs import make_parquet

IMAGES = 40


def image(number: int, rows: int = 1, metadata: str | None = None) -> Input:
    return Input("image", f"/in/{number:06d}.jpg", f"{number:06d}.jpg", 9, "e", rows=rows, metadata=metadata)


def test_a_plan_without_its_inputs_gets_no_more(tmp_path: Path) -> None:
    """Everything that is planned would be new."""
    folder = Folder(tmp_path)
    folder.write("a.jpg", b"x")
    folder.plan()
    output = Output(str(folder.output))
    plan = read_plan(output, inputs=False)
    assert (plan.shards, bool(plan.known)) == (1, False)
    with pytest.raises(ValueError, match="without its inputs"):
        append_inputs(folder.config(), output, plan, PassedColumns({}), lambda: None)


def planned_inputs(output: Output) -> list[Input]:
    return [one for ref in list_shards(output) for one in read_shard_inputs(output, ref)]


def write_shards(root: Path, shards: list[list[Input]]) -> tuple[Output, bytes]:
    output, segment = Output(str(root)), SegmentWriter(0)
    for inputs in shards:
        segment.add(inputs)
    data = segment.close()
    output.store.put(output.uri_of("plan/000000.parquet"), data)
    return output, data


@pytest.mark.parametrize("group", [1, 3, 4, 5, 1000])
@pytest.mark.parametrize(
    "sizes",
    [[1], [4], [5], [4, 4, 4], [3, 1, 4], [1] * 13, [50, 1, 1], [1, 1, 50], [1, 50, 1, 50], [2, 3, 5, 7, 1, 1, 9]],
)
def test_each_shard_has_exactly_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], group: int
) -> None:
    monkeypatch.setattr(packing, "GROUP_INPUTS", group)
    shards, first = [], 0
    for size in sizes:
        shards.append([image(number, rows=number % 3 + 1) for number in range(first, first + size)])
        first += size
    output, data = write_shards(tmp_path, shards)
    refs = list(list_shards(output))
    assert [ref.shard for ref in refs] == [f"000000-{number:06d}" for number in range(len(sizes))]
    assert [list(read_shard_inputs(output, ref)) for ref in refs] == shards
    assert [ref.rows for ref in refs] == [sum(one.rows for one in shard) for shard in shards]
    # Groups end where a shard ends, and only the last one may be smaller.
    with pq.ParquetFile(io.BytesIO(data)) as file:
        groups = [file.read_row_group(number)["shard"].to_pylist() for number in range(file.num_row_groups)]
    assert all(len(one) >= group for one in groups[:-1])
    assert sum(len(set(one)) for one in groups) == len(sizes)
    assert read_plan(output).shards == len(sizes)


def test_one_large_shard_and_many_small_ones_of_the_real_size(tmp_path: Path) -> None:
    sizes = [1] * 5000 + [20_000] + [2] * 3000
    shards, first = [], 0
    for size in sizes:
        shards.append([image(number) for number in range(first, first + size)])
        first += size
    output, data = write_shards(tmp_path, shards)
    with pq.ParquetFile(io.BytesIO(data)) as file:
        assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [
            4096,
            904 + 20_000,
            4096,
            1904,
        ]
    refs = list(list_shards(output))
    for number in (0, 4095, 4096, 4999, 5000, 5001, 7048, 7049, 8000):
        assert list(read_shard_inputs(output, refs[number])) == shards[number]


def test_a_shard_with_long_metadata_ends_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SHARD_METADATA", 100)
    shards = [[image(number, metadata="x" * 60)] for number in range(5)]
    output, data = write_shards(tmp_path, shards)
    with pq.ParquetFile(io.BytesIO(data)) as file:
        assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [2, 2, 1]
    assert [list(read_shard_inputs(output, ref)) for ref in list_shards(output)] == shards


def test_a_plan_file_that_is_gone(tmp_path: Path) -> None:
    output, _ = write_shards(tmp_path, [[image(1)]])
    [ref] = list_shards(output)
    output.delete("plan/000000.parquet")
    with pytest.raises(ConfigError, match=r"plan/000000\.parquet is gone"):
        list(read_shard_inputs(output, ref))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """Forty images, of which three are a shard, and three shards a segment."""
    monkeypatch.setattr(packing, "SEGMENT_SHARDS", 3)
    made = Folder(tmp_path)
    made.keys = {"rows_per_shard": 3}
    for number in range(IMAGES):
        made.write(f"{number:02d}.jpg", b"x")
    return made


def names(folder: Folder) -> Counter[str]:
    return Counter(planned.key for planned in planned_inputs(Output(str(folder.output))))


ALL = Counter(f"{number:02d}.jpg" for number in range(IMAGES))


def test_segments_are_full_and_all_inputs_are_planned_once(folder: Folder) -> None:
    report = folder.plan()
    assert (report.inputs, report.shards, report.rows) == (40, 14, 40)
    assert [len(segment) for segment in read_plan(Output(str(folder.output))).segments] == [3, 3, 3, 3, 2]
    assert names(folder) == ALL
    again = folder.plan()
    assert (again.inputs, again.shards, again.known) == (0, 0, 40)


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the listing fail after some inputs."""
    list_new = InputLister.list_new

    def fail(lister: InputLister) -> Iterator[Input]:
        for number, planned in enumerate(list_new(lister)):
            if number == count:
                raise KeyboardInterrupt
            yield planned

    monkeypatch.setattr(InputLister, "list_new", fail)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 18, 19, 20, 39])
def test_a_listing_that_fails_leaves_whole_segments(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with monkeypatch.context() as patch:
        stop_after(count, patch)
        with pytest.raises(KeyboardInterrupt):
            folder.plan()
    plan = read_plan(Output(str(folder.output)))
    assert [len(segment) for segment in plan.segments] == [3] * (max(0, count - 1) // 9)
    assert list((tmp_path / "temporary").iterdir()) == []
    report = folder.plan()
    assert report.known == 9 * len(plan.segments)
    assert names(folder) == ALL
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_planning_that_is_killed_leaves_whole_segments(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    code = """
import os, signal, sys
from pathlib import Path
from pipelines.planning import packing, plan
from pipelines.planning.listing import InputLister
from tests.support.input_folder import Folder
packing.SEGMENT_SHARDS = 3
list_new = InputLister.list_new
def fail(lister):
    for number, planned in enumerate(list_new(lister)):
        if number == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        yield planned
InputLister.list_new = fail
Folder.__init__ = lambda self, root: None
folder = Folder(None)
folder.input, folder.output, folder.keys = Path(sys.argv[1]), Path(sys.argv[2]), {"rows_per_shard": 3}
folder.plan()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder.input), str(folder.output)],
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(read_plan(Output(str(folder.output))).segments) == 2
    assert list((tmp_path / "temporary").iterdir()) == []
    assert folder.plan().known == 18
    assert names(folder) == ALL


def test_the_parts_of_one_input_are_in_one_segment(folder: Folder) -> None:
    """A run that is killed between two segments would lose the later parts."""
    rows = {"image": [b"x"] * 60}
    folder.write("x.parquet", make_parquet(rows, row_group_size=2))
    folder.write("y.parquet", make_parquet(rows, row_group_size=2))
    folder.plan()
    output = Output(str(folder.output))
    segments: dict[str, set[str]] = {}
    for ref in list_shards(output):
        for planned in read_shard_inputs(output, ref):
            segments.setdefault(planned.uri, set()).add(ref.segment)
    assert {len(found) for found in segments.values()} == {1}
    ranges = sorted((one.uri, one.start, one.stop) for one in planned_inputs(output) if one.kind == "parquet")
    for one, other in pairwise(ranges):
        assert one[0] != other[0] or one[2] == other[1]


def test_rows_of_a_list_may_be_in_several_segments(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted: the next planning goes on behind those that are planned."""
    path = folder.write("list.txt", b"00.jpg\n" * 50)
    keys: dict[str, Any] = {"input": str(path)}
    with monkeypatch.context() as patch:
        stop_after(30, patch)
        with pytest.raises(KeyboardInterrupt):
            folder.plan(**keys)
    assert len(planned_inputs(Output(str(folder.output)))) == 27
    report = folder.plan(**keys)
    assert (report.known, report.inputs) == (27, 23)
    assert len(planned_inputs(Output(str(folder.output)))) == 50


@pytest.mark.parametrize("fixed", [False, True])
def test_types_of_passed_columns_are_known_before_anything_is_published(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fixed: bool
) -> None:
    """Unless an earlier run has fixed them. The types are part of the claim."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder.write("a.parquet", make_parquet({"image": [b"x"], "n": [1]}))
    folder.write("z.parquet", make_parquet({"image": [b"x"], "n": [2]}))
    config = folder.config(parquet={"columns": {"n": "n"}})
    output = Output(config.output)
    types = PassedColumns({"n": "n"})
    if fixed:
        append_inputs(config, Output(str(tmp_path / "earlier")), read_plan(output), types, lambda: None)
    columns = PassedColumns({"n": "n"}, types.schema() if fixed else None)
    claims: list[int] = []
    with monkeypatch.context() as patch:
        stop_after(30, patch)
        with pytest.raises(KeyboardInterrupt):
            append_inputs(config, output, read_plan(output), columns, lambda: claims.append(len(output.segments())))
    assert len(output.segments()) == (3 if fixed else 0)
    assert claims == ([0, 1, 2] if fixed else [])
    assert list((tmp_path / "temporary").iterdir()) == []
    assert append_inputs(config, output, read_plan(output), columns, lambda: claims.append(len(output.segments())))
    assert claims[0] == 0
    assert names(folder) == ALL + Counter(["a.parquet", "z.parquet"])
    assert list((tmp_path / "temporary").iterdir()) == []


def test_without_a_claim_nothing_is_written(folder: Folder) -> None:
    for columns in (PassedColumns({}), PassedColumns({"n": "n"})):
        plan = read_plan(Output(str(folder.output)))
        report = append_inputs(folder.config(), plan.output, plan, columns, None)
        assert report is not None
        assert (report.inputs, report.shards, report.rows) == (40, 14, 40)
        assert not folder.output.exists()
        assert plan.segments == []


def test_the_claim_comes_before_the_plan(folder: Folder) -> None:
    def refuse() -> None:
        raise ConfigError("another configuration's")

    with pytest.raises(ConfigError):
        append_inputs(
            folder.config(),
            Output(str(folder.output)),
            read_plan(Output(str(folder.output))),
            PassedColumns({}),
            refuse,
        )
    assert not folder.output.exists()


@pytest.mark.parametrize("different", [False, True])
def test_plannings_at_once_plan_each_input_once(folder: Folder, different: bool) -> None:
    """Also if they see different files: one has begun before some of them were there."""
    errors: list[BaseException] = []
    start = threading.Barrier(3)

    def plan(number: int) -> None:
        config = folder.config(on_missing="wait")
        if different:
            some = [str(folder.input / f"{n:02d}.jpg") for n in range(IMAGES) if n % 3 != number]
            config = folder.config(input=some)
        start.wait()
        try:
            for _ in range(100):
                output = Output(config.output)
                if append_inputs(config, output, read_plan(output), PassedColumns({}), lambda: None) is not None:
                    return
            raise AssertionError("100 attempts")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=plan, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = planned_inputs(Output(str(folder.output)))
    assert Counter(one.uri for one in found) == Counter(str(folder.input / name) for name in ALL)


def test_another_run_that_plans_in_between(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the next number. What was appended before stays, and the caller compares again."""
    list_new = InputLister.list_new

    def plan_other(lister: InputLister) -> Iterator[Input]:
        for number, planned in enumerate(list_new(lister)):
            if number == 15:
                with monkeypatch.context() as patch:
                    patch.setattr(InputLister, "list_new", list_new)
                    folder.write("00 new.jpg", b"x")
                    folder.plan()
            yield planned

    output = Output(str(folder.output))
    with monkeypatch.context() as patch:
        patch.setattr(InputLister, "list_new", plan_other)
        assert append_inputs(folder.config(), output, read_plan(output), PassedColumns({}), lambda: None) is None
    report = folder.plan()
    assert report.inputs == 0
    assert names(folder) == ALL + Counter(["00 new.jpg"])


def test_shards_of_other_runs_are_counted(folder: Folder) -> None:
    output = Output(str(folder.output))
    empty = read_plan(output)
    assert count_shards(output, empty) == 0
    folder.plan()
    plan = read_plan(output)
    assert count_shards(output, empty) == count_shards(output, plan) == plan.shards == 14


def test_an_output_without_inputs_is_not_planned(folder: Folder) -> None:
    (folder.input / "empty").mkdir()
    (folder.input / "empty/a.txt").write_bytes(b"x")
    config: JobConfig = folder.config(input=str(folder.input / "empty"))
    output = Output(config.output)
    with pytest.raises(ConfigError, match="no image, tar or Parquet file"):
        append_inputs(config, output, read_plan(output), PassedColumns({}), lambda: None)
    assert not folder.output.exists()
    assert isinstance(append_inputs(folder.config(), output, read_plan(output), PassedColumns({}), None), PlanReport)
