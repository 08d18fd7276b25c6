"""The S3 server of the tests keeps the promises that the job's commits stand on."""

from __future__ import annotations

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from pipelines.store import Changed, StoreOptions, join, open_store
from tests.radosgw import Radosgw

pytestmark = pytest.mark.s3
NAMES = ["a b.jpg", "hash#1.jpg", "100%.jpg", "%20.jpg", "ü – 東京/猫.jpg", "a+b=c&d?e.jpg"]


def test_put_if_absent_gives_412_the_second_time(s3_env: Radosgw) -> None:
    bucket = s3_env.new_bucket()
    store = open_store(f"s3://{bucket}", StoreOptions(s3_env.endpoint, "us-east-1"))
    assert store.put_if_absent(f"s3://{bucket}/once", b"first")
    assert not store.put_if_absent(f"s3://{bucket}/once", b"second")
    with pytest.raises(ClientError) as refused:
        s3_env.client().put_object(Bucket=bucket, Key="once", Body=b"third", IfNoneMatch="*")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert store.read(f"s3://{bucket}/once") == b"first"


def test_concurrent_put_if_absent_has_one_winner(s3_env: Radosgw) -> None:
    root = f"s3://{s3_env.new_bucket()}"
    store = open_store(root, StoreOptions(s3_env.endpoint, "us-east-1"))
    with ThreadPoolExecutor(8) as pool:
        for turn in range(10):
            uri = join(root, f"commit-{turn}")
            wins = list(pool.map(lambda n, uri=uri: store.put_if_absent(uri, b"%d" % n), range(8)))
            assert wins.count(True) == 1
            assert store.read(uri) == b"%d" % wins.index(True)


def test_ranged_get_of_one_etag(s3_env: Radosgw) -> None:
    root = f"s3://{s3_env.new_bucket()}"
    store = open_store(root, StoreOptions(s3_env.endpoint, "us-east-1"))
    entry = store.put(join(root, "object"), bytes(range(100)))
    assert store.read(entry.uri, 10, 20, entry.etag) == bytes(range(10, 20))
    store.put(entry.uri, bytes(range(100, 200)))  # of the same size: only the ETag tells
    with pytest.raises(Changed):
        store.read(entry.uri, 10, 20, entry.etag)


def test_names_round_trip(s3_env: Radosgw) -> None:
    bucket = s3_env.new_bucket()
    root = f"s3://{bucket}/root"
    store = open_store(root, StoreOptions(s3_env.endpoint, "us-east-1"))
    for name in NAMES:
        store.put(join(root, name), name.encode())
    assert {entry.uri for entry in store.list(root)} == {join(root, name) for name in NAMES}
    assert all(store.read(join(root, name)) == name.encode() for name in NAMES)
    # What another client sees, by pages of two.
    pages = s3_env.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, PaginationConfig={"PageSize": 2})
    keys = [item["Key"] for page in pages for item in page["Contents"]]
    assert sorted(keys) == sorted(f"root/{name}" for name in NAMES)


def test_a_second_server_beside_the_first(s3: Radosgw, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    other = Radosgw.start(tmp_path / "other", port)
    with contextlib.ExitStack() as stack:
        stack.callback(other.stop)
        assert other.endpoint == f"http://127.0.0.1:{port}"
        bucket = other.new_bucket()
        assert bucket not in [b["Name"] for b in s3.client().list_buckets()["Buckets"]]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=2)
    assert s3.client().list_buckets()["ResponseMetadata"]["HTTPStatusCode"] == 200
