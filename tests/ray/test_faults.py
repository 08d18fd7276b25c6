"""`sightline tag` on an S3 server that fails in every way that S3 does. The cases here are also `docs/faults.md`."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import subprocess
import sys
import tarfile
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
from storage.s3 import S3Store
from storage.store import StoreOptions, join
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
"""In each object, and in each shard: every object with several images, and every four of others, is a shard."""
PLANNED = r"PUT .*/out/plan/"
EVERYTHING = r"/{name}/"


@dataclass(frozen=True)
class Case:
    """A fault: on which requests, and what comes of it. `name` is also the folder of the objects that it is made for.

    `waits` are the objects of that folder whose shard is set aside, and why.
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
        """Let it happen."""
        return proxy.add(self.action, self.key.format(name=self.name), **self.rule)

    def row(self) -> str:
        """Its line of the page."""
        return f"| {self.fault} | {self.where} | {self.does} | {self.code} | {self.then} |"


ANY_INPUT = "any input"
RETRIED = "reads again, and goes on where it ended"
OUTPUT_LATER = "completes"

ABSORBED = [
    Case("error-500", "500", ANY_INPUT, faults.FAILS, "asks again, 5 times in all", rule={"times": 2, "each": True}),
    Case("slow-down", "503 SlowDown", ANY_INPUT, faults.SLOW_DOWN, "asks again, with pauses that double",
         rule={"times": 2, "each": True, "method": "GET|HEAD"}),
    Case("refused", "connection reset", ANY_INPUT, Reset(), "asks again", rule={"times": 2, "each": True}),
    Case("reset", "reset in mid-body", ANY_INPUT, Reset(2000), RETRIED, rule={"times": 2, "each": True}),
    Case("cut", "body cut short", ANY_INPUT, CutShort(2000), RETRIED, rule={"times": 2, "each": True}),
    Case("lying", "body cut short, Content-Length to match", ANY_INPUT, CutShort(2000, lying=True),
         "finds by Content-Range that it is short; " + RETRIED, rule={"times": 2, "each": True}),
    Case("silence", "30 s of silence in mid-body", ANY_INPUT, Silence(30, 2000), "gives up after 20 s; " + RETRIED,
         key=r"/{name}/a\.tar", rule={"once": PLANNED}),
    Case("trickle", "a slow trickle", ANY_INPUT, Trickle(30_000), "waits, while 10 kB/s arrive",
         rule={"times": 1, "each": True, "once": PLANNED}),
    Case("listing", "500", "a listing of the input", faults.FAILS, "asks for the page again", key="/in/",
         rule={"method": "LIST", "times": 2}),
    Case("own-listing", "body cut short", "a listing of the output", CutShort(50), "asks for the page again",
         key="/out/", rule={"method": "LIST", "times": 2, "skip": 2}),
    Case("plan", "done, but answered 500", "writing the plan", faults.DONE_BUT_FAILS, "finds its own file there",
         key="/out/plan/", rule={"method": "PUT"}),
    Case("parts", "done, but answered 500", "writing rows in work", faults.DONE_BUT_FAILS, "writes them again",
         key="/out/parts/", rule={"method": "PUT", "times": 4}),
    Case("parts-read", "reset in mid-body", "reading rows in work", Reset(500), RETRIED, key="/out/parts/",
         rule={"times": 4}),
    Case("data", "503 SlowDown", "writing data", faults.SLOW_DOWN, "writes it again", key="/out/data/",
         rule={"method": "PUT", "times": 2}),
    Case("commit-500", "done, but answered 500", "committing", faults.DONE_BUT_FAILS, "finds its own record there",
         key="/out/commits/", rule={"method": "PUT", "times": 3, "conditional": True}),
    Case("commit-409", "409 ConditionalRequestConflict", "committing", faults.CONFLICT, "commits again",
         key="/out/commits/", rule={"method": "PUT", "times": 3, "conditional": True}),
    Case("commit-412", "412 though nothing is there", "committing", faults.PRECONDITION, "looks, and commits again",
         key="/out/commits/", rule={"method": "PUT", "times": 3, "conditional": True}),
    Case("manifest", "500", "writing the manifest", faults.FAILS, "writes it again", key="/out/manifest",
         rule={"method": "PUT", "times": 2}),
    Case("given-up", "404, with `on_missing: reject`", "a planned object", faults.ABSENT,
         "rejects its images, reason `missing`", key=r"/{name}/(a\.tar|c1\.jpg)",
         rule={"once": PLANNED, "times": None}),
]  # fmt: skip

ASIDE = [
    Case("missing", "404", "a planned object", faults.ABSENT, "sets its shard aside: `missing`",
         key=r"/in/{name}/(a\.tar|b\.parquet|c1\.jpg)", rule={"once": PLANNED, "times": None},
         waits=("a.tar", "b.parquet", "c"), reason="missing", code=1, then="takes the shard up"),
    Case("unlisted", "404", "a URI in a list or in a Parquet column", faults.ABSENT,
         "rejects the image, reason `missing`", key=r"/(listed|linked)/{name}/1\.jpg",
         rule={"times": None, "method": "GET|HEAD"}, then="nothing to do; `--retry-rejects missing` takes it up"),
    Case("forbidden", "403", "any input, or a URI in a list or in a Parquet column", faults.FORBIDDEN,
         "sets its shard aside: `forbidden`", key=r"/{name}/(a\.tar|b\.parquet|c?1\.jpg)",
         rule={"once": PLANNED, "times": None, "method": "GET|HEAD"},
         waits=("a.tar", "b.parquet", "c", "listed", "linked"), reason="forbidden", code=1, then="takes the shard up"),
    Case("archived", "403 InvalidObjectState", "an input in an archive's storage class", faults.ARCHIVED,
         "sets its shard aside: `forbidden`", key=r"/{name}/(b\.parquet|c1\.jpg)",
         rule={"once": PLANNED, "times": None},
         waits=("b.parquet", "c"), reason="forbidden", code=1, then="takes the shard up"),
    Case("not-looked-at", "403", "a new tar or Parquet file, when it is planned", faults.FORBIDDEN,
         "does not plan it: `forbidden`", key=r"/{name}/(a\.tar|b\.parquet)", rule={"times": None},
         waits=("a.tar unplanned", "b.parquet unplanned"), reason="forbidden", code=1, then="plans it"),
    Case("changed", "another ETag", "a planned object that is overwritten", Do(lambda key: None),
         "sets its shard aside: `changed`", key=r"/{name}/(a\.tar|b\.parquet|c1\.jpg)",
         rule={"once": PLANNED, "each": True}, waits=("a.tar", "b.parquet", "c"), reason="changed", code=1,
         then="takes the shard up if the object is the old one again; with `on_changed: retag`, tags the new one"),
    Case("unreachable", "500, and no end to it", "any input, or a URI in a list or in a Parquet column", faults.FAILS,
         "sets its shard aside: `unreachable`", key=r"/{name}/(a\.tar|1\.jpg)",
         rule={"once": PLANNED, "times": None, "method": "GET|HEAD"}, waits=("a.tar", "listed", "linked"),
         reason="unreachable", code=1, then="takes the shard up"),
    Case("always-cut", "body cut short, and no end to it", ANY_INPUT, CutShort(100),
         "sets its shard aside: `unreachable`", key=r"/{name}/c1\.jpg", rule={"once": PLANNED, "times": None},
         waits=("c",), reason="unreachable", code=1, then="takes the shard up"),
]  # fmt: skip

OUTPUT = [
    Case("plan", "500, and no end to it", "writing the plan", faults.FAILS, "ends", key="/out/plan/",
         rule={"method": "PUT", "times": None}, code=1, then=OUTPUT_LATER),
    Case("parts", "503, and no end to it", "writing rows in work", faults.SLOW_DOWN, "ends", key="/out/parts/",
         rule={"method": "PUT", "times": None, "skip": 2}, code=1, then=OUTPUT_LATER),
    Case("commits", "403", "committing, by credentials that expired", faults.FORBIDDEN, "ends", key="/out/commits/",
         rule={"method": "PUT", "times": None, "skip": 2}, code=1, then=OUTPUT_LATER),
    Case("manifest", "500, and no end to it", "writing the manifest", faults.FAILS, "ends, everything committed",
         key="/out/manifest", rule={"method": "PUT", "times": None}, code=1, then="writes the manifest"),
]  # fmt: skip

START = [
    Case("credentials", "wrong credentials", "at the start", faults.FORBIDDEN, "ends before any work", code=2,
         then="works, with the right ones"),
    Case("bucket", "no such bucket", "at the start", faults.ABSENT, "ends before any work", code=2,
         then="works, once it is there"),
    Case("endpoint", "nobody listens at the endpoint", "at the start", Reset(), "ends before any work", code=1,
         then="works, once it is reached"),
    Case("no-listing", "500, and no end to it", "a listing of the input", faults.FAILS, "ends before any work",
         key="/in/", rule={"method": "LIST", "times": None}, code=1, then="works"),
]  # fmt: skip

PLANTED = ["absent.jpg", "s3://UPPER_case!/x.jpg", "gs://elsewhere/x.jpg", "x" * 1100]
"""Members of a list that are no images of this store: one is missing, the others can never be there."""


def make_page() -> str:
    """`docs/faults.md`."""
    lines = [
        "# What the object store may do to a run",
        "",
        "`tests/ray/test_faults.py` does each of these to `sightline tag`, through a proxy in front of a real S3",
        "server, and checks this page: no image is lost or tagged twice, none is rejected for what the store did, and",
        "afterwards `sightline verify` finds nothing wrong.",
        "",
        "An operation is tried 5 times, with pauses of about 8 s together. Ten seconds without a connection, 20 s of",
        "silence, or less than 10 kB/s over 20 s end an attempt. A body that breaks off is resumed where it ended, by",
        "the same ETag.",
        "",
        "| fault | where | what the run does | exit code | the next run |",
        "|---|---|---|---|---|",
        *[case.row() for case in (*ABSORBED, *ASIDE, *OUTPUT, *START)],
        "",
        "A run that sets shards aside finishes all others. Its last lines say how many wait, about how many images are",
        "in them, and why, with an example of each.",
    ]
    return "\n".join(lines) + "\n"


class World:
    """A bucket with inputs for each case, and a job that reaches it through the proxy."""

    def __init__(self, server: Radosgw, folder: Path, cases: list[Case]) -> None:
        self.server, self.folder, self.cases = server, folder, cases
        self.bucket = server.new_bucket()
        self.root = f"s3://{self.bucket}"
        self.contents: dict[str, bytes] = {}
        self.images: dict[tuple[str, str], list[str]] = {}
        """Digests by case and object: a.tar, b.parquet, c (loose), listed and linked."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.env.items():
                patch.setenv(name, value)
            self.store = S3Store(StoreOptions(server.endpoint, "us-east-1"))
            for case in cases:
                if "{name}" in case.key:  # else its fault is the output's, or every input's
                    self._make_inputs(case.name)
            uris = [key for key in self.contents if key.startswith("listed/")] + PLANTED
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
        """Overwrite an object by another of the same size."""
        data = self.contents[key.partition("/")[2]]
        self.store.put(f"s3://{key}", data[:-1] + bytes([data[-1] ^ 1]))

    def restore(self) -> None:
        """Put every object back as it was."""
        for key, data in self.contents.items():
            if "/changed/" in key:
                self.store.put(join(self.root, key), data)

    def run(self, endpoint: str, **keys: Any) -> subprocess.CompletedProcess[str]:
        """Run the job, on the tests' Ray."""
        return self._sightline("tag", self._configure(**keys), endpoint=endpoint)

    def run_alone(self, endpoint: str, env: dict[str, str], **keys: Any) -> subprocess.CompletedProcess[str]:
        """Run the job in a process of its own, where credentials are read again."""
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
            "ray": {"readers": 5},  # that wait at the same time
            **keys,
        }
        config.write_text(yaml.safe_dump(job))
        return str(config)

    def verify(self) -> None:
        """`sightline verify` finds nothing wrong."""
        done = self._sightline("verify", join(self.root, "out"), endpoint=self.server.endpoint)
        assert done.returncode == 0, done.stdout + done.stderr

    def _sightline(self, *arguments: str, endpoint: str) -> subprocess.CompletedProcess[str]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**self.server.env, "AWS_ENDPOINT_URL": endpoint}.items():
                patch.setenv(name, value)
            return run_sightline(*arguments)

    def tagged(self) -> Counter[str]:
        """How often each image's digest is in the output."""
        return Counter(row["sha256"] for row in self._rows("data"))

    def rejects(self) -> Counter[tuple[str, str]]:
        """Key and reason of each reject."""
        return Counter((row["key"], row["reason"]) for row in self._rows("rejects"))

    def _rows(self, kind: str) -> Iterator[dict[str, Any]]:
        columns = ["sha256"] if kind == "data" else ["key", "reason"]
        for entry in self.store.list(join(self.root, "out", kind)):
            yield from pq.read_table(io.BytesIO(self.store.read(entry.uri)), columns=columns).to_pylist()

    def expected(self, *without: tuple[str, str]) -> Counter[str]:
        """Each image once, except those of these cases' objects."""
        return Counter(digest for where, found in self.images.items() if where not in without for digest in found)


def make_tar(images: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, data in enumerate(images):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def make_parquet(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def proxy(s3: Radosgw, local_ray: None) -> Iterator[FaultProxy]:
    with fault_proxy(s3.endpoint) as running:
        yield running


@dataclass
class Story:
    """A run under faults, the run after it, and how often each fault happened."""

    world: World
    first: subprocess.CompletedProcess[str]
    tagged: Counter[str]
    rejects: Counter[tuple[str, str]]
    done: dict[str, int]
    second: subprocess.CompletedProcess[str]

    def say(self) -> str:
        return f"{self.first.stdout}{self.first.stderr}\n---\n{self.second.stdout}{self.second.stderr}"


def tell(world: World, proxy: FaultProxy, **keys: Any) -> Story:
    """Run the job under its cases' faults, and once more without them."""
    proxy.clear()
    rules = {case.name: case.add(proxy) for case in world.cases}
    for rule in rules.values():
        if isinstance(rule.action, Do):
            rule.action = Do(world.replace)
    first = world.run(proxy.endpoint, **keys)
    tagged, rejects = world.tagged(), world.rejects()
    done = {name: rule.done for name, rule in rules.items()}
    proxy.clear()
    world.restore()
    return Story(world, first, tagged, rejects, done, world.run(proxy.endpoint, **keys))


PLANTED_REJECTS = Counter(zip(PLANTED, ["missing", "unreadable", "unreadable", "unreadable"], strict=True))


@pytest.fixture(scope="module")
def absorbed(s3: Radosgw, proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Story:
    world = World(s3, tmp_path_factory.mktemp("absorbed"), ABSORBED)
    return tell(world, proxy, on_missing="reject")


@pytest.mark.s3
@pytest.mark.parametrize("case", ABSORBED, ids=lambda case: case.name)
def test_what_retries_absorb(absorbed: Story, case: Case) -> None:
    assert absorbed.done[case.name] > 0
    gone = {("given-up", "a.tar"), ("given-up", "c")}
    for (name, kind), digests in absorbed.world.images.items():
        if name == case.name and (name, kind) not in gone:
            assert [absorbed.tagged[digest] for digest in digests] == [1] * IMAGES, absorbed.say()


@pytest.mark.s3
def test_a_run_through_all_that_passes(absorbed: Story) -> None:
    assert absorbed.first.returncode == 0, absorbed.say()
    wanted = absorbed.world.expected(("given-up", "a.tar"))
    wanted[absorbed.world.images["given-up", "c"][1]] -= 1
    assert absorbed.tagged == +wanted
    given_up = Counter([("given-up/a.tar", "missing"), ("given-up/c1.jpg", "missing")])
    assert absorbed.rejects == PLANTED_REJECTS + given_up
    assert absorbed.second.returncode == 0, absorbed.say()
    assert "nothing to do" in absorbed.second.stdout
    absorbed.world.verify()


@pytest.fixture(scope="module")
def aside(s3: Radosgw, proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Story:
    return tell(World(s3, tmp_path_factory.mktemp("aside"), ASIDE), proxy)


@pytest.mark.s3
@pytest.mark.parametrize("case", ASIDE, ids=lambda case: case.name)
def test_what_is_set_aside(aside: Story, case: Case) -> None:
    assert aside.done[case.name] > 0
    waiting = {place.removesuffix(" unplanned") for place in case.waits}
    for (name, kind), digests in aside.world.images.items():
        if name == case.name:
            there = [aside.tagged[digest] for digest in digests]
            wanted = 0 if kind in waiting else 1
            rejected = 1 if name == "unlisted" and kind in ("listed", "linked") else None
            assert there == [0 if n == rejected else wanted for n in range(IMAGES)], (kind, aside.say())


@pytest.mark.s3
def test_a_run_that_sets_shards_aside(aside: Story) -> None:
    assert aside.first.returncode == 1, aside.say()
    unlisted = Counter([(f"{aside.world.root}/listed/unlisted/1.jpg", "missing"), ("1", "missing")])
    assert aside.rejects == PLANTED_REJECTS + unlisted
    shards = Counter(case.reason for case in ASIDE for _ in case.waits)
    images = sum(1 if "unplanned" in place else IMAGES for case in ASIDE for place in case.waits)
    last = " ".join(aside.first.stderr.split())
    said = re.search(r"(\d+) shards or inputs with about (\d+) images wait", last)
    assert said is not None, aside.say()
    assert (int(said[1]), int(said[2])) == (shards.total(), images)
    for reason, count in shards.items():
        assert f"{reason} {count}: " in last
    assert aside.second.returncode == 0, aside.say()
    wanted = aside.world.expected()
    for kind in ("listed", "linked"):
        wanted[aside.world.images["unlisted", kind][1]] -= 1
    assert aside.world.tagged() == +wanted
    assert aside.world.rejects() == aside.rejects
    aside.world.verify()


@pytest.mark.s3
def test_an_output_that_fails(s3: Radosgw, proxy: FaultProxy, tmp_path: Path) -> None:
    world = World(s3, tmp_path, [Case("small", "", "", faults.FAILS, "")])
    for case in OUTPUT:
        proxy.clear()
        rule = case.add(proxy)
        done = world.run(proxy.endpoint)
        assert done.returncode == case.code, (case.name, done.stdout + done.stderr)
        assert len(done.stderr.strip().splitlines()[-1]) < 1000
        assert rule.done > 0
        assert not world.tagged() - world.expected()
    proxy.clear()
    done = world.run(proxy.endpoint)
    assert done.returncode == 0, done.stdout + done.stderr
    assert world.tagged() == world.expected()
    assert world.rejects() == PLANTED_REJECTS
    world.verify()


@pytest.mark.s3
@pytest.mark.parametrize("case", START, ids=lambda case: case.name)
def test_a_start_that_fails(s3: Radosgw, proxy: FaultProxy, tmp_path: Path, case: Case) -> None:
    world = World(s3, tmp_path, [])
    proxy.clear()
    if case.name == "no-listing":
        case.add(proxy)
    endpoint = "http://127.0.0.1:9" if case.name == "endpoint" else proxy.endpoint
    env = {"AWS_SECRET_ACCESS_KEY": "wrong"} if case.name == "credentials" else {}
    keys = {"input": "s3://no-such-bucket-here/in"} if case.name == "bucket" else {}
    done = world.run_alone(endpoint, env, **keys)
    assert done.returncode == case.code, done.stdout + done.stderr
    assert list(world.store.list(join(world.root, "out"))) == []


def test_the_page_is_what_is_tested() -> None:
    if os.environ.get("SIGHTLINE_WRITE_DOCS"):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(make_page())
    assert PAGE.read_text() == make_page(), "SIGHTLINE_WRITE_DOCS=1 writes it anew"
