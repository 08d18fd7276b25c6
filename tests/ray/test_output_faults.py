"""`sightline tag` when its output fails, in each object store. `docs/faults.md` has these cases too."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import storage.retry
from storage.store import join
from tests.support.faulty_jobs import FINISHES, LIST_REJECTS, Bucket, Case
from tests.support.stores import fault_proxy as faults
from tests.support.stores.fault_proxy import CutShort, Reset, Rule
from tests.support.stores.service import Service

STATE = r"/out/(plan|ledger|runs)/|/out/manifest"
EVERY_METHOD = "GET|HEAD|PUT|DELETE|LIST|POST"
COMMITTED = r"PUT .*/out/commits/"
ENDS, NO_WORK, ALL_COMMITTED = (
    "ends with an error",
    "ends before any work",
    "ends with an error, all shards are committed",
)
REFUSED = "check the credentials and their permissions"
SAID_OTHERWISE = {"InternalError": "the store answered 500", "SlowDown": "the store answered 503"}
"""What the last line says of Google's and Azure's stores, by what it says of S3."""
SCHEMES = [
    pytest.param("s3", marks=pytest.mark.s3),
    pytest.param("gs", marks=pytest.mark.azure),
    pytest.param("az", marks=pytest.mark.azure),
]

PASSING = [
    Case("state-put", "connection reset, 500, 503 SlowDown, then done, but the response is 500",
         "writing a plan file, a run's marker, a ledger, the manifest", Reset(),
         "writes it again, or finds its own file", key=STATE, rule={"method": "PUT", "each": True},
         more=(faults.FAILS, faults.SLOW_DOWN, faults.DONE_BUT_FAILS)),
    Case("state-get", "connection reset, 500, 503 SlowDown, then a body cut short",
         "reading a plan file, a run's marker, a ledger, the manifest", Reset(), "reads it again", key=STATE,
         rule={"each": True}, more=(faults.FAILS, faults.SLOW_DOWN, CutShort(40))),
]  # fmt: skip

BACK = Case("back", "connection reset, for half a minute in the middle of a run", "the output", Reset(),
            "tries again for about a minute", key="/out/",
            rule={"method": EVERY_METHOD, "times": None, "once": COMMITTED}, clouds=False)  # fmt: skip
LASTING = [
    Case("plan", "500, permanently", "writing the plan", faults.FAILS, ENDS, key="/out/plan/",
         rule={"method": "PUT", "times": None}, code=1, then=FINISHES, says="InternalError", clouds=False),
    Case("plan-get", "500, permanently", "reading the plan", faults.FAILS, NO_WORK, key="/out/plan/",
         rule={"times": None}, code=1, then=FINISHES, says="InternalError", clouds=False),
    Case("plan-403", "403", "reading the plan", faults.FORBIDDEN, NO_WORK, key="/out/plan/",
         rule={"times": None}, code=2, then=FINISHES, says=REFUSED),
    Case("runs", "500, permanently", "writing a run's marker", faults.FAILS, NO_WORK, key="/out/runs/",
         rule={"method": "PUT", "times": None}, code=1, then=FINISHES, says="InternalError", clouds=False),
    Case("runs-get", "503 SlowDown, permanently", "reading a run's marker", faults.SLOW_DOWN, NO_WORK,
         key="/out/runs/", rule={"times": None}, code=1, then=FINISHES, says="SlowDown", clouds=False),
    Case("parts", "503, permanently", "writing a part", faults.SLOW_DOWN, ENDS, key="/out/parts/",
         rule={"method": "PUT", "times": None, "skip": 2}, code=1, then=FINISHES, says="SlowDown"),
    Case("commits", "403", "committing, after the credentials expired", faults.FORBIDDEN, ENDS, key="/out/commits/",
         rule={"method": "PUT", "times": None, "skip": 2}, code=1, then=FINISHES, says=REFUSED),
    Case("expired", "403", "everything, after the credentials expired in the middle of a run", faults.FORBIDDEN, ENDS,
         key="", rule={"method": EVERY_METHOD, "times": None, "once": COMMITTED}, code=1, then=FINISHES, says=REFUSED),
    Case("away", "connection reset, permanently from the middle of a run on", "the output", Reset(), ENDS, key="/out/",
         rule={"method": EVERY_METHOD, "times": None, "once": COMMITTED}, code=1, then=FINISHES, says="broke off"),
    Case("ledger-get", "500, permanently", "reading a ledger", faults.FAILS, NO_WORK, key="/out/ledger/",
         rule={"times": None}, code=1, then=FINISHES, says="InternalError", clouds=False),
    Case("ledger-403", "403", "reading a ledger", faults.FORBIDDEN, NO_WORK, key="/out/ledger/",
         rule={"times": None}, code=2, then=FINISHES, says=REFUSED, clouds=False),
    Case("ledger", "500, permanently", "writing a ledger", faults.FAILS, ALL_COMMITTED, key="/out/ledger/",
         rule={"method": "PUT", "times": None}, code=1, then="writes the ledger", says="InternalError"),
    Case("manifest-get", "500, permanently", "reading the manifest", faults.FAILS, ALL_COMMITTED, key="/out/manifest",
         rule={"times": None}, code=1, then="writes the manifest", says="InternalError", clouds=False),
    Case("manifest", "500, permanently", "writing the manifest", faults.FAILS, ALL_COMMITTED, key="/out/manifest",
         rule={"method": "PUT", "times": None}, code=1, then="writes the manifest", says="InternalError"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made() -> dict[str, Bucket]:
    """The buckets of this module, by the scheme of their store."""
    return {}


@pytest.fixture
def bucket(
    made: dict[str, Bucket], request: pytest.FixtureRequest, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> Bucket:
    """A bucket with an output that a run finished, in the store with the parameter's scheme."""
    if request.param not in made:
        service: Service = request.getfixturevalue(f"{request.param}_service")
        small = Case("small", "", "", faults.FAILS, "")
        made[request.param] = Bucket(service, tmp_path_factory.mktemp("output"), [small])
        finish(made[request.param])
    return made[request.param]


def with_stores(cases: list[Case]) -> pytest.MarkDecorator:
    """Give a test each case with each store that the case is for."""
    pairs = [
        pytest.param(*scheme.values, case, marks=scheme.marks, id=f"{scheme.values[0]}-{case.name}")
        for scheme in SCHEMES
        for case in cases
        if case.clouds or scheme.values == ("s3",)
    ]
    return pytest.mark.parametrize(("bucket", "case"), pairs, indirect=["bucket"])


def prepare(bucket: Bucket, case: Case) -> Rule:
    """Write new inputs, and the marker of a run that was killed. Return the rule of the case."""
    for number in range(3):
        bucket.add_tar(f"{case.name} {number}")
    marker = {"segments": [0], "updated_at": "2026-01-02T03:04:05+00:00"}
    bucket.store.put(join(bucket.root, "out/runs/0123456789abcdef0123456789abcdef.json"), json.dumps(marker).encode())
    bucket.service.proxy.clear()
    return case.add(bucket.service.proxy)


def finish(bucket: Bucket) -> None:
    """Run the job without faults, and check its output."""
    bucket.service.proxy.clear()
    done = bucket.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert bucket.tagged() == bucket.expected()
    assert bucket.rejects() == LIST_REJECTS
    bucket.verify()


@with_stores(PASSING)
def test_a_passing_fault_of_the_output_costs_nothing(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    monkeypatch.setattr(storage.retry, "PAUSE_SECONDS", 0.02)  # most of these requests are this process's
    prepare(bucket, case)
    done = bucket.run()
    assert done.returncode == case.code, done.stdout + done.stderr
    for rule in bucket.service.proxy.rules:
        assert {key.split("/out/")[1][:4] for key in rule.matched} == {"plan", "runs", "ledg", "mani"}
    finish(bucket)


@with_stores([BACK])
def test_an_output_that_is_away_for_half_a_minute_costs_only_time(bucket: Bucket, case: Case) -> None:
    rule = prepare(bucket, case)

    def come_back() -> None:
        end = time.monotonic() + 300
        while not rule.done and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(25)
        rule.stop()

    with ThreadPoolExecutor(1) as pool:
        back = pool.submit(come_back)
        done = bucket.run()
        back.result()
    assert done.returncode == case.code, done.stdout + done.stderr
    finish(bucket)


@with_stores(LASTING)
def test_a_run_whose_output_fails_is_finished_by_the_next(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    monkeypatch.setattr(storage.retry, "PAUSE_SECONDS", 0.02)  # of this process, not of the workers
    rule = prepare(bucket, case)
    done = bucket.run()
    assert done.returncode == case.code, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    says = case.says if bucket.service.scheme == "s3" else SAID_OTHERWISE.get(case.says, case.says)
    assert says in last, done.stderr
    assert len(last) < 1000
    assert rule.done > 0
    bucket.service.proxy.clear()
    assert bucket.count_duplicates() == 0
    finish(bucket)
