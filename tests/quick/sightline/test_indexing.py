"""The index after a run: made when something was committed, made up for when it failed, and never of half an output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from curation.index.state import lock_index
from curation.tagged_output import open_output
from pipelines.config import JobConfig
from sightline.indexing import check_index, index_output
from storage.settings import ConfigError
from storage.store import StoreError
from tests.support.growing_output import GrowingOutput


def make_job(growing: GrowingOutput, *, index: bool = True) -> JobConfig:
    keys = {"input": ["photos"], "output": str(growing.root), "labels": ["cat"], "index": index}
    return JobConfig.model_validate(keys)


def test_the_index_follows_the_runs_and_a_failed_build_is_made_up_for(tmp_path: Path) -> None:
    growing = GrowingOutput(tmp_path / "tags")
    manifest = growing.grow(2, 10)
    job = make_job(growing)
    assert index_output(make_job(growing, index=False), manifest, 2) is None
    assert not (growing.root / "index").exists()
    built = index_output(job, manifest, 2)
    assert built is not None
    assert (built.rows, built.added) == (20, 20)
    assert index_output(job, manifest, 0) is None
    manifest = growing.grow(1, 5)
    with (
        lock_index(open_output(str(growing.root))),
        pytest.raises(StoreError, match=r"another `sightline index`.*all images are committed: run `sightline index"),
    ):
        index_output(job, manifest, 1)
    later = index_output(job, manifest, 0)
    assert later is not None
    assert (later.rows, later.added) == (25, 5)


def test_an_output_that_is_not_finished_is_not_indexed_and_that_is_said(tmp_path: Path) -> None:
    growing = GrowingOutput(tmp_path / "tags")
    growing.grow(1, 5)
    growing.plan(1, 5)
    manifest = growing.run().finish()
    assert manifest["planned_shards"] == 2
    said: list[str] = []
    assert index_output(make_job(growing), manifest, 1, said.append) is None
    assert said == ["the index is brought up to the output when all of its shards are committed"]
    assert index_output(make_job(growing), json.loads("{}"), 0, said.append) is None
    assert len(said) == 1


def test_without_lancedb_a_run_that_is_to_index_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growing = GrowingOutput(tmp_path / "tags")
    monkeypatch.setitem(sys.modules, "lancedb", None)
    check_index(make_job(growing, index=False))
    with pytest.raises(ConfigError, match=r"^index: .*pip install 'sightline\[lancedb\]'"):
        check_index(make_job(growing))
