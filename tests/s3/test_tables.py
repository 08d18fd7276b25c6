"""Delta tables in a bucket: every row once, without a lock, and as readers with S3 of their own read them."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl
import pytest
from deltalake import DeltaTable

from pipelines.tables.publication import Publication, publish_output
from tests.support.growing_output import GrowingOutput
from tests.support.stores.fault_proxy import DONE_BUT_FAILS, FORBIDDEN, fault_proxy
from tests.support.stores.radosgw import Radosgw
from tests.support.table_writer import Table, finish, kill_writers

pytestmark = pytest.mark.s3


def test_killed_writers_leave_each_row_once_or_not_yet(s3_env: Radosgw, tmp_path: Path) -> None:
    """`benchmarks.killed_tables --store s3` kills a hundred times."""
    uri = f"s3://{s3_env.new_bucket()}/some folder/out"
    seed = int.from_bytes(os.urandom(2))
    table = kill_writers(uri, tmp_path, s3_env.env, kills=4, seed=seed, longest=3.0, every=2)
    assert table.problems == []
    assert table.kills >= 4


def test_readers_read_a_table_in_a_bucket(s3_env: Radosgw) -> None:
    """delta-io/delta-rs#2266, #1156: no table was found under a name with a space."""
    uri = f"s3://{s3_env.new_bucket()}/some folder/a#b"
    growing = GrowingOutput(uri)
    growing.grow(2, 3, rejected=[0], publish=Publication("delta"))
    assert publish_output(growing.output).lines == []
    finish(table := Table(uri))
    assert table.problems == []
    options = {"aws_endpoint": s3_env.endpoint, "allow_http": "true", "aws_virtual_hosted_style_request": "false"}
    named = uri.replace(" ", "%20").replace("#", "%23")
    rows = DeltaTable(f"{named}/data", storage_options=options).to_pyarrow_table(columns=["key"])
    assert rows.num_rows == 4
    found = pl.scan_delta(f"{named}/rejects", storage_options=options, use_pyarrow=True).select("key").collect()
    assert len(found) == 2


def test_a_commit_whose_response_is_lost_counts_once(s3_env: Radosgw, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library tries again, and finds a commit of this application there: it is its own."""
    uri = f"s3://{s3_env.new_bucket()}/out"
    with fault_proxy(s3_env.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        growing = GrowingOutput(uri)
        lost = [
            proxy.add(DONE_BUT_FAILS, rf"{kind}/_delta_log/0+{version}\.json", method="PUT", conditional=True)
            for kind in ("data", "rejects")
            for version in (0, 1, 2)
        ]
        for _ in range(2):
            publication = Publication("delta")
            growing.grow(1, 3, rejected=[0], publish=publication)
            assert publication.failure == ""
        assert [rule.done for rule in lost] == [1] * 6
        finish(table := Table(uri))
        assert table.problems == []


def test_a_log_that_cannot_be_written_does_not_fail_what_is_committed(
    s3_env: Radosgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{s3_env.new_bucket()}/out"
    with fault_proxy(s3_env.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        growing = GrowingOutput(uri)
        growing.grow(1, 3, rejected=[0], publish=Publication("delta"))
        proxy.add(FORBIDDEN, "_delta_log", method="PUT", times=None)
        publication = Publication()
        manifest = growing.retry(publish=publication)
        assert publication.failure.startswith("the table was not brought up to the output: the Delta table s3://")
        assert (manifest["rows_tagged"], manifest["rows_rejected"]) == (3, 0)
        table = Table(uri)
        assert len(table.read_keys("rejects")) == 1, "the file of the rejected row is still there"
        proxy.clear()
        finish(table)
        assert table.problems == []
