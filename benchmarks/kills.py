"""Kills a batch job at random moments, many times, and checks after each recovery that each image is there once.

    python -m benchmarks.kills --kills 100 --seed 0
    python -m benchmarks.kills --kills 100 --seed 0 --s3

A job tags a few hundred tiny images in many shards, on a disk or on the S3 server of the tests. Its driver, some of its
Ray workers, or both get SIGKILL: at a random time, or just before, during or just after a certain write or delete of
the driver, so that planning, sealing and finishing are hit often. So are retries of rejected rows and compactions.
Sometimes two commands work at the same time. After a few kills the commands are run again until they end with 0. Then
`sightline verify` must find no problem, and each image must be there once, by the ledgers and in the folder `data/`.

All runs share one Ray, so that they need not start it. The last line is the result. The exit code is 1 if anything was
lost or doubled, or if a run ended with 0 although something was missing.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.killed_job import AIMS, Aim, Job, Tally
from pipelines.upkeep.verify import verify_output
from tests.support.ray_cluster import RayCluster
from tests.support.stores.radosgw import Radosgw
from tests.support.workers import choose_workers

EPISODES = 6
"""Episodes with one output. Each brings new images, some kills, and a recovery."""
LONGEST = 300.0
"""Seconds after which a command is taken to hang."""


def kill_workers(cluster: RayCluster, rng: random.Random) -> int:
    """Kill some of the processes that run a task or an actor, and return how many."""
    below = [process for node in cluster.nodes for process in node.processes()]
    workers = [process for process in choose_workers(below) if not process.name().startswith("ray::IDLE")]
    chosen = rng.sample(workers, rng.randint(1, len(workers))) if workers else []
    for process in chosen:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return len(chosen)


def disturb(job: Job, cluster: RayCluster, rng: random.Random, tally: Tally, usual: dict[str, float]) -> list[str]:
    """Start a command, sometimes a second one, and kill at least one of them or its workers. Return their names."""
    name = rng.choices(["tag", "retry", "compact"], [5, 3, 2])[0]
    kind = "driver" if name == "compact" else rng.choices(["driver", "workers", "both"], [6, 2, 2])[0]
    aim = None
    if kind == "driver" and rng.random() < 0.6:
        pattern = rng.choice(AIMS[name])
        aim = Aim(pattern, rng.randint(0, 12) if pattern == "delete " else 0, rng.choice(["before", "during", "after"]))
    names = [name, *([rng.choice(["tag", "retry", "compact"])] if rng.random() < 0.2 else [])]
    running = [job.start(name, aim), *(job.start(other) for other in names[1:])]
    began = time.monotonic()
    wait = LONGEST if aim else rng.uniform(0, 1.1) * usual.get(name, 15.0)
    killed = 0
    while running[0].is_alive() and time.monotonic() - began < wait:
        time.sleep(0.02)
    if kind in ("workers", "both") and running[0].is_alive():
        killed = kill_workers(cluster, rng)
    if kind in ("driver", "both"):
        running[0].kill()
    if len(running) > 1 and rng.random() < 0.3:
        time.sleep(rng.uniform(0, 2))
        running[1].kill()
    for process, command in zip(running, names, strict=True):
        finish(process, command, tally)
    tally.kills[f"{kind} of {name}"] += int(running[0].exitcode == -signal.SIGKILL or killed > 0)
    tally.kills[f"second, {names[-1]}"] += int(len(running) > 1 and running[1].exitcode == -signal.SIGKILL)
    print(f"{kind} of {'+'.join(names)} {aim or f'{wait:.1f} s'}: {[p.exitcode for p in running]}", flush=True)
    return names


def finish(process: Any, name: str, tally: Tally) -> int:
    """Wait for a command, and return its exit code."""
    process.join(LONGEST)
    if process.exitcode is None:
        process.kill()
        process.join()
        tally.note(f"{name} did not end in {LONGEST:.0f} s")
    tally.runs[f"{name} {process.exitcode}"] += 1
    return int(process.exitcode)


def recover(job: Job, names: set[str], tally: Tally, usual: dict[str, float], story: str) -> None:
    """Run the commands again until they end with 0, and check the output."""
    retried = "retry" in names
    for name in ["retry" if retried else "tag", *(["compact"] if "compact" in names else [])]:
        for _ in range(3):
            began = time.monotonic()
            code = finish(job.start(name), name, tally)
            if code == 0:
                usual[name] = max(0.8 * usual.get(name, 0.0), time.monotonic() - began)
                break
            tally.note(f"{story}: {name} ended with {code}")
    report = verify_output(job.output)
    if report.orphans:  # merged files of a killed compaction stay for a day, because they may be of one under way
        merged = sum("/merged-" in problem for problem in report.problems)
        tally.leftovers["merged"] += merged
        tally.leftovers["others"] += report.orphans - merged
        if report.orphans > merged:
            tally.note(f"{story}: leftovers: {report.problems}")
        verify_output(job.output, remove_orphans=True)
    job.check(story, tally, retried=retried)


@contextmanager
def place(s3: bool, folder: Path) -> Iterator[tuple[Callable[[], str], dict[str, str]]]:
    """Yield a function that returns a new root for an output and its inputs, and the environment that it needs."""
    if not s3:
        yield lambda: tempfile.mkdtemp(dir=folder), {}
        return
    server = Radosgw(folder / "radosgw")
    try:
        yield lambda: f"s3://{server.new_bucket()}", server.env
    finally:
        server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true", help="on the S3 server of the tests; needs its packages")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave it")
    options = parser.parse_args()
    rng, tally, usual = random.Random(options.seed), Tally(), dict[str, float]()
    with tempfile.TemporaryDirectory() as temporary, place(options.s3, options.keep or Path(temporary)) as (root, env):
        os.environ.update(env)
        with RayCluster(env) as cluster:
            cluster.add_worker("work", 8)
            # Before the first command, because Ray reads the token when it is imported.
            os.environ.update({name: cluster.env[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})
            os.environ["RAY_ADDRESS"] = cluster.address
            episode = 0
            with suppress(KeyboardInterrupt):  # the result is that until then
                while tally.kills.total() < options.kills:
                    if episode % EPISODES == 0:
                        job = Job(root(), Path(tempfile.mkdtemp(dir=options.keep or temporary)), rng)
                    episode += 1
                    job.images.grow()
                    names: set[str] = set()
                    for _ in range(rng.randint(1, 4)):
                        names.update(disturb(job, cluster, rng, tally, usual))
                    recover(job, names, tally, usual, f"episode {episode} ({job.log})")
                    print(
                        f"{tally.kills.total()} kills, {tally.runs.total()} runs, {len(tally.problems)} problems",
                        flush=True,
                    )
    print(f"kills {dict(tally.kills)}; runs {dict(tally.runs)}; leftovers {dict(tally.leftovers)}")
    print(
        f"{tally.kills.total()} kills, {tally.runs.total()} runs, {tally.checks} checks, {tally.lost} lost, "
        f"{tally.doubled} doubled, {tally.premature} runs that ended with 0 although something was missing or wrong"
    )
    return int(bool(tally.problems))


if __name__ == "__main__":
    sys.exit(main())
