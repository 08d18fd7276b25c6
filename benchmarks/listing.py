"""CPU time of listings a key: S3's pages, files of a disk, rows of inventories; and S3's requests by shape of a bucket.

    python -m benchmarks.listing

S3's pages are made beforehand, so the times have boto3's work for a request, and no network. The limits are the time to
parse the XML of a page with the standard library, and the time of the system call for a file.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from urllib3.response import HTTPResponse

from pipelines.inputs.rows import Skipped
from pipelines.planning.inventory import parse_manifest, read_objects
from storage.local import LocalStore
from storage.s3.store import S3Store
from storage.store import StoreOptions
from tests.support.inventories import Version, dump, make_file, make_manifest
from tests.support.stores.memory_bucket import MemoryBucket

REPETITIONS = 50


def microseconds(list_all: Callable[[], Iterable[Any]]) -> float:
    """CPU time of this thread for each item, in the fastest of some repetitions."""
    best = float("inf")
    for _ in range(REPETITIONS):
        start = time.thread_time()
        count = sum(1 for _ in list_all())
        best = min(best, (time.thread_time() - start) / count)
    return best * 1e6


def measure_s3() -> None:
    """Print the CPU time for each key of a page, beside that of parsing its XML."""
    keys = [f"images/2026-01-0{n % 7}/camera {n % 9}/frame_{n:09d}.jpg" for n in range(1000)]
    page = MemoryBucket(sorted(keys))._list({"prefix": "images/"}).encode()

    def answer(request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        return AWSResponse(request.url, 200, {}, HTTPResponse(io.BytesIO(page), preload_content=False))

    store = S3Store(StoreOptions("http://127.0.0.1:9", "us-east-1"))
    store._client.meta.events.register("before-send.s3", answer)
    found = microseconds(lambda: store.list("s3://bucket/images"))
    limit = microseconds(lambda: [ElementTree.fromstring(page)] * 1000)
    print(f"S3          {found:5.2f} us a key   {found / limit:4.1f} times parsing the XML")


def measure_disk(files: int = 20_000) -> None:
    """Print the CPU time for each file of a disk, beside that of its system call."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/images/{n % 20:03d}/frame_{n:08d}.jpg" for n in range(files)]
        for path in paths:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).touch()
        found = microseconds(lambda: LocalStore().list(folder))
        limit = microseconds(lambda: map(os.stat, paths))
        print(f"disk        {found:5.2f} us a file  {found / limit:4.1f} times the system call")


def measure_inventories(rows: int = 20_000) -> None:
    """Print the CPU time for each row of an inventory."""
    versions = [Version(f"images/camera {n % 9}/frame_{n:09d}.jpg", n + 1, f"{n:032x}") for n in range(rows)]
    for kind in ("CSV", "Parquet"):
        file = make_file(kind, "images", versions)
        inventory = parse_manifest(dump(make_manifest(kind, "images", "lists", {"data": file})), "manifest.json")
        found = microseconds(
            lambda file=file, inventory=inventory: read_objects(  # type: ignore[misc]
                io.BytesIO(file), inventory, "data", Skipped()
            )
        )
        print(f"{kind:10s}  {found:5.2f} us a row")


def count_requests(page: int = 10, keys: int = 20_000) -> None:
    """Print the requests for each page of keys, by the shape of a bucket. A page has few keys here."""
    hashes = sorted(hashlib.md5(b"%d" % n).hexdigest() for n in range(keys))
    shapes = {
        "one folder, numbers": [f"{n:09d}.jpg" for n in range(keys)],
        "one folder, hashes": [f"{name}.jpg" for name in hashes],
        "a folder an image": [f"{name}/image.jpg" for name in hashes],
        "1,000 folders": [f"{n // (keys // 1000):04d}/{n:09d}.jpg" for n in range(keys)],
        "3 folders": [f"{n // (keys // 3)}/{n:09d}.jpg" for n in range(keys)],
    }
    for name, shape in shapes.items():
        bucket = MemoryBucket(shape, page)
        assert sum(1 for _ in bucket.open().list("s3://bucket")) == keys
        print(f"{name:20s} {len(bucket.requests) * page / keys:5.2f} requests a page")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    measure_s3()
    measure_disk()
    measure_inventories()
    count_requests()
