"""Private names of Ray, Ray Serve and gRPC: the installed versions have them, and only one file uses them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import ray
from ray.serve.handle import DeploymentHandle
from typer.testing import CliRunner

from serve.config import EndpointConfig
from serve.rayserve import internals
from sightline.cli import app
from sightline.commands import serving
from tests.support.ports import free_port

ROOT = Path(__file__).parents[3]
RAY = Path(ray.__file__).parent
READERS = (
    "serve/_private/constants.py",
    "_private/ray_constants.py",
    "_common/usage/usage_constants.py",
    "dashboard/modules/job/job_supervisor.py",
    "_raylet.so",
)
"""Files of Ray that read environment variables."""
OWN = {"RAY_IMAGE"}
"""Build arguments of k8s/Dockerfile, which Ray does not read."""
VARIABLE = re.compile(r"\bRAY_[A-Z0-9_]+")
PRIVATE = re.compile(
    r"\bRAY_[A-Z0-9_]+|\b_by_reference|__serve_build_asgi_app__|_metrics_export_port|_node_ip_address"
    r"|ray\.(\w+\.)*_|grpc\.(\w+\.)*_|[\"']ray\.serve"
)


def list_variables() -> list[str]:
    """Return the variables that the endpoint's Python code or a manifest sets."""
    texts = [Path(internals.__file__), *(path for path in (ROOT / "k8s").rglob("*.yaml")), ROOT / "k8s" / "Dockerfile"]
    return sorted({name for path in texts for name in VARIABLE.findall(path.read_text())} - OWN)


@pytest.fixture(scope="module")
def read_by_ray() -> set[str]:
    """Every name in the files of the installed Ray that read environment variables."""
    return {name.decode() for path in READERS for name in re.findall(rb"RAY_[A-Z0-9_]+", (RAY / path).read_bytes())}


@pytest.mark.parametrize("name", list_variables())
def test_ray_reads_the_environment_variable(name: str, read_by_ray: set[str]) -> None:
    assert name in read_by_ray, f"Ray {version('ray')} no longer reads {name}: see serve/rayserve/internals.py and k8s/"


def test_ray_init_has_the_private_arguments() -> None:
    source = inspect.getsource(sys.modules[ray.init.__module__])
    for name in internals.loopback_options(1):
        assert f'kwargs.pop("{name}"' in source, f"ray.init of Ray {version('ray')} no longer takes {name}"


def test_a_handle_has_the_option_by_reference() -> None:
    parameters = inspect.signature(DeploymentHandle.options).parameters
    assert "_by_reference" in parameters, f"handles of Ray {version('ray')} have no option _by_reference"


def test_ray_serve_calls_the_hook_that_builds_an_application() -> None:
    from ray.serve._private import replica

    hook = getattr(replica, "SERVE_BUILD_ASGI_APP_METHOD", None)
    message = f"Ray {version('ray')} has another hook for building an ASGI application late: {hook}"
    assert hook in vars(internals.LateIngress), message


def test_ray_serve_opens_a_replicas_port_as_the_patch_expects() -> None:
    from grpc.aio import _server
    from ray.serve._private import replica

    opens = f'add_port_to_grpc_server(self._server, "{internals.ALL_INTERFACES}")'
    assert opens in inspect.getsource(replica), f"Ray {version('ray')} opens a replica's gRPC port in another way"
    message = f"grpc.aio._server.Server of gRPC {version('grpcio')} has no add_insecure_port"
    assert hasattr(getattr(_server, "Server", None), "add_insecure_port"), message


def test_ray_serve_has_the_logger() -> None:
    from ray.serve._private.constants import SERVE_LOGGER_NAME

    assert internals.LOGGER == SERVE_LOGGER_NAME


def test_the_tested_version_of_ray_is_the_pinned_version() -> None:
    [pinned] = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned == internals.TESTED_RAY


@pytest.mark.parametrize(
    ("installed", "warns"),
    [("2.9.3", False), ("2.60.0", False), ("2.60.1", True), ("2.61.0rc1", True), ("3.0.0.dev0", True)],
)
def test_a_newer_ray_is_warned_about_in_one_line(installed: str, warns: bool) -> None:
    warning = internals.describe_untested_ray(installed)
    assert (warning is not None) == warns
    if warning:
        assert installed in warning
        assert internals.TESTED_RAY in warning
        assert "\n" not in warning


def test_the_command_prints_the_warning_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(config: EndpointConfig, host: str, port: int) -> Iterator[str]:
        raise RuntimeError("started")

    monkeypatch.setattr(internals, "version", lambda name: "99.1.0")
    monkeypatch.setattr(serving, "endpoint", start)
    result = CliRunner().invoke(app, ["serve", str(ROOT / "configs" / "endpoint.yaml"), "--port", str(free_port())])
    assert "started" in result.stderr
    assert " ".join(result.stderr.split()).count("Ray 99.1.0 is installed") == 1


def test_no_other_file_of_the_endpoint_uses_a_private_name() -> None:
    files = [*(ROOT / "serve").rglob("*.py"), ROOT / "sightline" / "commands" / "serving.py"]
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        for match in PRIVATE.finditer(path.read_text())
        if path != Path(internals.__file__)
    }
    assert not found, "move these names to serve/rayserve/internals.py"


def test_importing_the_names_imports_neither_ray_nor_grpc() -> None:
    """The environment variables have to be set before Ray's modules read them."""
    code = "import sys, serve.rayserve.internals, serve.rayserve.haproxy; print({'ray', 'grpc'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
