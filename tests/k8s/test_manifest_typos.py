"""A typo in any key of the manifests is refused. Slow, because each key is checked."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import ValidationError

from tests.k8s.support.schemas import ROOT, check, find_kubectl, render

K8S = ROOT / "k8s"
FREE = {"annotations", "labels", "matchLabels", "data", "limits", "requests", "rayStartParams", "nodeSelector"}
"""Fields whose keys are free: a typo in such a key is not an error."""

pytestmark = pytest.mark.skipif(
    not find_kubectl() and not os.environ.get("SIGHTLINE_CI"), reason="kubectl is not installed"
)


def is_valid(obj: dict[str, Any]) -> bool:
    try:
        check(obj)
    except ValidationError:
        return False
    return True


def keys_of(obj: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all keys that an API server checks."""
    if isinstance(obj, list):
        for number, item in enumerate(obj):
            yield from keys_of(item, (*path, number))
    elif isinstance(obj, dict):
        for key, value in obj.items():
            yield (*path, key)
            if key not in FREE:
                yield from keys_of(value, (*path, key))


@pytest.mark.parametrize("name", ["gpu", "labelling-gpu"])
def test_a_typo_in_any_key_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(
        "KUBERAY_SCHEMAS", raising=False
    )  # the complete CRDs are slow; test_rendered_manifests.py checks against them
    count = 0
    for obj in render(K8S / "overlays" / name):
        for path in keys_of(obj):
            broken = copy.deepcopy(obj)
            place = broken
            for step in path[:-1]:
                place = place[step]
            if path[0] in ("apiVersion", "kind"):
                continue
            place[path[-1] + "x"] = place.pop(path[-1])
            assert not is_valid(broken), f"{obj['kind']} {obj['metadata']['name']}: a typo in {path} is accepted"
            count += 1
    assert count > 100
