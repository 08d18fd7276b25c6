"""The rendered manifests: all objects are valid, their pods are restricted, and their settings fit together."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

from serve.config import EndpointConfig
from serve.rayserve import internals
from serve.rayserve.proxy import CALLBACK_PATH
from tests.k8s.support.schemas import COMPACT, ROOT, check, compact, find_kubectl, pods, render

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
pytestmark = pytest.mark.skipif(
    not find_kubectl() and not os.environ.get("SIGHTLINE_CI"), reason="kubectl is not installed"
)


@pytest.fixture(scope="module")
def overlays() -> dict[str, list[dict[str, Any]]]:
    """The rendered objects of every overlay."""
    return {name: render(K8S / "overlays" / name) for name in OVERLAYS}


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [obj for obj in objects if obj["kind"] == kind]


def the(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = of_kind(objects, kind)
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_is_valid(overlays: dict[str, list[dict[str, Any]]], name: str) -> None:
    for obj in overlays[name]:
        check(obj)
        assert obj["kind"] == "Namespace" or obj["metadata"]["namespace"] == "sightline"


def test_kuberays_schemas_are_those_of_the_release() -> None:
    committed = json.loads(COMPACT.read_text())
    assert set(committed) == {"RayCluster", "RayCronJob", "RayJob", "RayService"}
    if folder := os.environ.get("KUBERAY_SCHEMAS"):
        assert committed == compact(Path(folder))


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
    """List what a pod does that Pod Security's profile `restricted` forbids."""
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
    found = {where: template for obj in overlays[name] for where, template in pods(obj.get("spec", {}))}
    assert {where: restricted(template) for where, template in found.items()} == {where: [] for where in found}
    containers = [c["name"] for template in found.values() for c in template["spec"]["containers"]]
    assert "autoscaler" in containers
    assert "ray-job-submitter" in containers
    for template in found.values():  # the image's user is a name, and a kubelet cannot check that it is not root
        assert template["spec"]["securityContext"]["runAsUser"] > 0
    for obj in overlays[name]:
        job = obj["spec"]["jobTemplate"] if obj["kind"] == "RayCronJob" else None
        # A submitter in the head's pod would have no security context, and KubeRay has no setting for it.
        assert job is None or (job["submissionMode"] == "K8sJobMode" and job["submitterPodTemplate"])


def test_violations_of_the_profile_are_found(overlays: dict[str, list[dict[str, Any]]]) -> None:
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
def test_manifests_have_no_secrets_and_pods_use_roles(overlays: dict[str, list[dict[str, Any]]], name: str) -> None:
    objects = overlays[name]
    assert not of_kind(objects, "Secret")
    text = yaml.safe_dump_all(objects)
    assert not re.search(r"AKIA[0-9A-Z]{16}|AWS_SECRET_ACCESS_KEY|sl-[\w-]{40}|sha256:[0-9a-f]{64}", text)
    for obj in objects:
        for where, template in pods(obj.get("spec", {})):
            spec = template["spec"]
            talks = template["metadata"]["labels"].get("sightline/kubernetes-api") == "yes"
            assert spec["automountServiceAccountToken"] is talks, where
            if "ray-" in spec["containers"][0]["name"] and "submitter" not in where:
                assert spec["serviceAccountName"] == "sightline"
                keys = [source["secretRef"] for source in spec["containers"][0]["envFrom"] if "secretRef" in source]
                assert keys == [{"name": "s3", "optional": True}]
    if accounts := of_kind(objects, "ServiceAccount"):
        ray = next(account for account in accounts if account["metadata"]["name"] == "sightline")
        assert ray["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::")
        rules = the(objects, "Role")["rules"]
        assert [(rule["resources"], rule["verbs"]) for rule in rules] == [
            (["raycronjobs"], ["get"]),
            (["rayjobs"], ["create", "get", "list"]),
            (["jobs"], ["get"]),
        ]


def test_ray_needs_a_token_and_is_not_reachable_from_outside(overlays: dict[str, list[dict[str, Any]]]) -> None:
    for objects in overlays.values():
        assert not of_kind(objects, "Ingress")
        for obj in objects:
            for cluster in clusters(obj):
                assert cluster["authOptions"] == {"mode": "token"}
                assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
                assert "enableIngress" not in cluster["headGroupSpec"]
                assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def clusters(obj: Any) -> Iterator[dict[str, Any]]:
    """Yield the specs of Ray clusters in an object."""
    if isinstance(obj, dict):
        if "headGroupSpec" in obj:
            yield obj
        for value in obj.values():
            yield from clusters(value)


def test_the_versions_are_the_tested_ones(overlays: dict[str, list[dict[str, Any]]]) -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for objects in overlays.values():
        for obj in objects:
            assert all(cluster["rayVersion"] == pinned["ray"] for cluster in clusters(obj))
    dockerfile = (K8S / "Dockerfile").read_text()
    assert f"rayproject/ray:{pinned['ray']}-py311" in dockerfile
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {
        image for objects in overlays.values() for image in re.findall(r"image: (\S+)", yaml.safe_dump_all(objects))
    }
    assert images == {f"sightline:{version}-cpu", f"sightline:{version}-gpu"}


def test_launchers_may_read_their_templates(overlays: dict[str, list[dict[str, Any]]]) -> None:
    """kustomize renames a name in a role if a generated config map has the same name."""
    for name in ("cpu", "gpu"):
        (rule, *_) = the(overlays[name], "Role")["rules"]
        objects = [*overlays[name], *overlays[f"labelling-{name}"]]
        assert set(rule["resourceNames"]) == {t["metadata"]["name"] for t in of_kind(objects, "RayCronJob")}
        for obj in objects:
            if obj["kind"] in ("CronJob", "Job"):
                spec = obj["spec"].get("jobTemplate", obj)["spec"]["template"]["spec"]
                assert spec["containers"][0]["command"][-1] in rule["resourceNames"]
                assert spec["serviceAccountName"] == the(overlays[name], "RoleBinding")["subjects"][0]["name"]


def test_runs_do_not_overlap_and_have_deadlines(overlays: dict[str, list[dict[str, Any]]]) -> None:
    for name, objects in overlays.items():
        ray = the(objects, "RayCronJob")["spec"]
        job = ray["jobTemplate"]
        assert ray["suspend"] is True
        if name in ("cpu", "gpu"):
            cron = the(objects, "CronJob")["spec"]
            assert cron["concurrencyPolicy"] == "Forbid"
            limit = cron["jobTemplate"]["spec"]["activeDeadlineSeconds"]
            assert limit < 86400
        else:
            limit = the(objects, "Job")["spec"]["activeDeadlineSeconds"]
        assert job["activeDeadlineSeconds"] < limit  # the run reaches its deadline before its launcher does
        assert job["backoffLimit"] == 0  # each retry by KubeRay would restart the deadline
        assert job["shutdownAfterJobFinishes"] is True  # no deletion rule matches a job that was stopped
        assert job["ttlSecondsAfterFinished"] <= 300
        assert "deletionStrategy" not in job  # KubeRay refuses it together with shutdownAfterJobFinishes


NODE = {"cpu": 7.9 - 0.5, "memory": 27.0}
"""What a node with 8 CPUs and 32 GiB leaves to pods: GKE leaves the least, 7.9 CPUs and 28 GiB. Small daemons are
subtracted."""


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_fits_a_common_node(overlays: dict[str, list[dict[str, Any]]], name: str) -> None:
    for obj in overlays[name]:
        for where, template in pods(obj.get("spec", {})):
            requests = [container["resources"]["requests"] for container in template["spec"]["containers"]]
            assert sum(cpus(a["cpu"]) for a in requests) <= NODE["cpu"], where
            assert sum(gibibytes(a["memory"]) for a in requests) <= NODE["memory"], where


def cpus(quantity: str) -> float:
    return int(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def gibibytes(quantity: str) -> float:
    return float(quantity[:-2]) / {"Gi": 1, "Mi": 1024}[quantity[-2:]]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_endpoint_survives_drains_slow_starts_and_updates(
    overlays: dict[str, list[dict[str, Any]]], name: str
) -> None:
    service = the(overlays[name], "RayService")
    # With this annotation a slow first start fails for ever, and KubeRay ignores it in upgrades.
    assert "ray.io/initializing-timeout" not in service["metadata"].get("annotations", {})
    cluster = service["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    budget = the(overlays[name], "PodDisruptionBudget")["spec"]
    assert isinstance(budget["minAvailable"], int)
    assert "maxUnavailable" not in budget
    assert group["minReplicas"] > budget["minAvailable"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    surge = {entry["name"]: entry["max_surge_percent"] for entry in application["deployments"]}
    assert set(surge) == {"model", "ingress"}
    config = EndpointConfig.model_validate(application["args"])
    for scaling, percent in ((config.replicas, surge["model"]), (config.ingress, surge["ingress"])):
        assert scaling.min >= 2
        assert percent > 0
        # The group has room for new replicas in addition to the old ones. Otherwise an update would wait for ever.
        assert scaling.largest + math.ceil(scaling.largest * percent / 100) <= group["maxReplicas"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_cluster_autoscaler_does_not_evict_heads(overlays: dict[str, list[dict[str, Any]]], name: str) -> None:
    for obj in overlays[name]:
        for cluster in clusters(obj):
            assert cluster["headGroupSpec"]["template"]["metadata"]["annotations"] == {
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "karpenter.sh/do-not-disrupt": "true",
            }


def render_with(tmp_path: Path, *names: str) -> list[dict[str, Any]]:
    """Return the rendered objects of the GPU overlay with more components, from a copy of the files."""
    for folder in ("k8s", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "k8s/overlays/gpu/kustomization.yaml"
    line = "  - ../../components/gpu\n"
    assert line in path.read_text()
    path.write_text(path.read_text().replace(line, line + "".join(f"  - ../../components/{name}\n" for name in names)))
    objects = render(path.parent)
    for obj in objects:
        check(obj)
        for where, template in pods(obj.get("spec", {})):
            assert restricted(template) == [], where
    return objects


def test_one_line_puts_workers_on_preemptible_nodes(tmp_path: Path) -> None:
    cluster = the(render_with(tmp_path, "spot"), "RayCronJob")["spec"]["jobTemplate"]["rayClusterSpec"]

    def terms(group: dict[str, Any]) -> list[set[tuple[str, str]]]:
        affinity = group["template"]["spec"]["affinity"]["nodeAffinity"]
        return [
            {(e["key"], e["operator"]) for e in term["matchExpressions"]}
            for term in affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        ]

    (never,) = terms(cluster["headGroupSpec"])
    assert {operator for _, operator in never} == {"NotIn"}
    assert "tolerations" not in cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        # The terms are alternatives, one for each cloud's label: the same labels that the head avoids.
        assert terms(group) == [{(key, "In")} for key, _ in sorted(never, key=lambda pair: LABELS.index(pair[0]))]
        keys = [entry["key"] for entry in group["template"]["spec"]["tolerations"]]
        assert ("nvidia.com/gpu" in keys) is (group["groupName"] == "actors")


LABELS = [
    "karpenter.sh/capacity-type",
    "eks.amazonaws.com/capacityType",
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
]


def test_the_endpoint_survives_its_head_with_ha(tmp_path: Path) -> None:
    objects = render_with(tmp_path, "ha")
    options = the(objects, "RayService")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    service, server = the(objects, "Service"), the(objects, "StatefulSet")
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["selector"] == server["spec"]["template"]["metadata"]["labels"]
    assert not {"redis"} & set(the(objects, "RayCronJob")["spec"]["jobTemplate"]["rayClusterSpec"])
    (container,) = server["spec"]["template"]["spec"]["containers"]
    assert container["env"][0]["valueFrom"] == options["redisPassword"]["valueFrom"]


def test_a_labelling_run_has_the_nightly_runs_cluster(overlays: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("cpu", "gpu"):
        nightly = copy.deepcopy(the(overlays[name], "RayCronJob")["spec"]["jobTemplate"]["rayClusterSpec"])
        labelling = copy.deepcopy(
            the(overlays[f"labelling-{name}"], "RayCronJob")["spec"]["jobTemplate"]["rayClusterSpec"]
        )
        for cluster in (nightly, labelling):
            for _, template in pods(cluster):
                assert template["spec"]["volumes"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                spec = group["template"]["spec"]
                del spec["volumes"], spec["containers"][0]["envFrom"]
                spec["containers"][0].pop("lifecycle", None)
        assert nightly == labelling
        launcher = the(overlays[f"labelling-{name}"], "Job")["spec"]
        usual = the(overlays[name], "CronJob")["spec"]["jobTemplate"]["spec"]
        for spec in (launcher, usual):
            del spec["activeDeadlineSeconds"], spec["template"]["spec"]["containers"][0]["command"][-1]
        assert launcher == usual


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
        given = {entry["name"]: entry["value"] for entry in template["spec"]["containers"][0]["env"]}
        assert given[internals.PROXY_CALLBACK] == CALLBACK_PATH, where
        assert given[internals.ENABLE_HAPROXY] == "1", where
        assert given[internals.HAPROXY_BINARY] == "/opt/sightline/haproxy", where
        assert int(given["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"]) > config.limits.deadline_s, where
    mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
    assert str(config.auth.keys_file).startswith(mounts[0]["mountPath"])


def test_the_readme_names_existing_files_and_settings() -> None:
    text = (K8S / "README.md").read_text()
    for path in set(re.findall(r"`((?:k8s|configs|serve)/[\w./-]+)`", text)):
        assert (ROOT / path).exists(), path
    for path in K8S.rglob("*.env"):
        for name in re.findall(r"^(\w+)=", path.read_text(), re.MULTILINE):
            assert f"`{name}`" in text, name
    assert all(f"k8s/overlays/{name}" in text for name in OVERLAYS)
    assert all(f"components/{path.name}" in text for path in (K8S / "components").iterdir())


def test_the_readme_builds_an_image_without_cuda_for_cpus() -> None:
    text = (K8S / "README.md").read_text()
    (line,) = (line for line in text.splitlines() if "docker build" in line and "0.1.0-cpu" in line)
    assert "--build-arg TORCH_INDEX=https://" in line
    assert "torch.version.cuda" in text  # the README says how to check a GPU node's driver


def test_alerts_have_a_severity_and_a_summary() -> None:
    for group in yaml.safe_load((K8S / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert rule["annotations"]["summary"]
