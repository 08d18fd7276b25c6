"""`sightline tag` with every fault that an object store has. `docs/faults.md` is generated from these cases."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from storage.store import join
from tests.ray.test_output_faults import BACK, SCHEMES
from tests.ray.test_output_faults import LASTING as OUTPUT_LASTING
from tests.ray.test_output_faults import PASSING as OUTPUT_PASSING
from tests.support.faulty_jobs import IMAGES, LIST_REJECTS, PLANNED, Bucket, Case, Runs, run_twice
from tests.support.stores import fault_proxy as faults
from tests.support.stores.fault_proxy import CutShort, Do, Reset, Silence, Trickle
from tests.support.stores.service import Service

PAGE = Path(__file__).parents[2] / "docs/faults.md"
ANY_INPUT = "any input"
RETRIED = "resumes the body where it ended"

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
         waits=("b.parquet", "c"), reason="forbidden", code=1, then="tags the shard", clouds=False),
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

START = [
    Case("credentials", "wrong credentials", "at the start", faults.FORBIDDEN, "ends before any work", code=2,
         then="works with the right credentials", clouds=False),
    Case("bucket", "no such bucket", "at the start", faults.ABSENT, "ends before any work", code=2,
         then="works when the bucket exists"),
    Case("endpoint", "no server at the endpoint", "at the start", Reset(), "ends before any work", code=1,
         then="works when the server is there"),
    Case("no-listing", "500, permanently", "a listing of the input", faults.FAILS, "ends before any work",
         key="/in/", rule={"method": "LIST", "times": None}, code=1, then="works", clouds=False),
]  # fmt: skip


def make_page() -> str:
    """Return the text of `docs/faults.md`."""
    lines = [
        "# Faults of the object store, and what a run does",
        "",
        "`tests/ray/test_faults.py` and `test_output_faults.py` run `sightline tag` with each of these faults, which a",
        "proxy in front of an object store injects: a real S3 server (`s3`), a stand-in for Google Cloud Storage",
        "(`gs`) and Azurite, Microsoft's emulator of Azure Blob Storage (`az`). The tests check this page. They also",
        "check that no image is lost or tagged twice, that no image is rejected because of the store, and that",
        "`sightline verify` finds no problem afterwards.",
        "",
        "Each operation has 5 attempts, with pauses of about 8 s in total. On an output whose store has answered once,",
        "it has 8 attempts, with pauses of about a minute. An attempt ends after 10 s without a connection, after 20 s",
        "without data, or if less than 10 kB/s arrive over 20 s. A body that breaks off is resumed where it ended, if",
        "the object still has the same ETag.",
        "",
        "In `gs://` and `az://` a body that breaks off is asked for again from its beginning, and a slow one is ended",
        "after 10 minutes. Azure gives an object that is written again another ETag: there an old object never comes",
        "back.",
        "",
        "| fault | where | what the run does | exit code | the next run | stores |",
        "|---|---|---|---|---|---|",
        *[case.row() for case in (*PASSING, *OUTPUT_PASSING, BACK, *LASTING, *OUTPUT_LASTING, *START)],
        "",
        "A run that leaves shards for the next run finishes all others. Its last lines say how many shards wait, about",
        "how many images they contain, and for which reasons, with an example for each reason.",
        "",
        "A full disk ends a run with exit code 1 and one line, whichever file is written; the same command finishes",
        "when there is space (`tests/ray/test_full_disk.py`). A clock that is set by days changes the times that are",
        "told, and nothing else (`tests/ray/test_clock.py`). `python -m benchmarks.kills` kills the processes of runs,",
        "retries and compactions at random moments, and counts what was lost or doubled.",
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module", params=SCHEMES)
def service(request: pytest.FixtureRequest, local_ray: None) -> Service:
    found: Service = request.getfixturevalue(f"{request.param}_service")
    return found


@pytest.fixture(scope="module")
def passing(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_twice(Bucket(service, tmp_path_factory.mktemp("passing"), PASSING), on_missing="reject")


def test_a_passing_fault_costs_no_image(passing: Runs) -> None:
    gone = {("given-up", "a.tar"), ("given-up", "c")}
    assert {name: count > 0 for name, count in passing.done.items()} == {case.name: True for case in PASSING}
    for (name, kind), digests in passing.bucket.images.items():
        if (name, kind) not in gone:
            assert [passing.tagged[digest] for digest in digests] == [1] * IMAGES, (name, kind, passing.printed())


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
def lasting(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    cases = [case for case in LASTING if case.clouds or service.scheme == "s3"]
    return run_twice(Bucket(service, tmp_path_factory.mktemp("lasting"), cases))


def test_a_lasting_fault_costs_only_its_own_shards(lasting: Runs) -> None:
    cases = {case.name: case for case in lasting.bucket.cases}
    assert {name: count > 0 for name, count in lasting.done.items()} == dict.fromkeys(cases, True)
    for (name, kind), digests in lasting.bucket.images.items():
        waiting = {place.removesuffix(" unplanned") for place in cases[name].waits}
        there = [lasting.tagged[digest] for digest in digests]
        wanted = 0 if kind in waiting else 1
        rejected = 1 if name == "unlisted" and kind in ("listed", "linked") else None
        assert there == [0 if n == rejected else wanted for n in range(IMAGES)], (name, kind, lasting.printed())


def test_a_run_with_waiting_shards_says_why_and_the_next_run_tags_them(lasting: Runs) -> None:
    assert lasting.first.returncode == 1, lasting.printed()
    unlisted = Counter([(f"{lasting.bucket.root}/listed/unlisted/1.jpg", "missing"), ("1", "missing")])
    assert lasting.rejects == LIST_REJECTS + unlisted
    cases = lasting.bucket.cases
    shards = Counter(case.reason for case in cases for _ in case.waits)
    images = sum(1 if "unplanned" in place else IMAGES for case in cases for place in case.waits)
    last = " ".join(lasting.first.stderr.split())
    said = re.search(r"waiting: (\d+) shards and (\d+) inputs, with about (\d+) images", last)
    assert said is not None, lasting.printed()
    assert (int(said[1]) + int(said[2]), int(said[3])) == (shards.total(), images)
    for reason, count in shards.items():
        assert f"{reason} {count}: " in last
    assert lasting.second.returncode == 0, lasting.printed()
    wanted = lasting.bucket.expected()
    for kind in ("listed", "linked"):
        wanted[lasting.bucket.images["unlisted", kind][1]] -= 1
    assert lasting.bucket.tagged() == +wanted
    # Azure's objects did not come back: new versions are tagged, and a row says of each old one that it has changed.
    old = ["a.tar", "b.parquet", "c1.jpg"] if lasting.bucket.service.scheme == "az" else []
    assert lasting.bucket.rejects() == lasting.rejects + Counter((f"changed/{name}", "changed") for name in old)
    lasting.bucket.verify()


@pytest.mark.parametrize(
    ("scheme", "case"),
    [
        pytest.param(*scheme.values, case, marks=scheme.marks, id=f"{scheme.values[0]}-{case.name}")
        for scheme in SCHEMES
        for case in START
        if case.clouds or scheme.values == ("s3",)
    ],
)
def test_a_failed_start_writes_nothing(
    scheme: str, request: pytest.FixtureRequest, local_ray: None, tmp_path: Path, case: Case
) -> None:
    service: Service = request.getfixturevalue(f"{scheme}_service")
    bucket = Bucket(service, tmp_path, [])
    service.proxy.clear()
    if case.name == "no-listing":
        case.add(service.proxy)
    env = service.make_env("http://127.0.0.1:9") if case.name == "endpoint" else {}
    if case.name == "credentials":
        env = {"AWS_SECRET_ACCESS_KEY": "wrong"}
    keys = {"input": f"{scheme}://no-such-bucket-here/in"} if case.name == "bucket" else {}
    done = bucket.run_alone(env, **keys)
    assert done.returncode == case.code, done.stdout + done.stderr
    assert list(bucket.store.list(join(bucket.root, "out"))) == []


def test_the_page_lists_the_tested_faults() -> None:
    if os.environ.get("SIGHTLINE_WRITE_DOCS"):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(make_page())
    assert PAGE.read_text() == make_page(), "SIGHTLINE_WRITE_DOCS=1 writes the page"
