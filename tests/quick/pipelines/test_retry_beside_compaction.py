"""A retry of rejected rows whose files a compaction merges while the retry is under way."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.upkeep import compaction
from pipelines.upkeep.compaction import compact_output
from pipelines.upkeep.retry import find_retry
from storage.store import NotFound
from tests.support.growing_output import GrowingOutput
from tests.support.jobs import RecordedProgress


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GrowingOutput:
    """An output with nine shards of three images, of which one is rejected."""
    monkeypatch.setattr(compaction, "LEAST_FILES", 3)
    made = GrowingOutput(tmp_path / "output")
    made.grow(9, rejected=[1])
    return made


@pytest.mark.parametrize("when", ["before it reads", "before it commits"])
def test_a_retry_finds_the_merged_files(growing: GrowingOutput, when: str) -> None:
    run = growing.run()
    refs = run.retries()
    assert len(refs) == 9
    if when == "before it commits":
        found = [find_retry(growing.output, ref, ["corrupt"]) for ref in refs]
    compact_output(growing.output, RecordedProgress())
    assert len(growing.data_files("rejects")) == 1
    if when == "before it reads":
        found = [find_retry(growing.output, ref, ["corrupt"]) for ref in refs]
    assert [retry.wanted.tolist() for retry in found] == [[False, True, False]] * 9
    for number, ref in enumerate(refs):
        run._commit(ref, [1], [1] if number == 4 else [], ref.rows if ref.rows > 1 else 3, True)
    manifest = run.finish()
    assert (manifest["rows_tagged"], manifest["rows_rejected"]) == (26, 1)
    assert len(set(growing.stored_keys())) == len(growing.stored_keys()) == 26
    growing.check()


def test_a_retry_that_another_run_was_faster_with_is_not_read_anew(growing: GrowingOutput) -> None:
    refs = growing.run().retries()
    growing.retry()
    compact_output(growing.output, RecordedProgress())
    with pytest.raises(NotFound):
        find_retry(growing.output, refs[0], ["corrupt"])


def test_a_file_that_is_gone_is_an_error(growing: GrowingOutput) -> None:
    refs = growing.run().retries()
    for path in (growing.root / "rejects").glob("*"):
        path.unlink()
    with pytest.raises(NotFound):
        find_retry(growing.output, refs[0], ["corrupt"])
