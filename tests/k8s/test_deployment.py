"""The rendered entrypoints and Serve settings, run on a Ray cluster with a real S3 server.

An entrypoint is started as on Kubernetes: KubeRay's submitter inserts it into a shell script, the script submits it to
Ray's job service, and the job service starts it on the head. The config maps are files in a folder. Only the parameters
that k8s/README.md names differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.admission.auth import new_key
from siglip.checkpoints.files import TINY
from storage.schemes import open_store
from storage.store import StoreOptions
from tests.k8s.support.promtool import check_queries
from tests.k8s.support.schemas import ROOT, find_kubectl, render
from tests.ray.test_cluster import PER_TAR, make_tars
from tests.support.endpoint import data_uri, shape_png
from tests.support.ports import free_port
from tests.support.ray_cluster import SIGHTLINE, RayCluster
from tests.support.stores.radosgw import Radosgw

MOUNT = "/etc/sightline"
TARS = 6

pytestmark = [
    pytest.mark.s3,
    pytest.mark.skipif(not find_kubectl() and not os.environ.get("SIGHTLINE_CI"), reason="kubectl is not installed"),
]


class Bucket:
    """A bucket with tars of images and a copy of the tiny checkpoint."""

    def __init__(self, server: Radosgw, folder: Path) -> None:
        name, client = server.new_bucket(), server.client()
        self.uri = f"s3://{name}"
        make_tars(folder / "images", TARS)
        for prefix, source in (("images", folder / "images"), ("model", TINY)):
            for path in source.iterdir():
                client.put_object(Bucket=name, Key=f"{prefix}/{path.name}", Body=path.read_bytes())


@pytest.fixture(scope="module")
def bucket(s3: Radosgw, tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    return Bucket(s3, tmp_path_factory.mktemp("bucket"))


class Job:
    """A rendered RayJob spec with its config maps in a folder, and with parameters for this machine."""

    def __init__(self, overlay: str, folder: Path, **parameters: str) -> None:
        objects = render(ROOT / "k8s/overlays" / overlay)
        maps = {t["metadata"]["name"]: t["data"] for t in objects if t["kind"] == "ConfigMap"}
        (ray,) = (obj for obj in objects if obj["kind"] == "RayCronJob")
        self.spec = ray["spec"]["jobTemplate"]
        self.folder = folder
        head = self.spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        (volume,) = head["volumes"]
        sources = volume["projected"]["sources"] if "projected" in volume else [volume]
        for source in sources:
            for name, content in maps[source["configMap"]["name"]].items():
                (folder / name).write_text(content)
        for name in ("nightly.yaml", "labelling.yaml"):  # this cluster's GPUs are only logical
            text = (folder / name).read_text()
            assert "\nmodel:\n" in text
            (folder / name).write_text(text.replace("\nmodel:\n", "\nmodel:\n  device: cpu\n"))
        assert head["containers"][0]["volumeMounts"][0]["mountPath"] == MOUNT
        submitter = self.spec["submitterPodTemplate"]["spec"]["containers"][0]
        self.env = {}
        for source in submitter["envFrom"]:
            self.env.update(maps[source["configMapRef"]["name"]])
        assert set(parameters) <= set(self.env)
        self.env.update(parameters)
        (self.hook,) = head["containers"][0]["lifecycle"].values()

    def submit(self, cluster: RayCluster) -> subprocess.Popen[str]:
        """Start the submitter's script."""
        self.id = f"job-{uuid.uuid4().hex[:8]}"
        entrypoint, ray = self.spec["entrypoint"].replace(MOUNT, str(self.folder)), f"--address {cluster.dashboard}"
        script = (
            f"if ! ray job status {ray} {self.id} >/dev/null 2>&1 ; "
            f"then ray job submit {ray} --no-wait --submission-id {self.id} -- {entrypoint} ; fi ; "
            f"ray job logs {ray} --follow {self.id}"
        )
        return cluster.start("/bin/bash", "-ce", "--", script, **self.env)

    def end(self, cluster: RayCluster, timeout: float = 180) -> dict[str, Any]:
        """Wait until the job has ended, and return Ray's description of it."""
        deadline = time.monotonic() + timeout
        while True:
            job: dict[str, Any] = cluster.ask(f"/api/jobs/{self.id}")
            if job["status"] in ("SUCCEEDED", "FAILED", "STOPPED"):
                return job
            assert time.monotonic() < deadline, job
            time.sleep(0.2)

    def run_hook(self) -> None:
        """Run the head pod's preStop hook."""
        command = [word.replace(MOUNT, str(self.folder)) for word in self.hook["exec"]["command"]]
        subprocess.run(command, check=True, timeout=60)


def list_alert_metrics(prefix: str) -> set[str]:
    """Return the metrics with this prefix that k8s/alerts.yaml uses."""
    return set(re.findall(rf"\b{prefix}\w+", (ROOT / "k8s/alerts.yaml").read_text()))


def verify(uri: str, env: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [SIGHTLINE, "verify", uri, "--json"], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_next_nightly_run_finishes_one_whose_head_was_drained(
    ray_cluster: RayCluster, s3: Radosgw, bucket: Bucket, tmp_path: Path
) -> None:
    output = f"{bucket.uri}/tags"
    parameters = {"INPUT": f"{bucket.uri}/images", "OUTPUT": output, "MODEL": f"{bucket.uri}/model"}
    job = Job("gpu", tmp_path, **parameters, ACTORS_MAX="1")
    submitter = job.submit(ray_cluster)
    assert submitter.stdout
    printed = ""
    for line in submitter.stdout:
        printed += line
        if "shards to do" in line:
            break
    assert "shards to do" in printed, printed
    started = time.monotonic()
    job.run_hook()
    ended = job.end(ray_cluster, 30)
    grace = job.spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert time.monotonic() - started < grace
    printed += submitter.communicate(timeout=60)[0]
    assert (ended["status"], ended["driver_exit_code"]) == ("FAILED", 143), printed
    # The submitter does not fail with its driver: its Job's retries are only for submitting and following.
    assert submitter.returncode == 0, printed
    # The launcher reads the exit code from this message, which KubeRay copies.
    assert ended["message"].startswith("Job entrypoint command failed with exit code 143, ")
    assert "terminated: what is committed stays" in printed
    submitter = job.submit(ray_cluster)
    exported: set[str] = set()
    while submitter.poll() is None:
        exported |= set(re.findall(r"^(\w+)[ {]", ray_cluster.named("head").metrics(), re.MULTILINE))
        time.sleep(0.2)
    printed = submitter.communicate(timeout=240)[0]
    ended = job.end(ray_cluster)
    # The first image of each tar is broken. That is one in fifty, as many as nightly.yaml allows.
    assert ended["status"] == "SUCCEEDED", printed
    report = verify(output, s3.env)
    assert report["ok"], report
    assert (report["rows_in"], report["rows_rejected"]) == (TARS * PER_TAR, TARS)
    assert list_alert_metrics("ray_sightline_run_") <= exported


def test_a_labelling_run_uses_its_own_labels(
    ray_cluster: RayCluster, s3_env: Radosgw, bucket: Bucket, tmp_path: Path
) -> None:
    output = f"{bucket.uri}/labelled"
    parameters = {"INPUT": f"{bucket.uri}/images/00.tar", "OUTPUT": output, "MODEL": f"{bucket.uri}/model"}
    job = Job("labelling-cpu", tmp_path, **parameters, ACTORS_NUM_CPUS="1", ACTORS_MAX="1")
    (tmp_path / "labels.yaml").write_text("names: [red circle, blue star]\ntop_k: 1\n")
    printed = job.submit(ray_cluster).communicate(timeout=240)[0]
    ended = job.end(ray_cluster)
    assert ended["status"] == "SUCCEEDED", printed
    report = verify(output, s3_env.env)
    assert report["ok"], report
    fingerprint = json.loads(
        open_store(output, StoreOptions(s3_env.endpoint, "us-east-1")).read(f"{output}/fingerprint.json")
    )
    assert fingerprint["labels.names"] == ["red circle", "blue star"]
    assert fingerprint["thumbnails"] == 256


@pytest.mark.parametrize("overlay", ["gpu", "cpu"])
def test_the_endpoint_runs_from_its_serve_settings(
    ray_cluster: RayCluster, bucket: Bucket, tmp_path: Path, overlay: str
) -> None:
    (service,) = (t for t in render(ROOT / "k8s/overlays" / overlay) if t["kind"] == "RayService")
    settings = yaml.safe_load(service["spec"]["serveConfigV2"])
    key, line = new_key("shop")
    (tmp_path / "keys").write_text(line + "\n")
    port = free_port()
    settings["http_options"] = {"host": "127.0.0.1", "port": port}
    settings["proxy_location"] = "HeadOnly"  # here several nodes share one address and therefore one port
    arguments = settings["applications"][0]["args"]
    arguments["model"] = {"source": f"{bucket.uri}/model", "device": "cpu"}
    arguments["replicas"] |= {"num_cpus": 0.25, "min": 1, "max": 1}
    arguments["ingress"] |= {"num_cpus": 0.25, "min": 1, "max": 1, "decoders": 1}
    arguments["auth"]["keys_file"] = str(tmp_path / "keys")
    arguments["label_sets"] = {"shapes": {"names": ["red circle", "blue star"]}}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(settings))
    try:
        done = ray_cluster.run("serve", "deploy", "--address", ray_cluster.dashboard, str(tmp_path / "serve.yaml"))
        assert done.returncode == 0, done.stderr
        deadline = time.monotonic() + 180
        while True:
            state = ray_cluster.ask("/api/serve/applications/")["applications"].get("sightline", {})
            if state.get("status") == "RUNNING":
                break
            assert state.get("status") != "DEPLOY_FAILED", state["message"]
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        url = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(f"{url}/readyz", timeout=60) as response:  # the readiness probe's path
            assert response.status == 200
        body = json.dumps({"image": data_uri(shape_png("red circle")), "label_set": "shapes"}).encode()
        request = urllib.request.Request(f"{url}/v1/classify", body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request, timeout=60)
        request.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=60) as response:
            result = json.load(response)
        assert "red circle" in json.dumps(result)
        if overlay == "cpu":
            check_an_update(ray_cluster, settings, tmp_path / "serve.yaml", request)
        replicas = state["deployments"]["model"]["replicas"]
        gpus = [n["node_id"] for n in ray_cluster.alive() if n["resources_total"].get("GPU")]
        assert overlay == "cpu" or {replica["node_id"] for replica in replicas} <= set(gpus)
        check_queries(tmp_path, scrape(ray_cluster, request), absent="ray_sightline_dropped_total")
    finally:
        ray_cluster.run("serve", "shutdown", "--yes", "--address", ray_cluster.dashboard)


def scrape(cluster: RayCluster, request: urllib.request.Request) -> list[str]:
    """Return the text of the nodes' exporters at four times, while a client sends several kinds of requests."""
    assert isinstance(request.data, bytes)
    image = json.loads(request.data)["image"]
    requests: list[tuple[str, dict[str, Any], int]] = [
        ("classify", {"image": image, "label_set": "shapes"}, 200),
        ("classify", {"image": "data:image/png;base64,bm8gaW1hZ2U=", "label_set": "shapes"}, 400),
        ("embeddings", {"model": "model", "input": "a text"}, 200),
    ]
    scrapes = []
    for number in range(4):
        new = {"image": image, "labels": [f"label {number}", "another"]}
        for path, body, status in [*requests, ("classify", new, 200)]:
            url = request.full_url.rpartition("/")[0] + f"/{path}"
            again = urllib.request.Request(url, json.dumps(body).encode(), dict(request.headers))
            try:
                with urllib.request.urlopen(again, timeout=60) as response:
                    found = response.status
            except urllib.error.HTTPError as error:
                found = error.code
            assert found == status, (path, body)
        time.sleep(2)
        scrapes.append("\n".join(node.metrics() for node in cluster.nodes))
    return scrapes


def check_an_update(cluster: RayCluster, settings: dict[str, Any], path: Path, request: urllib.request.Request) -> None:
    """Change the settings, which replaces the only replica of each deployment. No request fails meanwhile."""
    settings["applications"][0]["args"]["label_sets"]["more"] = {"names": ["red circle", "green square"]}
    path.write_text(yaml.safe_dump(settings))
    body = {**json.loads(request.data), "label_set": "more"} if isinstance(request.data, bytes) else {}
    # `header_items` would include the Content-Length that sending the request has added.
    new = urllib.request.Request(request.full_url, json.dumps(body).encode(), dict(request.headers))
    done = cluster.run("serve", "deploy", "--address", cluster.dashboard, str(path))
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 180
    count = 0
    while True:
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.status == 200
        count += 1
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(new, timeout=60) as response:
            assert b"green square" in response.read()
            break
        if time.monotonic() > deadline:
            raise AssertionError(cluster.ask("/api/serve/applications/")["applications"]["sightline"])
        time.sleep(0.05)
    assert count > 5


def test_ray_refuses_clients_without_its_token(ray_cluster: RayCluster) -> None:
    for path in ("/api/v0/nodes", "/api/jobs/", "/api/serve/applications/"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{ray_cluster.dashboard}{path}", timeout=10)
    done = ray_cluster.run(
        *("python", "-c", "import ray; ray.init(log_to_driver=False)"), RAY_AUTH_MODE="disabled", timeout=120
    )
    assert done.returncode != 0
    assert re.search("[Uu]nauthenticated|token", done.stderr)
