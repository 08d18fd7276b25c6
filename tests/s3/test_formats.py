"""Planning and reading on S3, as `tests/quick/pipelines/test_formats.py` tests them on a local disk."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import JobConfig, ParquetConfig
from pipelines.inputs.images import fetch_images
from pipelines.inputs.rows import Input, Reading, Skipped
from storage.schemes import open_store
from storage.store import StoreOptions
from tests.quick.pipelines.test_formats import BOUNDARY, JPEG, WHOLE
from tests.support.input_folder import extend_plan, outcomes, read_all
from tests.support.stores.delay_proxy import delay_proxy
from tests.support.stores.radosgw import Radosgw


@pytest.mark.s3
def test_reading_on_s3_equals_reading_on_a_disk(s3_env: Radosgw, tmp_path: Path) -> None:
    bucket = f"s3://{s3_env.new_bucket()}"
    options = StoreOptions(s3_env.endpoint, "us-east-1")
    store = open_store(bucket, options)
    store.put(f"{bucket}/in/tars/cut.tar", WHOLE[: BOUNDARY + 2000])
    store.put(f"{bucket}/in/a #1%20 ü.jpg", JPEG)
    store.put(f"{bucket}/in/empty.png", b"")
    store.put(f"{bucket}/inside.jpg", JPEG)
    pq.write_table(pa.table({"uri": [f"{bucket}/in/a #1%20 ü.jpg", "tars/no.jpg"]}), tmp_path / "links.parquet")
    store.put(f"{bucket}/in/links.parquet", (tmp_path / "links.parquet").read_bytes())
    config = JobConfig(input=f"{bucket}/in", output=f"{bucket}/out", labels=["a"])
    report, _ = extend_plan(config, options)
    assert report.inputs == 4
    rows = read_all(config, options, Skipped())
    assert sorted(outcomes(rows), key=str) == [
        ("0", None),
        ("0000", None),
        ("0001", None),
        ("0002", None),
        ("1", "missing"),
        ("a #1%20 ü.jpg", None),
        ("empty.png", None),
        ("tars/cut.tar", "truncated_archive"),
    ]
    assert extend_plan(config, options)[0].inputs == 0


@pytest.mark.s3
def test_many_reads_hide_latency_within_the_memory_limit(s3_env: Radosgw) -> None:
    bucket = f"s3://{s3_env.new_bucket()}"
    store = open_store(bucket, StoreOptions(s3_env.endpoint, "us-east-1"))
    entries = [store.put(f"{bucket}/small/{number}.jpg", JPEG) for number in range(100)]
    large = [store.put(f"{bucket}/large/{number}.jpg", bytes(12 * 2**20)) for number in range(8)]
    for planned, wanted in (
        ([Input("image", e.uri, e.uri, e.size, e.etag) for e in entries], range(20, 33)),
        ([Input("uri", e.uri, e.uri, -1, "") for e in entries], range(20, 33)),
        ([Input("image", e.uri, e.uri, e.size, e.etag) for e in large], range(2, 6)),
    ):
        with delay_proxy(s3_env.endpoint, 0.1) as proxy:
            reading = Reading(StoreOptions(proxy.endpoint, "us-east-1"), 2**26, ParquetConfig())
            rows = list(fetch_images(planned, reading))
            assert [row.key for row in rows] == [item.key for item in planned]
            assert all(row.data for row in rows)
            assert proxy.at_once in wanted
