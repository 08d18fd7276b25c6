"""`sightline tag` on an S3 server with every fault that S3 has. `docs/faults.md` is generated from these cases."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sightline.demo.dataset import encode_image
from sightline.demo.shapes import LABELS
from storage.s3.store import S3Store
from storage.store import StoreOptions, join
from tests.support import tars
from tests.support.jobs import run_sightline
from tests.support.stores import fault_proxy as faults
from tests.support.stores.fault_proxy import (
    Action,
    CutShort,
    Do,
    FaultProxy,
    Reset,
    Rule,
    Silence,
    Trickle,
    fault_proxy,
)
from tests.support.stores.radosgw import Radosgw

PAGE = Path(__file__).parents[2] / "docs/faults.md"
IMAGES = 4
"""Images in each tar, Parquet file and list, and rows of each shard. Each object with several images is one shard."""
PLANNED = r"PUT .*/out/plan/"
EVERYTHING = r"/{name}/"


@dataclass(frozen=True)
class Case:
    """A fault: the requests that it affects, and its effect on the run.

    `name` is also the folder of the objects with this fault. `waits` are the objects of that folder whose shards wait
    for the next run, for the reason `reason`.
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

    def add(self, proxy: FaultProxy) -> Rule:
        """Add the fault to the proxy."""
        return proxy.add(self.action, self.key.format(name=self.name), **self.rule)

    def row(self) -> str:
        """Return the row for `docs/faults.md`."""
        return f"| {self.fault} | {self.where} | {self.does} | {self.code} | {self.then} |"


ANY_INPUT = "any input"
RETRIED = "resumes the body where it ended"
FINISHES = "finishes"

PASSING = [
    Case("error-500", "500", ANY_INPUT, faults.FAILS, "retries, 5 attempts in all", rule={"times": 2, "each": True}),
    Case("slow-down", "503 SlowDown", ANY_INPUT, faults.SLOW_DOWN, "retries, with pauses that double",
         rule={"times": 2, "each": True, "method": "GET|HEAD"}),
    Case("refused", "connection reset", ANY_INPUT, Reset(), "retries", rule={"times": 2, "each": True}),
    Case("reset", "connection reset in the body", ANY_INPUT, Reset(2000), RETRIED, rule={"times": 2, "each": True}),
    Case("cut", "body cut short", ANY_INPUT, CutShort(2000), RETRIED, rule={"times": 2, "each": True}),
    Case("lying", "body cut short, with a matching Content-Length", ANY_INPUT, CutShort(2000, lying=True),
         "detects it by Content-Range; " + RETRIED, rule={"times": 2, "each": True}),
    Case("silence", "no data for 30 s in the body", ANY_INPUT, Silence(30, 2000),
         "ends the attempt after 20 s; " + RETRIED,
         key=r"/{name}/a\.tar", rule={"once": PLANNED}),
    Case("trickle", "a slow body", ANY_INPUT, Trickle(30_000), "waits, if at least 10 kB/s arrive",
         rule={"times": 1, "each": True, "once": PLANNED}),
    Case("listing", "500", "a listing of the input", faults.FAILS, "requests the page again", key="/in/",
         rule={"method": "LIST", "times": 2}),
    Case("own-listing", "body cut short", "a listing of the output", CutShort(50), "requests the page again",
         key="/out/", rule={"method": "LIST", "times": 2, "skip": 2}),
    Case("plan", "done, but the response is 500", "writing the plan", faults.DONE_BUT_FAILS,
         "finds its own file, and continues",
         key="/out/plan/", rule={"method": "PUT"}),
    Case("parts", "done, but the response is 500", "writing a part", faults.DONE_BUT_FAILS, "writes the part again",
         key="/out/parts/", rule={"method": "PUT", "times": 4}),
    Case("parts-read", "connection reset in the body", "reading a part", Reset(500), RETRIED, key="/out/parts/",
         rule={"times": 4}),
    Case("data", "503 SlowDown", "writing a data file", faults.SLOW_DOWN, "writes the file again", key="/out/data/",
         rule={"method": "PUT", "times": 2}),
    Case("commit-500", "done, but the response is 500", "committing", faults.DONE_BUT_FAILS,
         "finds its own commit record",
         key="/out/commits/", rule={"method": "PUT", "times": 3, "conditional": True}),
    Case("commit-409", "409 ConditionalRequestConflict", "committing", faults.CONFLICT, "commits again",
         key="/out/commits/", rule={"method": "PUT", "times": 3, "conditional": True}),
    Case("commit-412", "412 although there is no record", "committing", faults.PRECONDITION,
         "checks for a record, and commits again",
         key="/out/commits/", rule={"method": "PUT", "times": 3, "conditional": True}),
    Case("manifest", "500", "writing the manifest", faults.FAILS, "writes the manifest again", key="/out/manifest",
         rule={"method": "PUT", "times": 2}),
    Case("given-up", "404, with `on_missing: reject`", "a planned object", faults.ABSENT,
         "rejects the images of the object, reason `missing`", key=r"/{name}/(a\.tar|c1\.jpg)",
         rule={"once": PLANNED, "times": None}),
]  # fmt: skip

LASTING = [
    Case("missing", "404", "a planned object", faults.ABSENT, "leaves the shard for the next run: `missing`",
         key=r"/in/{name}/(a\.tar|b\.parquet|c1\.jpg)", rule={"once": PLANNED, "times": None},
         waits=("a.tar", "b.parquet", "c"), reason="missing", code=1, then="tags the shard"),
    Case("unlisted", "404", "a URI in a list or in a Parquet column", faults.ABSENT,
         "rejects the image, reason `missing`", key=r"/(listed|linked)/{name}/1\.jpg",
         rule={"times": None, "method": "GET|HEAD"}, then="nothing to do; `--retry-rejects missing` retries the image"),
    Case("forbidden", "403", "any input, or a URI in a list or in a Parquet column", faults.FORBIDDEN,
         "leaves the shard for the next run: `forbidden`", key=r"/{name}/(a\.tar|b\.parquet|c?1\.jpg)",
         rule={"once": PLANNED, "times": None, "method": "GET|HEAD"},
         waits=("a.tar", "b.parquet", "c", "listed", "linked"), reason="forbidden", code=1, then="tags the shard"),
    Case("archived", "403 InvalidObjectState", "an input in an archive storage class", faults.ARCHIVED,
         "leaves the shard for the next run: `forbidden`", key=r"/{name}/(b\.parquet|c1\.jpg)",
         rule={"once": PLANNED, "times": None},
         waits=("b.parquet", "c"), reason="forbidden", code=1, then="tags the shard"),
    Case("not-looked-at", "403", "a new tar or Parquet file, during planning", faults.FORBIDDEN,
         "does not plan the file: `forbidden`", key=r"/{name}/(a\.tar|b\.parquet)", rule={"times": None},
         waits=("a.tar unplanned", "b.parquet unplanned"), reason="forbidden", code=1, then="plans and tags the file"),
    Case("changed", "another ETag", "a planned object that is overwritten", Do(lambda key: None),
         "leaves the shard for the next run: `changed`", key=r"/{name}/(a\.tar|b\.parquet|c1\.jpg)",
         rule={"once": PLANNED, "each": True}, waits=("a.tar", "b.parquet", "c"), reason="changed", code=1,
         then="tags the shard if the old object is back; with `on_changed: retag`, tags the new object"),
    Case("unreachable", "500, permanently", "any input, or a URI in a list or in a Parquet column", faults.FAILS,
         "leaves the shard for the next run: `unreachable`", key=r"/{name}/(a\.tar|1\.jpg)",
         rule={"once": PLANNED, "times": None, "method": "GET|HEAD"}, waits=("a.tar", "listed", "linked"),
         reason="unreachable", code=1, then="tags the shard"),
    Case("always-cut", "body cut short, permanently", ANY_INPUT, CutShort(100),
         "leaves the shard for the next run: `unreachable`", key=r"/{name}/c1\.jpg",
         rule={"once": PLANNED, "times": None},
         waits=("c",), reason="unreachable", code=1, then="tags the shard"),
]  # fmt: skip

OUTPUT = [
    Case("plan", "500, permanently", "writing the plan", faults.FAILS, "ends with an error", key="/out/plan/",
         rule={"method": "PUT", "times": None}, code=1, then=FINISHES),
    Case("parts", "503, permanently", "writing a part", faults.SLOW_DOWN, "ends with an error", key="/out/parts/",
         rule={"method": "PUT", "times": None, "skip": 2}, code=1, then=FINISHES),
    Case("commits", "403", "committing, after the credentials expired", faults.FORBIDDEN, "ends with an error",
         key="/out/commits/",
         rule={"method": "PUT", "times": None, "skip": 2}, code=1, then=FINISHES),
    Case("manifest", "500, permanently", "writing the manifest", faults.FAILS,
         "ends with an error, all shards are committed",
         key="/out/manifest", rule={"method": "PUT", "times": None}, code=1, then="writes the manifest"),
]  # fmt: skip

START = [
    Case("credentials", "wrong credentials", "at the start", faults.FORBIDDEN, "ends before any work", code=2,
         then="works with the right credentials"),
    Case("bucket", "no such bucket", "at the start", faults.ABSENT, "ends before any work", code=2,
         then="works when the bucket exists"),
    Case("endpoint", "no server at the endpoint", "at the start", Reset(), "ends before any work", code=1,
         then="works when the server is there"),
    Case("no-listing", "500, permanently", "a listing of the input", faults.FAILS, "ends before any work",
         key="/in/", rule={"method": "LIST", "times": None}, code=1, then="works"),
]  # fmt: skip

WRONG_URIS = ["absent.jpg", "s3://UPPER_case!/x.jpg", "gs://elsewhere/x.jpg", "x" * 1100]
"""Entries of the list that name no image: the first object is missing, the other URIs can never name an object."""


def make_page() -> str:
    """Return the text of `docs/faults.md`."""
    lines = [
        "# Faults of the object store, and what a run does",
        "",
        "`tests/ray/test_faults.py` runs `sightline tag` with each of these faults, which a proxy in front of a real",
        "S3 server injects. The test checks this page. It also checks that no image is lost or tagged twice, that no",
        "image is rejected because of the store, and that `sightline verify` finds no problem afterwards.",
        "",
        "Each operation has 5 attempts, with pauses of about 8 s in total. An attempt ends after 10 s without a",
        "connection, after 20 s without data, or if less than 10 kB/s arrive over 20 s. A body that breaks off is",
        "resumed where it ended, if the object still has the same ETag.",
        "",
        "| fault | where | what the run does | exit code | the next run |",
        "|---|---|---|---|---|",
        *[case.row() for case in (*PASSING, *LASTING, *OUTPUT, *START)],
        "",
        "A run that leaves shards for the next run finishes all others. Its last lines say how many shards wait, about",
        "how many images they contain, and for which reasons, with an example for each reason.",
    ]
    return "\n".join(lines) + "\n"


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


def make_parquet(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def proxy(s3: Radosgw, local_ray: None) -> Iterator[FaultProxy]:
    with fault_proxy(s3.endpoint) as running:
        yield running


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


@pytest.fixture(scope="module")
def passing(s3: Radosgw, proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    bucket = Bucket(s3, tmp_path_factory.mktemp("passing"), PASSING)
    return run_twice(bucket, proxy, on_missing="reject")


@pytest.mark.s3
@pytest.mark.parametrize("case", PASSING, ids=lambda case: case.name)
def test_a_passing_fault_costs_no_image(passing: Runs, case: Case) -> None:
    assert passing.done[case.name] > 0
    gone = {("given-up", "a.tar"), ("given-up", "c")}
    for (name, kind), digests in passing.bucket.images.items():
        if name == case.name and (name, kind) not in gone:
            assert [passing.tagged[digest] for digest in digests] == [1] * IMAGES, passing.printed()


@pytest.mark.s3
def test_a_run_with_all_passing_faults_succeeds(passing: Runs) -> None:
    assert passing.first.returncode == 0, passing.printed()
    wanted = passing.bucket.expected(("given-up", "a.tar"))
    wanted[passing.bucket.images["given-up", "c"][1]] -= 1
    assert passing.tagged == +wanted
    given_up = Counter([("given-up/a.tar", "missing"), ("given-up/c1.jpg", "missing")])
    assert passing.rejects == LIST_REJECTS + given_up
    assert passing.second.returncode == 0, passing.printed()
    assert "nothing to do" in passing.second.stdout
    passing.bucket.verify()


@pytest.fixture(scope="module")
def lasting(s3: Radosgw, proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_twice(Bucket(s3, tmp_path_factory.mktemp("lasting"), LASTING), proxy)


@pytest.mark.s3
@pytest.mark.parametrize("case", LASTING, ids=lambda case: case.name)
def test_a_lasting_fault_costs_only_its_own_shards(lasting: Runs, case: Case) -> None:
    assert lasting.done[case.name] > 0
    waiting = {place.removesuffix(" unplanned") for place in case.waits}
    for (name, kind), digests in lasting.bucket.images.items():
        if name == case.name:
            there = [lasting.tagged[digest] for digest in digests]
            wanted = 0 if kind in waiting else 1
            rejected = 1 if name == "unlisted" and kind in ("listed", "linked") else None
            assert there == [0 if n == rejected else wanted for n in range(IMAGES)], (kind, lasting.printed())


@pytest.mark.s3
def test_a_run_with_waiting_shards_says_why_and_the_next_run_tags_them(lasting: Runs) -> None:
    assert lasting.first.returncode == 1, lasting.printed()
    unlisted = Counter([(f"{lasting.bucket.root}/listed/unlisted/1.jpg", "missing"), ("1", "missing")])
    assert lasting.rejects == LIST_REJECTS + unlisted
    shards = Counter(case.reason for case in LASTING for _ in case.waits)
    images = sum(1 if "unplanned" in place else IMAGES for case in LASTING for place in case.waits)
    last = " ".join(lasting.first.stderr.split())
    said = re.search(r"(\d+) shards or inputs with about (\d+) images wait", last)
    assert said is not None, lasting.printed()
    assert (int(said[1]), int(said[2])) == (shards.total(), images)
    for reason, count in shards.items():
        assert f"{reason} {count}: " in last
    assert lasting.second.returncode == 0, lasting.printed()
    wanted = lasting.bucket.expected()
    for kind in ("listed", "linked"):
        wanted[lasting.bucket.images["unlisted", kind][1]] -= 1
    assert lasting.bucket.tagged() == +wanted
    assert lasting.bucket.rejects() == lasting.rejects
    lasting.bucket.verify()


@pytest.mark.s3
def test_a_run_whose_output_fails_is_finished_by_the_next(s3: Radosgw, proxy: FaultProxy, tmp_path: Path) -> None:
    bucket = Bucket(s3, tmp_path, [Case("small", "", "", faults.FAILS, "")])
    for case in OUTPUT:
        proxy.clear()
        rule = case.add(proxy)
        done = bucket.run(proxy.endpoint)
        assert done.returncode == case.code, (case.name, done.stdout + done.stderr)
        assert len(done.stderr.strip().splitlines()[-1]) < 1000
        assert rule.done > 0
        assert not bucket.tagged() - bucket.expected()
    proxy.clear()
    done = bucket.run(proxy.endpoint)
    assert done.returncode == 0, done.stdout + done.stderr
    assert bucket.tagged() == bucket.expected()
    assert bucket.rejects() == LIST_REJECTS
    bucket.verify()


@pytest.mark.s3
@pytest.mark.parametrize("case", START, ids=lambda case: case.name)
def test_a_failed_start_writes_nothing(s3: Radosgw, proxy: FaultProxy, tmp_path: Path, case: Case) -> None:
    bucket = Bucket(s3, tmp_path, [])
    proxy.clear()
    if case.name == "no-listing":
        case.add(proxy)
    endpoint = "http://127.0.0.1:9" if case.name == "endpoint" else proxy.endpoint
    env = {"AWS_SECRET_ACCESS_KEY": "wrong"} if case.name == "credentials" else {}
    keys = {"input": "s3://no-such-bucket-here/in"} if case.name == "bucket" else {}
    done = bucket.run_alone(endpoint, env, **keys)
    assert done.returncode == case.code, done.stdout + done.stderr
    assert list(bucket.store.list(join(bucket.root, "out"))) == []


def test_the_page_lists_the_tested_faults() -> None:
    if os.environ.get("SIGHTLINE_WRITE_DOCS"):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(make_page())
    assert PAGE.read_text() == make_page(), "SIGHTLINE_WRITE_DOCS=1 writes the page"
