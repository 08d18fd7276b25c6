"""A typo in any key of the manifests is refused: a slow test, with as many checks as there are keys."""

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
"""Fields whose keys are anybody's: a typo in them is another name."""

pytestmark = pytest.mark.skipif(
    not find_kubectl() and not os.environ.get("SIGHTLINE_CI"), reason="kubectl is not installed"
)


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
def test_a_typo_in_any_key_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERAY_SCHEMAS", raising=False)  # the whole CRDs are checked above, and are slow
    count = 0
    for thing in render(K8S / "overlays" / name):
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
