"""Planning and reading on S3: what `tests/quick/test_formats.py` shows of a local disk."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import JobConfig
from pipelines.rows import Skipped
from storage.store import StoreOptions, open_store
from tests.quick.test_formats import BOUNDARY, JPEG, WHOLE, extend_plan, outcomes, read_all
from tests.radosgw import Radosgw


@pytest.mark.s3
def test_the_same_on_s3(s3_env: Radosgw, tmp_path: Path) -> None:
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
