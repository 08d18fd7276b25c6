"""Which modules import torch and Ray: an ingress does not import torch, and the lower packages do not import Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run_python(code: str) -> str:
    """Run code in a new Python process. Returns what it prints, without spaces at the ends."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["serve.app", "serve.rayserve.replica"])
def test_importing_the_endpoint_does_not_import_torch(module: str) -> None:
    """Ray imports these modules before `ModelServer` can set OMP_WAIT_POLICY, which torch reads when it is imported."""
    heavy = "{'torch', 'transformers'} & set(sys.modules)"
    assert run_python(f"import sys, {module}; print(sorted({heavy}))") == "[]"


def test_an_ingress_imports_the_reader_of_outputs_only_for_a_search_and_never_the_batch_job() -> None:
    """Ray Serve's processes have parts of Ray Data themselves: what is counted is what the search adds."""
    code = """
import sys
import serve.app, serve.http.app
before = {name.partition(".")[0] for name in sys.modules}
loaded = set(sys.modules)
import serve.search.service
more = set(sys.modules) - loaded
print("curation" in before, "lancedb" in before, "curation" in sys.modules, "torch" in sys.modules,
      sorted(name for name in more if name.startswith(("ray.data", "pipelines.job", "pipelines.stages", "lancedb"))))
"""
    assert run_python(code) == "False False True False []"


def test_the_lower_packages_do_not_import_ray() -> None:
    """`curation`, `siglip`, `storage` and some modules of `serve`. Only `curation.retag` starts jobs on Ray."""
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
    assert run_python(code) == "True False"


def test_the_model_server_sets_the_wait_policy_of_threads_before_it_imports_torch() -> None:
    """torch's OpenMP library reads OMP_WAIT_POLICY once, when it is loaded. With PASSIVE, waiting threads sleep."""
    code = """
import importlib.abc, os, sys

class StopAtTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, StopAtTorch())
from serve.config import EndpointConfig
from serve.rayserve.replica import ModelServer
ModelServer(EndpointConfig())
"""
    assert run_python(code) == "PASSIVE"
