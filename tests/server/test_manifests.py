"""The slow tests of the manifests: a typo in any key, and what the image installs."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import ValidationError

from tests.kubernetes import ROOT, check, find_kubectl, render

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
