"""What is loaded where: an ingress has no use for torch, and only `serve` and `sightline` know Ray Serve."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded(code: str) -> str:
    """What a new process prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["serve.app", "serve.rayserve.replica"])
def test_torch_is_the_models_alone(module: str) -> None:
    """Not with a module: Ray imports it before the model can say how torch's threads are to wait."""
    heavy = "{'torch', 'transformers'} & set(sys.modules)"
    assert loaded(f"import sys, {module}; print(sorted({heavy}))") == "[]"


def test_ray_is_not_known_below_serve() -> None:
    """Neither by the model, nor by the store, nor by what reads outputs, but for what retags them on Ray."""
    code = """
import importlib, pkgutil, sys
import curation, siglip, storage
names = [m.name for p in (curation, siglip, storage) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
names += ["serve.admission.batcher", "serve.admission.controller", "serve.label_sets.cache", "serve.decoder_pool"]
for name in [*names, "serve.fetch.fetcher"]:
    if name != "curation.retag":
        importlib.import_module(name)
print(len(names) > 30, "ray" in sys.modules)
"""
    assert loaded(code) == "True False"


def test_torch_finds_its_threads_told_to_sleep() -> None:
    """OMP_WAIT_POLICY is read once, when torch's libraries are loaded."""
    code = """
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Watch())
from serve.config import EndpointConfig
from serve.rayserve.replica import ModelServer
ModelServer(EndpointConfig())
"""
    assert loaded(code) == "PASSIVE"
