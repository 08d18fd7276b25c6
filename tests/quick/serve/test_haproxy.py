"""HAProxy's configuration: as Ray Serve writes it, and after `harden_config`."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import pytest

from serve.config import EndpointConfig
from serve.rayserve import guard
from serve.rayserve.haproxy import PEER, TEMPLATE_LINES, find_launcher, harden_config, make_refusals
from serve.rayserve.internals import ENABLE_HAPROXY, ingress_ports
from sightline.commands.serving import _set_environment
from tests.support.haproxy import write_config


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The file that the installed Ray writes for an application with one ingress."""
    return write_config(tmp_path)


@pytest.mark.parametrize("start", TEMPLATE_LINES)
def test_ray_writes_each_line_that_is_hardened(written: Path, start: str) -> None:
    lines = [line.strip() for line in written.read_text().splitlines()]
    message = f"Ray {version('ray')} writes no HAProxy line that starts with {start!r}: see serve/rayserve/haproxy.py"
    assert any(line.startswith(start) for line in lines), message


def test_only_the_frontend_listens_and_it_sends_the_clients_address(written: Path) -> None:
    before = written.read_text()
    assert before.count("\n    bind ") + before.count("\n  bind ") == 3
    after = harden_config(before, written.parent, "[::1]:9000")
    binds = [line.strip() for line in after.splitlines() if line.strip().startswith("bind ")]
    assert binds == ["bind [::1]:9000"]
    frontend = after[after.index("frontend http_frontend") : after.index("backend default_backend")]
    assert f"http-request set-header {PEER} %[src]" in frontend
    assert "server one 127.0.0.1:30000 check" in after
    assert "500.http" not in after
    assert "text/plain lf-string" not in after
    assert harden_config(after, written.parent, "[::1]:9000") == after


def test_without_a_bind_address_haproxy_listens_where_ray_serve_says(written: Path) -> None:
    assert "bind 127.0.0.1:8000" in harden_config(written.read_text(), written.parent)


def test_the_launcher_hardens_the_file_and_executes_haproxy(written: Path) -> None:
    done = subprocess.run([find_launcher(), "-c", "-f", written], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert PEER in written.read_text()


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (["-db", "-f", "c"], ["-db", "-f", "c", "-sf", "7", "-x", "spare.sock"]),
        (["-f", "c", "-sf", "5", "-x", "admin.sock"], ["-f", "c", "-sf", "7", "5", "-x", "spare.sock"]),
    ],
)
def test_haproxy_takes_the_port_over_from_a_stand_in(arguments: list[str], changed: list[str]) -> None:
    assert guard.take_over(Path("spare.sock"), 7, arguments) == changed


def test_a_stand_in_has_another_admin_socket(written: Path) -> None:
    config = harden_config(written.read_text(), written.parent)
    spare = guard.make_spare_config(config, written.parent)
    assert f"stats socket {written.parent / 'spare.sock'} mode" in spare
    assert "admin.sock" not in spare


def test_a_configuration_without_the_frontend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frontend http_frontend"):
        harden_config("global\ndefaults\nfrontend another\n", tmp_path)


@pytest.mark.parametrize("name", make_refusals())
def test_a_refusal_is_a_complete_response(name: str) -> None:
    head, body = make_refusals()[name].split(b"\r\n\r\n")
    status = int(name.removesuffix(".http"))
    assert head.startswith(f"HTTP/1.1 {status if status < 500 else 503} ".encode())
    assert f"content-length: {len(body)}".encode() in head
    codes = {404: "not_found", 405: "method_not_allowed", 429: "too_many_connections"}
    assert json.loads(body)["error"]["code"] == codes.get(status, "unavailable")


@pytest.mark.parametrize("installed", [True, False])
def test_the_proxy_may_take_the_whole_timeout_of_ray_serves_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """Otherwise, on a busy machine, Ray Serve's controller kills the proxy early and the whole start fails."""
    from ray.serve._private.constants import HTTP_PROXY_TIMEOUT, PROXY_HEALTH_CHECK_UNHEALTHY_THRESHOLD

    monkeypatch.setattr("serve.rayserve.haproxy.is_available", lambda: installed)
    with patch.dict(os.environ):
        os.environ.pop("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", None)
        _set_environment(EndpointConfig(), tmp_path, "127.0.0.1", 8000)
        seconds = float(os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"])
    assert seconds * PROXY_HEALTH_CHECK_UNHEALTHY_THRESHOLD >= HTTP_PROXY_TIMEOUT


def test_two_endpoints_on_a_machine_have_different_ingress_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an ingress could take a port to which the other endpoint's HAProxy still sends requests."""
    monkeypatch.setattr("serve.rayserve.haproxy.is_available", lambda: True)
    names = list(ingress_ports(0))
    taken: list[set[int]] = []
    for port in (8000, 8001, 8080, 18_000 + 99):
        with patch.dict(os.environ):
            for name in (*names, ENABLE_HAPROXY):
                os.environ.pop(name, None)
            _set_environment(EndpointConfig(), tmp_path, "127.0.0.1", port)
            taken.append(set(range(*(int(os.environ[name]) for name in names))))
    assert all(len(ports) >= 50 for ports in taken)
    assert sum(map(len, taken)) == len(set.union(*taken))
