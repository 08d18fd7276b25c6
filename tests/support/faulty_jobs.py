"""Jobs on an object store behind a proxy with faults, and the cases from which `docs/faults.md` is generated."""

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
from storage.store import join
from tests.support import tars
from tests.support.jobs import make_parquet, run_sightline
from tests.support.stores.fault_proxy import Action, Do, FaultProxy, Rule
from tests.support.stores.service import Service

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
    clouds: bool = True
    """Whether the case is run with Google's and Azure's stores too."""

    def add(self, proxy: FaultProxy) -> Rule:
        """Add the fault to the proxy, and those of `more` behind it."""
        rule, *_ = (
            proxy.add(action, self.key.format(name=self.name), **self.rule) for action in (self.action, *self.more)
        )
        return rule

    def row(self) -> str:
        """Return the row for `docs/faults.md`."""
        stores = "s3, gs, az" if self.clouds else "s3"
        return f"| {self.fault} | {self.where} | {self.does} | {self.code} | {self.then} | {stores} |"


WRONG_URIS = ["absent.jpg", "s3://UPPER_case!/x.jpg", "abfs://elsewhere/x.jpg", "x" * 1100]
"""Entries of the list that name no image: the first object is missing, the other URIs can never name an object."""


class Bucket:
    """A bucket with inputs for each case, and a job that accesses the bucket through the proxy."""

    def __init__(self, service: Service, folder: Path, cases: list[Case]) -> None:
        self.service, self.folder, self.cases = service, folder, cases
        self.name = service.server.new_bucket()
        self.root = f"{service.scheme}://{self.name}"
        self.contents: dict[str, bytes] = {}
        self._replaced: set[str] = set()
        self.images: dict[tuple[str, str], list[str]] = {}
        """The digests of the images, by case and object: a.tar, b.parquet, c (loose images), listed and linked."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in service.server.env.items():
                patch.setenv(name, value)
            self.store = service.open_store()
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
        """Overwrite an object with another one of the same size. `key` is as the proxy has it: with the bucket."""
        _, _, key = key.partition(f"{self.name}/")
        data = self.contents[key]
        self._replaced.add(key)
        self.store.put(join(self.root, key), data[:-1] + bytes([data[-1] ^ 1]))

    def restore(self) -> None:
        """Write the original objects again in place of those of `replace`."""
        for key in self._replaced:
            self.store.put(join(self.root, key), self.contents[key])

    def run(self, **keys: Any) -> subprocess.CompletedProcess[str]:
        """Run the job in this process, on the Ray of the tests."""
        return self._sightline("tag", self._configure(**keys))

    def run_alone(self, env: dict[str, str], **keys: Any) -> subprocess.CompletedProcess[str]:
        """Run the job in a process of its own, which reads its own credentials."""
        environment = {**os.environ, **self.service.env, **env}
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
        done = self._sightline("verify", join(self.root, "out"))
        assert done.returncode == 0, done.stdout + done.stderr

    def count_duplicates(self) -> int:
        """Return how many rows the commits have twice, also of an output that no run finished."""
        done = self._sightline("verify", join(self.root, "out"), "--json")
        return int(json.loads(done.stdout)["duplicates"])

    def _sightline(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.service.env.items():
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


def run_twice(bucket: Bucket, **keys: Any) -> Runs:
    """Run the job with the faults of its cases, then run it again without faults.

    Azure gives an object that is written again another ETag, so there the second run takes the new object.
    """
    proxy = bucket.service.proxy
    proxy.clear()
    rules = {case.name: case.add(proxy) for case in bucket.cases}
    for rule in rules.values():
        if isinstance(rule.action, Do):
            rule.action = Do(bucket.replace)
    first = bucket.run(**keys)
    tagged, rejects = bucket.tagged(), bucket.rejects()
    done = {name: rule.done for name, rule in rules.items()}
    proxy.clear()
    bucket.restore()
    if bucket.service.scheme == "az":
        keys["on_changed"] = "retag"
    return Runs(bucket, first, tagged, rejects, done, bucket.run(**keys))


LIST_REJECTS = Counter(zip(WRONG_URIS, ["missing", "unreadable", "unreadable", "unreadable"], strict=True))
