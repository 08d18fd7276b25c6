"""Listings in parts on a real S3 server: every key once and in order, with faults in any part."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from storage.s3.store import S3Store
from storage.store import StoreOptions, Unreachable
from tests.support.stores.fault_proxy import CutShort, ErrorResponse, Reset, fault_proxy
from tests.support.stores.radosgw import Radosgw

pytestmark = pytest.mark.s3

NAMES = ["a b+c.jpg", "100%25.jpg", "z\U0001f600.jpg", "z\uffee.jpg", "tab\tnl\n.jpg", "ünï/cödé.jpg", "x//y.jpg"]


@pytest.fixture(scope="module")
def bucket(s3: Radosgw) -> str:
    """A bucket with folders of several sizes, and names of all kinds in each."""
    name, client = s3.new_bucket(), s3.client()
    keys = [
        f"in/{folder:02d}/{n:03d}.jpg" for folder, count in enumerate([90, 1, 1, 40, *[15] * 20]) for n in range(count)
    ]
    keys += [f"in/{folder:02d}/{name}" for folder in (0, 3, 9) for name in NAMES]
    keys += ["in/03/", "in/loose.jpg", "in/99.jpg", "input/other.jpg", "im.jpg"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=name, Key=key, Body=b"x" * (key[-1] != "/")), keys))
    return name


def open_paged(endpoint: str, keys: int) -> S3Store:
    """A store that asks for this number of keys in a page, so that few objects are many pages."""
    store = S3Store(StoreOptions(endpoint, "us-east-1"))

    def limit(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {**params, "MaxKeys": keys}

    store._client.meta.events.register("provide-client-params.s3.ListObjectsV2", limit)
    return store


def list_whole(s3: Radosgw, bucket: str, prefix: str) -> list[tuple[str, int, str]]:
    """The objects as boto3 itself lists them, without those that consoles create for folders."""
    pages = s3.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    found = [
        (f"s3://{bucket}/{one['Key']}", one["Size"], one["ETag"].strip('"'))
        for page in pages
        for one in page["Contents"]
    ]
    return [one for one in found if one[1] or not one[0].endswith("/")]


@pytest.mark.parametrize("keys", [1, 3, 7, 50, 1000])
def test_parts_are_the_whole(s3_env: Radosgw, bucket: str, keys: int) -> None:
    store = open_paged(s3_env.endpoint, keys)
    for folder in ("", "in", "in/00"):
        whole = list_whole(s3_env, bucket, f"{folder}/" if folder else "")
        assert list(store.list(f"s3://{bucket}/{folder}")) == whole
        assert whole == sorted(whole)


def test_two_threads_list_at_once(s3_env: Radosgw, bucket: str) -> None:
    store = open_paged(s3_env.endpoint, 5)
    folders = [f"in/{n:02d}" for n in (0, 3, 9, 10)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda folder: list(store.list(f"s3://{bucket}/{folder}")), folders)
    assert [list(one) for one in found] == [list_whole(s3_env, bucket, f"{folder}/") for folder in folders]


@pytest.mark.parametrize(
    "action", [ErrorResponse(500, "InternalError"), Reset(), Reset(40), CutShort(40), CutShort(40, lying=True)], ids=str
)
def test_faults_in_parts_are_retried_or_raised(
    s3_env: Radosgw, bucket: str, action: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.retry.PAUSE_SECONDS", 0.01)
    whole = list_whole(s3_env, bucket, "in/")
    with fault_proxy(s3_env.endpoint) as proxy:
        store = open_paged(proxy.endpoint, 7)
        rule = proxy.add(action, "/in/", method="LIST", skip=12, times=4)
        assert list(store.list(f"s3://{bucket}/in")) == whole
        assert rule.done == 4
        proxy.add(action, "/in/", method="LIST", skip=20, times=None)
        found: list[Any] = []
        with pytest.raises(Unreachable):
            found.extend(store.list(f"s3://{bucket}/in"))
        assert found == whole[: len(found)]
