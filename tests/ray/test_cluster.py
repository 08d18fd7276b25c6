"""A job on a cluster of several nodes: a head without tasks, nodes that decode and nodes that embed. Nodes fail and
join.

Each node is a real `ray start`. Its GPUs are only numbers: a task with a GPU runs on the CPU.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.dataset

from pipelines.output.output import Output
from pipelines.upkeep.verify import verify_output
from sightline.demo.dataset import CONFIG, encode_image
from sightline.demo.shapes import LABELS
from tests.support.ray_cluster import SIGHTLINE, Node, RayCluster
from tests.support.workers import read_titles

TARS, PER_TAR = 20, 50


def make_tars(folder: Path, tars: int = TARS) -> set[str]:
    """Write tars of rendered shapes. The first image of each tar is broken. Returns the keys of all images."""
    rng = random.Random(4)
    images = [encode_image(rng, label) for label in LABELS]
    folder.mkdir()
    for number in range(tars):
        with tarfile.open(folder / f"{number:02}.tar", "w") as tar:
            for index in range(PER_TAR):
                data = images[rng.randrange(len(images))] if index else b"no image"
                member = tarfile.TarInfo(f"{number:02}-{index:02}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return {f"{number:02}-{index:02}" for number in range(tars) for index in range(PER_TAR)}


def is_running(node: Node, name: str) -> bool:
    """Whether a process of the node runs a task or an actor of this name now.

    Ray sets process titles to these names.
    """
    return any(name in title for _, title in read_titles(node.processes()))


def test_a_job_survives_nodes_that_fail_and_uses_nodes_that_join(ray_cluster: RayCluster, tmp_path: Path) -> None:
    keys = make_tars(tmp_path / "input")
    output = tmp_path / "output"
    readers, actors = ray_cluster.named("readers"), ray_cluster.named("actors")
    settings = ["rows_per_shard=50", "actors.num_gpus=1", "actors.num_cpus=1", "actors.max=2", "max_reject_fraction=1"]
    settings += ["model.device=cpu"]  # the GPUs are only numbers
    driver = ray_cluster.start(
        *(SIGHTLINE, "tag", str(CONFIG), "--input", str(tmp_path / "input"), "--output", str(output)),
        *(word for setting in settings for word in ("--set", setting)),
    )
    seen: set[str] = set()

    def until(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert driver.poll() is None, f"ended before {what}: {driver.communicate()[0]}"
            assert time.monotonic() < deadline, f"not within 300 s: {what}"
            seen.update(
                node.name for node in (readers, actors) if node in ray_cluster.nodes and is_running(node, "read_shard")
            )
            time.sleep(0.05)

    def committed() -> int:
        return len(list(output.glob("commits/*.json")))

    try:
        until(lambda: is_running(actors, "Tagger"), "an actor on the GPU node")
        until(lambda: committed() >= 2, "two commits")
        assert not is_running(readers, "MapWorker(MapBatches(Tagger")
        assert seen == {"readers"}  # the actor occupies the only core of the GPU node
        ray_cluster.kill(readers)
        others = ray_cluster.add_worker("readers", 2)
        until(lambda: is_running(others, "read_shard"), "a reader on the node that joined")
        replacement = ray_cluster.add_worker("actors", 1, gpus=1)
        ray_cluster.kill(actors)
        until(lambda: is_running(replacement, "Tagger"), "an actor on the GPU node that joined")
        before = committed()
        said = driver.communicate(timeout=240)[0]
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    assert before < TARS
    report = verify_output(Output(str(output)))
    assert report.ok, report.problems
    assert (report.rows_in, report.rows_tagged, report.rows_rejected) == (len(keys), len(keys) - TARS, TARS)
    found = [
        key
        for kind in ("data", "rejects")
        for key in pyarrow.dataset.dataset(output / kind).to_table(columns=["key"])["key"].to_pylist()
    ]
    assert sorted(found) == sorted(keys)
    assert len(json.loads((output / "manifest.json").read_text())["run"]["actors"]) >= 1


def test_a_gpu_that_does_not_work_is_refused_before_any_work(ray_cluster: RayCluster, tmp_path: Path) -> None:
    make_tars(tmp_path / "input", 1)
    output = tmp_path / "output"
    command = [SIGHTLINE, "tag", str(CONFIG), "--input", str(tmp_path / "input"), "--output", str(output)]
    driver = ray_cluster.start(*command, "--set", "actors.num_gpus=1")
    said = driver.communicate(timeout=120)[0]
    assert driver.returncode == 2, said
    assert "num_gpus: 1: CUDA does not work here" in said.strip().splitlines()[-1]
    assert not list(output.glob("commits/*"))
