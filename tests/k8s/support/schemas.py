"""Renders overlays, and checks objects against the schemas of Kubernetes and KubeRay.

Kubernetes' schemas come from the package kubernetes-validate. `kuberay.json` has KubeRay's own fields; the command
`python -m tests.k8s.support.schemas FOLDER` makes it from the CRDs of the operator's release. In it, pod templates and
similar fields refer to Kubernetes' definitions instead of repeating them. If KUBERAY_SCHEMAS names a folder of complete
CRD schemas, objects are checked against these schemas too, and `kuberay.json` is compared with a newly made one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

ROOT = Path(__file__).parents[3]
COMPACT = Path(__file__).with_name("kuberay.json")
KUBERNETES = "1.37"
DEFINITIONS = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json"
CORE = "/api/_definitions.json#/$defs/io.k8s.api.core.v1."
RAY_API = "ray.io/v1"

_SHARED = {
    "template": "PodTemplateSpec",
    "submitterPodTemplate": "PodTemplateSpec",
    "headService": "Service",
    "serveService": "Service",
    "securityContext": "SecurityContext",
    "redisPassword": None,
    "redisUsername": None,
}
"""Fields of KubeRay that are complete Kubernetes objects."""
_SHARED_ITEMS = {"env": "EnvVar", "envFrom": "EnvFromSource", "volumeMounts": "VolumeMount"}


def find_kubectl() -> str | None:
    """Return the path of kubectl: in this Python's folder, or on the PATH. None if there is none."""
    return shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")


def render(folder: Path) -> list[dict[str, Any]]:
    """Return the objects that `kubectl apply -k FOLDER` would apply. Raises `RuntimeError` with kubectl's message."""
    kubectl = find_kubectl()
    assert kubectl
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def check(obj: dict[str, Any]) -> None:
    """Raise `jsonschema.ValidationError` if an object has an unknown field, a wrong type or a missing field."""
    if obj["apiVersion"] != RAY_API:
        kubernetes_validate.validate(obj, KUBERNETES, strict=True)
        return
    for schema in _ray_schemas(obj["kind"]):
        Draft202012Validator(schema, registry=_registry()).validate(obj)


def pods(obj: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every pod template in an object as (path, template), with the containers that KubeRay adds to it.

    The head of an autoscaling cluster gets the autoscaler's container, with the security context of
    `autoscalerOptions`. A worker gets an init container, with the security context of the worker's container.
    """
    if isinstance(obj, list):
        for number, item in enumerate(obj):
            yield from pods(item, f"{where}[{number}]")
        return
    if not isinstance(obj, dict):
        return
    for key, value in obj.items():
        path = f"{where}.{key}"
        if key in ("template", "submitterPodTemplate") and isinstance(value, dict) and "spec" in value:
            yield path, value
        elif key == "headGroupSpec" and obj.get("enableInTreeAutoscaling"):
            template = json.loads(json.dumps(value["template"]))
            options = obj.get("autoscalerOptions", {})
            template["spec"]["containers"].append({"name": "autoscaler", **options})
            yield f"{path}.template", template
        elif key == "workerGroupSpecs":
            for number, group in enumerate(value):
                template = json.loads(json.dumps(group["template"]))
                template["spec"].setdefault("initContainers", []).append(
                    {**template["spec"]["containers"][0], "name": "wait-gcs-ready"}
                )
                yield f"{path}[{number}].template", template
        else:
            yield from pods(value, path)


def compact(folder: Path) -> dict[str, Any]:
    """Return KubeRay's own fields from a folder of CRD schemas: `{kind: schema of its spec}`, the cluster's once."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        crd = json.loads(path.read_text())
        found[crd["kind"]] = _close(_shorten(crd["schema"]["properties"]["spec"]))
    cluster, job = found.pop("RayCluster"), found["RayJob"]
    found["RayCronJob"]["properties"]["jobTemplate"] = {"$ref": "#/$defs/RayJob"}
    for kind, key in (("RayJob", "rayClusterSpec"), ("RayService", "rayClusterConfig")):
        if {**found[kind]["properties"][key], "description": None} != {**cluster, "description": None}:
            raise ValueError(f"{kind}.spec.{key} is not a RayCluster's spec")
        found[kind]["properties"][key] = {"$ref": "#/$defs/RayCluster"}
    return {"RayCluster": cluster, "RayJob": job, **found}


def _shorten(schema: Any) -> Any:
    """Replace Kubernetes' objects in a schema by references to their definitions."""
    if isinstance(schema, list):
        return [_shorten(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    short = {key: _shorten(value) for key, value in schema.items() if key != "properties"}
    for name, value in schema.get("properties", {}).items():
        if "properties" in value and _SHARED.get(name):
            value = {"$ref": f"{CORE}{_SHARED[name]}"}
        elif name in _SHARED_ITEMS and value.get("type") == "array":
            value = {"type": "array", "items": {"$ref": f"{CORE}{_SHARED_ITEMS[name]}"}}
        short.setdefault("properties", {})[name] = _shorten(value)
    return short


def _close(schema: Any) -> Any:
    """Return a CRD's schema as a strict API server reads it: no unknown fields, and integers where they are allowed."""
    if isinstance(schema, list):
        return [_close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _close(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
        closed.pop("pattern", None)
    return closed


def _dump(schemas: dict[str, Any]) -> str:
    """Write one line per kind, because people do not read this file, and a new release changes few lines."""
    lines = (f"{json.dumps(kind)}: {json.dumps(schema, sort_keys=True)}" for kind, schema in schemas.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


@cache
def _ray_schemas(kind: str) -> list[dict[str, Any]]:
    """Return the schemas of one of KubeRay's kinds: the compact one, and the CRD's if KUBERAY_SCHEMAS is set."""
    metadata = "/api/_definitions.json#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
    definitions = json.loads(COMPACT.read_text())
    schemas: list[dict[str, Any]] = [
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$id": f"https://kubernetes.io/api/{kind}",
            "type": "object",
            "properties": {
                "apiVersion": {"const": RAY_API},
                "kind": {"const": kind},
                "metadata": {"$ref": metadata},
                "spec": {"$ref": f"#/$defs/{kind}"},
            },
            "required": ["apiVersion", "kind", "metadata", "spec"],
            "additionalProperties": False,
            "$defs": definitions,
        }
    ]
    if folder := os.environ.get("KUBERAY_SCHEMAS"):
        crds = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
        schemas += [_close(crd["schema"]) for crd in crds if crd["kind"] == kind]
        if len(schemas) == 1:
            raise ValidationError(f"no schema of {kind} in {folder}")
    return schemas


@cache
def _registry() -> Registry[Any]:
    definitions = json.loads(resources.files(kubernetes_validate).joinpath(DEFINITIONS).read_text())
    return Resource.from_contents(definitions) @ Registry()


if __name__ == "__main__":
    COMPACT.write_text(_dump(compact(Path(sys.argv[1]))))
