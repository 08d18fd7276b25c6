"""Jobs on an S3 server behind a proxy with faults, and the cases from which `docs/faults.md` is generated."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from sightline.demo.dataset import encode_image
from sightline.demo.shapes import LABELS
from storage.s3.store import S3Store
from storage.store import StoreOptions, join
from tests.support import tars
from tests.support.jobs import make_parquet, run_sightline
from tests.support.stores.fault_proxy import Action, Do, FaultProxy, Rule
from tests.support.stores.radosgw import Radosgw

IMAGES = 4
"""Images in each tar, Parquet file and list, and rows of each shard. Each object with several images is one shard."""
FINISHES = "finishes"
PLANNED = r"PUT .*/out/plan/"
EVERYTHING = r"/{name}/"


@dataclass(frozen=True)
class Case:
    """A fault: the requests that it affects, and its effect on the run.

    `name` is also the folder of the objects with this fault. `waits` are the objects of that folder whose shards wait
    for the next run, for the reason `reason`. `more` are actions for the requests after those that get `action`. The
    last line of a failed run contains `says`.
    """

    name: str
    fault: str
    where: str
    action: Action
    does: str
    key: str = EVERYTHING
    rule: dict[str, Any] = field(default_factory=dict)
    waits: tuple[str, ...] = ()
    reason: str = ""
    code: int = 0
    then: str = "nothing to do"
    says: str = ""
    more: tuple[Action, ...] = ()

    def add(self, proxy: FaultProxy) -> Rule:
        """Add the fault to the proxy, and those of `more` behind it."""
        rule, *_ = (
            proxy.add(action, self.key.format(name=self.name), **self.rule) for action in (self.action, *self.more)
        )
        return rule

    def row(self) -> str:
        """Return the row for `docs/faults.md`."""
        return f"| {self.fault} | {self.where} | {self.does} | {self.code} | {self.then} |"


WRONG_URIS = ["absent.jpg", "s3://UPPER_case!/x.jpg", "abfs://elsewhere/x.jpg", "x" * 1100]
"""Entries of the list that name no image: the first object is missing, the other URIs can never name an object."""


class Bucket:
    """A bucket with inputs for each case, and a job that accesses the bucket through the proxy."""

    def __init__(self, server: Radosgw, folder: Path, cases: list[Case]) -> None:
        self.server, self.folder, self.cases = server, folder, cases
        self.root = f"s3://{server.new_bucket()}"
        self.contents: dict[str, bytes] = {}
        self.images: dict[tuple[str, str], list[str]] = {}
        """The digests of the images, by case and object: a.tar, b.parquet, c (loose images), listed and linked."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.env.items():
                patch.setenv(name, value)
            self.store = S3Store(StoreOptions(server.endpoint, "us-east-1"))
            for case in cases:
                if "{name}" in case.key:  # other faults are on the output, or on all inputs
                    self._make_inputs(case.name)
            uris = [key for key in self.contents if key.startswith("listed/")] + WRONG_URIS
            self._put(
                "lists/uris.txt", "\n".join(f"{self.root}/{u}" if u in self.contents else u for u in uris).encode()
            )

    def add_tar(self, name: str) -> None:
        """Write another tar, which is one shard."""
        rng = random.Random(name)
        images = [encode_image(rng, rng.choice(LABELS)) for _ in range(IMAGES)]
        self.images[name, "a.tar"] = [hashlib.sha256(data).hexdigest() for data in images]
        self._put(f"in/{name}/a.tar", make_tar(images))

    def _put(self, key: str, data: bytes) -> None:
        self.contents[key] = data
        self.store.put(join(self.root, key), data)

    def _make_inputs(self, name: str) -> None:
        rng = random.Random(name)
        batches = [[encode_image(rng, rng.choice(LABELS)) for _ in range(IMAGES)] for _ in range(5)]
        for kind, batch in zip(("a.tar", "b.parquet", "c", "listed", "linked"), batches, strict=True):
            self.images[name, kind] = [hashlib.sha256(data).hexdigest() for data in batch]
        tar, parquet, loose, listed, linked = batches
        self._put(f"in/{name}/a.tar", make_tar(tar))
        self._put(f"in/{name}/b.parquet", make_parquet({"image": parquet}))
        uris = []
        for number in range(IMAGES):
            self._put(f"in/{name}/c{number}.jpg", loose[number])
            self._put(f"listed/{name}/{number}.jpg", listed[number])
            self._put(f"linked/{name}/{number}.jpg", linked[number])
            uris.append(f"{self.root}/linked/{name}/{number}.jpg")
        self._put(f"in/{name}/d.parquet", make_parquet({"uri": uris}))

    def replace(self, key: str) -> None:
        """Overwrite an object with another one of the same size."""
        data = self.contents[key.partition("/")[2]]
        self.store.put(f"s3://{key}", data[:-1] + bytes([data[-1] ^ 1]))

    def restore(self) -> None:
        """Write the original objects again."""
        for key, data in self.contents.items():
            if "/changed/" in key:
                self.store.put(join(self.root, key), data)

    def run(self, endpoint: str, **keys: Any) -> subprocess.CompletedProcess[str]:
        """Run the job in this process, on the Ray of the tests."""
        return self._sightline("tag", self._configure(**keys), endpoint=endpoint)

    def run_alone(self, endpoint: str, env: dict[str, str], **keys: Any) -> subprocess.CompletedProcess[str]:
        """Run the job in a process of its own, which reads its own credentials."""
        environment = {**os.environ, **self.server.env, "AWS_ENDPOINT_URL": endpoint, **env}
        command = [sys.executable, "-m", "sightline", "tag", self._configure(**keys)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)

    def _configure(self, **keys: Any) -> str:
        config = self.folder / "job.yaml"
        job = {
            "input": [join(self.root, "in"), join(self.root, "lists/uris.txt")],
            "output": join(self.root, "out"),
            "labels": list(LABELS),
            "rows_per_shard": IMAGES,
            "max_reject_fraction": 0.9,
            "actors": {"num_cpus": 1},
            "ray": {"readers": 5},  # readers that wait for retries at the same time
            **keys,
        }
        config.write_text(yaml.safe_dump(job))
        return str(config)

    def verify(self) -> None:
        """Check that `sightline verify` finds no problem."""
        done = self._sightline("verify", join(self.root, "out"), endpoint=self.server.endpoint)
        assert done.returncode == 0, done.stdout + done.stderr

    def count_duplicates(self) -> int:
        """Return how many rows the commits have twice, also of an output that no run finished."""
        done = self._sightline("verify", join(self.root, "out"), "--json", endpoint=self.server.endpoint)
        return int(json.loads(done.stdout)["duplicates"])

    def _sightline(self, *arguments: str, endpoint: str) -> subprocess.CompletedProcess[str]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**self.server.env, "AWS_ENDPOINT_URL": endpoint}.items():
                patch.setenv(name, value)
            return run_sightline(*arguments)

    def tagged(self) -> Counter[str]:
        """Count how often each image's digest is in the output."""
        return Counter(row["sha256"] for row in self._rows("data"))

    def rejects(self) -> Counter[tuple[str, str]]:
        """Count the rejected rows by key and reason."""
        return Counter((row["key"], row["reason"]) for row in self._rows("rejects"))

    def _rows(self, kind: str) -> Iterator[dict[str, Any]]:
        columns = ["sha256"] if kind == "data" else ["key", "reason"]
        for entry in self.store.list(join(self.root, "out", kind)):
            yield from pq.read_table(io.BytesIO(self.store.read(entry.uri)), columns=columns).to_pylist()

    def expected(self, *without: tuple[str, str]) -> Counter[str]:
        """Return each image's digest once, without the images of these cases' objects."""
        return Counter(digest for where, found in self.images.items() if where not in without for digest in found)


def make_tar(images: list[bytes]) -> bytes:
    return tars.make_tar((f"{number}.jpg", data) for number, data in enumerate(images))


@dataclass
class Runs:
    """A run with faults, the next run without them, and how often each fault happened."""

    bucket: Bucket
    first: subprocess.CompletedProcess[str]
    tagged: Counter[str]
    rejects: Counter[tuple[str, str]]
    done: dict[str, int]
    second: subprocess.CompletedProcess[str]

    def printed(self) -> str:
        return f"{self.first.stdout}{self.first.stderr}\n---\n{self.second.stdout}{self.second.stderr}"


def run_twice(bucket: Bucket, proxy: FaultProxy, **keys: Any) -> Runs:
    """Run the job with the faults of its cases, then run it again without faults."""
    proxy.clear()
    rules = {case.name: case.add(proxy) for case in bucket.cases}
    for rule in rules.values():
        if isinstance(rule.action, Do):
            rule.action = Do(bucket.replace)
    first = bucket.run(proxy.endpoint, **keys)
    tagged, rejects = bucket.tagged(), bucket.rejects()
    done = {name: rule.done for name, rule in rules.items()}
    proxy.clear()
    bucket.restore()
    return Runs(bucket, first, tagged, rejects, done, bucket.run(proxy.endpoint, **keys))


LIST_REJECTS = Counter(zip(WRONG_URIS, ["missing", "unreadable", "unreadable", "unreadable"], strict=True))
