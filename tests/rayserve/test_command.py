"""The command `sightline serve` as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from sightline.commands.serving import STOPPING

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_command_serves_and_stops(tmp_path: Path) -> None:
    """The command in its own process: the ready line, responses, metrics, logs and Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "endpoint.yaml"
    config.write_text((CONFIGS / "endpoint.yaml").read_text() + "\nmetrics_route: true\n")
    command = [sys.executable, "-m", "sightline", "serve", str(config), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"ready: http://127.0.0.1:{port} "), line
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            assert client.get("/readyz").status_code == 200
            unknown = {"texts": ["a"], "images": [], "x": 1}
            assert client.post("/v1/similarity", json=unknown).json()["error"]["code"] == "invalid_request"
            assert client.get("/v1/models", headers={"x-request-id": "find-me-again"}).status_code == 200
        metrics = re.findall(r"metrics: (http\S+)\)", line)[0]
        deadline = 60
        while deadline and "ray_sightline_requests" not in (text := httpx.get(metrics).text):
            deadline -= 1
            time.sleep(0.5)
        dashboard = json.loads((Path(__file__).parents[2] / "serve" / "grafana" / "dashboard.json").read_text())
        wanted = set(re.findall(r"ray_sightline_\w+?(?=_bucket|_sum|_count|[{\[( ]|$)", json.dumps(dashboard)))
        assert wanted
        sent = {name for name in wanted if name in text}
        assert sent >= {"ray_sightline_requests_total", "ray_sightline_in_flight"}, wanted - sent
        # The API's own port has the same metrics, because this config sets metrics_route.
        own = httpx.get(f"http://127.0.0.1:{port}/metrics")
        assert own.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert {name for name in wanted if name in own.text} >= sent
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert errors == f"loading tiny ...\n{STOPPING.decode()}"
    logs = Path("/tmp/ray").glob("session_*/logs/serve/replica_sightline_ingress_*.log")
    newest = max(logs, key=os.path.getmtime).read_text().splitlines()
    record = next(json.loads(entry) for entry in newest if "find-me-again" in entry)
    assert record["request_id"] == "find-me-again"
    assert record["message"] == "GET /v1/models 200"
