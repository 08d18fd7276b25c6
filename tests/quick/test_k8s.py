"""The manifests: what `kubectl apply -k` would apply is valid, restricted, and fits together."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

from serve.config import EndpointConfig
from serve.proxy import CALLBACK, CALLBACK_PATH
from tests.kubernetes import COMPACT, ROOT, check, compact, find_kubectl, pods, render

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
FREE = {"annotations", "labels", "matchLabels", "data", "limits", "requests", "rayStartParams", "nodeSelector"}
"""Fields whose keys are anybody's: a typo in them is another name."""

pytestmark = pytest.mark.skipif(
    not find_kubectl() and not os.environ.get("SIGHTLINE_CI"), reason="kubectl is not installed"
)


@pytest.fixture(scope="module")
def overlays() -> dict[str, list[dict[str, Any]]]:
    """Every overlay, rendered."""
    return {name: render(K8S / "overlays" / name) for name in OVERLAYS}


def of_kind(things: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [thing for thing in things if thing["kind"] == kind]


def the(things: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = of_kind(things, kind)
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_is_valid(overlays: dict[str, list[dict[str, Any]]], name: str) -> None:
    for thing in overlays[name]:
        check(thing)
        assert thing["kind"] == "Namespace" or thing["metadata"]["namespace"] == "sightline"


def test_kuberays_schemas_are_those_of_its_release() -> None:
    committed = json.loads(COMPACT.read_text())
    assert set(committed) == {"RayCluster", "RayCronJob", "RayJob", "RayService"}
    if folder := os.environ.get("KUBERAY_SCHEMAS"):
        assert committed == compact(Path(folder))


def is_valid(thing: dict[str, Any]) -> bool:
    try:
        check(thing)
    except ValidationError:
        return False
    return True


def keys_of(thing: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all keys that mean something to an API server."""
    if isinstance(thing, list):
        for number, item in enumerate(thing):
            yield from keys_of(item, (*path, number))
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield (*path, key)
            if key not in FREE:
                yield from keys_of(value, (*path, key))


@pytest.mark.parametrize("name", ["gpu", "labelling-gpu"])
def test_a_typo_in_any_key_is_refused(
    overlays: dict[str, list[dict[str, Any]]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERAY_SCHEMAS", raising=False)  # the whole CRDs are checked above, and are slow
    count = 0
    for thing in overlays[name]:
        for path in keys_of(thing):
            broken = copy.deepcopy(thing)
            place = broken
            for step in path[:-1]:
                place = place[step]
            if path[0] in ("apiVersion", "kind"):
                continue
            place[path[-1] + "x"] = place.pop(path[-1])
            assert not is_valid(broken), f"{thing['kind']} {thing['metadata']['name']}: a typo in {path} is let pass"
            count += 1
    assert count > 100


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("upgradeStrategy.type", 1),
        ("rayClusterConfig.workerGroupSpecs.0.minReplicas", "1"),
        ("rayClusterConfig.workerGroupSpecs.0.groupName", None),
        ("rayClusterConfig.autoscalerOptions.version", "v3"),
        ("rayClusterConfig.authOptions.mode", "tokens"),
        ("rayClusterConfig.headGroupSpec.template.spec.containers.0.ports.0.containerPort", "http"),
    ],
)
def test_a_wrong_value_is_refused(overlays: dict[str, list[dict[str, Any]]], path: str, value: Any) -> None:
    broken = copy.deepcopy(the(overlays["gpu"], "RayService"))
    place: Any = broken["spec"]
    *steps, last = path.split(".")
    for step in steps:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    with pytest.raises(ValidationError):
        check(broken)


def test_patches_are_json6902() -> None:
    for path in K8S.rglob("kustomization.yaml"):
        settings = yaml.safe_load(path.read_text())
        assert not {"patchesStrategicMerge", "patchesJson6902"} & set(settings)
        for patch in settings.get("patches", []):
            operations = yaml.safe_load((path.parent / patch["path"]).read_text())
            assert isinstance(operations, list)
            for operation in operations:
                assert operation["op"] in ("add", "replace", "remove")
                assert operation["path"].startswith("/")


def restricted(template: dict[str, Any]) -> list[str]:
    """What a pod does that Pod Security's profile `restricted` forbids."""
    spec = template["spec"]
    pod = spec.get("securityContext", {})
    problems = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    problems += [f"volume {v['name']}" for v in spec.get("volumes", []) if not set(v) - {"name"} <= allowed]
    if pod.get("sysctls") or pod.get("windowsOptions", {}).get("hostProcess"):
        problems.append("sysctls or hostProcess")
    for container in [*spec["containers"], *spec.get("initContainers", []), *spec.get("ephemeralContainers", [])]:
        own = container.get("securityContext", {})
        capabilities = own.get("capabilities", {})
        rules = {
            "privileged": not own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": own.get("runAsNonRoot", pod.get("runAsNonRoot")) is True,
            "runAsUser": own.get("runAsUser", pod.get("runAsUser")) != 0,
            "seccompProfile": own.get("seccompProfile", pod.get("seccompProfile", {})).get("type")
            in ("RuntimeDefault", "Localhost"),
            "capabilities.drop": "ALL" in capabilities.get("drop", []),
            "capabilities.add": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "procMount": own.get("procMount", "Default") == "Default",
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
            "seLinuxOptions": not own.get("seLinuxOptions") and not pod.get("seLinuxOptions"),
        }
        problems += [f"{container['name']}: {rule}" for rule, kept in rules.items() if not kept]
    return problems


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_is_restricted(overlays: dict[str, list[dict[str, Any]]], name: str) -> None:
    found = {where: template for thing in overlays[name] for where, template in pods(thing.get("spec", {}))}
    assert {where: restricted(template) for where, template in found.items()} == {where: [] for where in found}
    containers = [c["name"] for template in found.values() for c in template["spec"]["containers"]]
    assert "autoscaler" in containers
    assert "ray-job-submitter" in containers
    for template in found.values():  # an image's user has a name, which a kubelet cannot compare with root's
        assert template["spec"]["securityContext"]["runAsUser"] > 0
    for thing in overlays[name]:
        job = thing["spec"].get("jobTemplate", thing["spec"]) if thing["kind"] in ("RayJob", "RayCronJob") else None
        # A submitter beside the head would have no security context, and KubeRay lets none be given to it.
        assert job is None or (job["submissionMode"] == "K8sJobMode" and job["submitterPodTemplate"])


def test_the_restrictions_are_noticed(overlays: dict[str, list[dict[str, Any]]]) -> None:
    cluster = the(overlays["gpu"], "RayService")["spec"]["rayClusterConfig"]
    del cluster["autoscalerOptions"]["securityContext"]["capabilities"]
    assert any("autoscaler: capabilities.drop" in p for _, t in pods(copy.deepcopy(cluster)) for p in restricted(t))
    cluster["autoscalerOptions"]["securityContext"]["capabilities"] = {"drop": ["ALL"]}
    template = cluster["headGroupSpec"]["template"]
    assert restricted(template) == []
    spec = {**template["spec"], "hostNetwork": True, "volumes": [{"name": "host", "hostPath": {"path": "/"}}]}
    assert restricted({"spec": spec}) == ["hostNetwork", "volume host"]
    bare = {"spec": {"containers": [{"name": "x"}]}}
    assert restricted(bare) == [
        f"x: {rule}" for rule in ("allowPrivilegeEscalation", "runAsNonRoot", "seccompProfile", "capabilities.drop")
    ]


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_secret_is_in_a_manifest_and_roles_come_first(overlays: dict[str, list[dict[str, Any]]], name: str) -> None:
    things = overlays[name]
    assert not of_kind(things, "Secret")
    text = yaml.safe_dump_all(things)
    assert not re.search(r"AKIA[0-9A-Z]{16}|AWS_SECRET_ACCESS_KEY|sl-[\w-]{40}|sha256:[0-9a-f]{64}", text)
    for thing in things:
        for where, template in pods(thing.get("spec", {})):
            spec = template["spec"]
            talks = template["metadata"]["labels"].get("sightline/kubernetes-api") == "yes"
            assert spec["automountServiceAccountToken"] is talks, where
            if "ray-" in spec["containers"][0]["name"] and "submitter" not in where:
                assert spec["serviceAccountName"] == "sightline"
                keys = [source["secretRef"] for source in spec["containers"][0]["envFrom"] if "secretRef" in source]
                assert keys == [{"name": "s3", "optional": True}]
    if accounts := of_kind(things, "ServiceAccount"):
        ray = next(account for account in accounts if account["metadata"]["name"] == "sightline")
        assert ray["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::")
        rules = the(things, "Role")["rules"]
        assert [(rule["resources"], rule["verbs"]) for rule in rules] == [
            (["raycronjobs"], ["get"]),
            (["rayjobs"], ["create", "get"]),
        ]


def test_ray_asks_for_a_token_and_is_no_service_outside(overlays: dict[str, list[dict[str, Any]]]) -> None:
    for things in overlays.values():
        assert not of_kind(things, "Ingress")
        for thing in things:
            for cluster in clusters(thing):
                assert cluster["authOptions"] == {"mode": "token"}
                assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
                assert "enableIngress" not in cluster["headGroupSpec"]
                assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def clusters(thing: Any) -> Iterator[dict[str, Any]]:
    """Ray cluster specs in an object."""
    if isinstance(thing, dict):
        if "headGroupSpec" in thing:
            yield thing
        for value in thing.values():
            yield from clusters(value)


def test_the_versions_are_those_that_are_tested(overlays: dict[str, list[dict[str, Any]]]) -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for things in overlays.values():
        for thing in things:
            assert all(cluster["rayVersion"] == pinned["ray"] for cluster in clusters(thing))
    dockerfile = (K8S / "Dockerfile").read_text()
    assert f"rayproject/ray:{pinned['ray']}-py311" in dockerfile
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {
        image for things in overlays.values() for image in re.findall(r"image: (\S+)", yaml.safe_dump_all(things))
    }
    assert images == {f"sightline:{version}-cpu", f"sightline:{version}-gpu"}


def test_the_nightly_run_is_alone_and_bounded(overlays: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("cpu", "gpu"):
        job = the(overlays[name], "CronJob")["spec"]
        assert job["concurrencyPolicy"] == "Forbid"
        ray = the(overlays[name], "RayCronJob")["spec"]
        assert ray["suspend"] is True
        assert ray["schedule"] == job["schedule"]
        # The RayJob ends by itself before its watcher is ended, and both before the next night but one.
        assert ray["jobTemplate"]["activeDeadlineSeconds"] < job["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 86400
        rules = ray["jobTemplate"]["deletionStrategy"]["deletionRules"]
        assert {rule["policy"] for rule in rules} == {"DeleteCluster", "DeleteSelf"}
        assert "shutdownAfterJobFinishes" not in ray["jobTemplate"]  # KubeRay refuses it beside rules
    things = overlays["raycronjob"]
    assert the(things, "CronJob")["spec"]["suspend"] is True
    assert the(things, "RayCronJob")["spec"]["suspend"] is False


def test_a_labelling_run_has_the_nightly_runs_cluster(overlays: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("cpu", "gpu"):
        nightly = copy.deepcopy(the(overlays[name], "RayCronJob")["spec"]["jobTemplate"]["rayClusterSpec"])
        labelling = copy.deepcopy(the(overlays[f"labelling-{name}"], "RayJob")["spec"]["rayClusterSpec"])
        for cluster in (nightly, labelling):
            for _, template in pods(cluster):
                assert template["spec"]["volumes"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                spec = group["template"]["spec"]
                del spec["volumes"], spec["containers"][0]["envFrom"]
                spec["containers"][0].pop("lifecycle", None)
        assert nightly == labelling


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_serve_settings_and_pods_fit(overlays: dict[str, list[dict[str, Any]]], name: str) -> None:
    service = the(overlays[name], "RayService")["spec"]
    settings = yaml.safe_load(service["serveConfigV2"])
    (application,) = settings["applications"]
    config = EndpointConfig.model_validate(application["args"])
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (config.replicas.num_cpus or 1) + (config.ingress.num_cpus or 1) <= int(limits["cpu"])
    assert config.replicas.num_gpus == int(limits.get("nvidia.com/gpu", 0)) == int(name == "gpu")
    assert config.replicas.largest <= group["maxReplicas"]
    for where, template in pods(service["rayClusterConfig"]):
        assert {"name": CALLBACK, "value": CALLBACK_PATH} in template["spec"]["containers"][0]["env"], where
    mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
    assert str(config.auth.keys_file).startswith(mounts[0]["mountPath"])


def test_the_image_holds_what_runs(tmp_path: Path) -> None:
    """The files that the Dockerfile copies, and nothing else, install and run."""
    lines = (K8S / "Dockerfile").read_text().splitlines()
    arguments = dict(line[4:].split("=", 1) for line in lines if line.startswith("ARG "))
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    for name in (name for names in copied for name in names):
        path = Path(re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], name))
        assert path.parts[0] in kept, f"{path} is ignored"
        source = ROOT / path
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        if source.is_dir():
            shutil.copytree(source, tmp_path / "source" / path, ignore=ignore, dirs_exist_ok=True)
        else:
            (tmp_path / "source").mkdir(exist_ok=True)
            shutil.copy(source, tmp_path / "source" / path)
    assert lines[-2] == "USER 1000:100"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", tmp_path / "site", tmp_path / "source"], check=True, timeout=120)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    for module in ("sightline", "sightline.rayjob"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        )
        assert "Usage" in done.stdout
    code = "import serve.app, pipelines.tag, siglip; print(serve.app.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert (tmp_path / "site/siglip/checkpoints/tiny/model.safetensors").exists()


def test_the_readme_names_what_is_there() -> None:
    text = (K8S / "README.md").read_text()
    for path in set(re.findall(r"`((?:k8s|configs|serve)/[\w./-]+)`", text)):
        assert (ROOT / path).exists(), path
    for path in K8S.rglob("*.env"):
        for name in re.findall(r"^(\w+)=", path.read_text(), re.MULTILINE):
            assert f"`{name}`" in text, name
    assert all(f"k8s/overlays/{name}" in text for name in OVERLAYS)


def test_alerts_are_rules() -> None:
    for group in yaml.safe_load((K8S / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert rule["annotations"]["summary"]
