"""Twenty well-behaved clients with two keys, while hostile clients do everything that costs more than it should.

With SIGHTLINE_CHAOS_SECONDS=300 the limits are those of `serve/README.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import yaml

from serve.admission.auth import new_key
from sightline.demo.shapes import LABELS
from tests.support.endpoint import data_uri, shape_png
from tests.support.ports import free_port
from tests.support.ray_cluster import SIGHTLINE

SECONDS = float(os.environ.get("SIGHTLINE_CHAOS_SECONDS", "30"))
"""How long the hostile clients run. Five minutes show leaks that the default does not show."""
QUIET_SECONDS = 10.0
INGRESS = "ray::ServeReplica:sightline:ingress"
BODY = {"image": data_uri(shape_png("red circle")), "label_set": "shapes"}


async def send_requests(url: str, keys: list[str], seconds: float) -> tuple[Counter[int | str], list[float]]:
    """Run twenty clients, each with one request at a time. Returns the statuses and the latencies in seconds."""
    statuses: Counter[int | str] = Counter()
    latencies: list[float] = []
    end = time.monotonic() + seconds

    async def client(key: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"}) as http:
            while time.monotonic() < end:
                started = time.monotonic()
                try:
                    response = await http.post("/v1/classify", json=BODY)
                except httpx.HTTPError as error:
                    statuses[repr(error)] += 1
                    continue
                statuses[response.status_code] += 1
                if response.status_code == 200:
                    latencies.append(time.monotonic() - started)

    await asyncio.gather(*(client(keys[n % 2]) for n in range(20)))
    return statuses, latencies


def measure_memory(server: subprocess.Popen[str], title: str = "") -> float:
    """Return the megabytes of the processes below the command that have `title` in their command line.

    Memory that processes share counts once.
    """
    total = 0.0
    for process in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                total += process.memory_full_info().pss / 1e6
    return total


@pytest.mark.alone
def test_hostile_clients_do_not_slow_down_the_others(tmp_path: Path) -> None:
    (one, first), (two, second), (hostile_key, third) = (new_key(name) for name in ("one", "two", "hostile"))
    (tmp_path / "keys").write_text(f"{first}\n{second}\n{third}\n")
    config = {"label_sets": {"shapes": list(LABELS)}, "auth": {"keys_file": str(tmp_path / "keys")}}
    (tmp_path / "endpoint.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [SIGHTLINE, "serve", str(tmp_path / "endpoint.yaml"), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("ready: ")
        asyncio.run(send_requests(url, [one, two], 3))  # fills the caches
        quiet_statuses, quiet = asyncio.run(send_requests(url, [one, two], QUIET_SECONDS))
        assert quiet_statuses.keys() == {200}
        hostile_command = [sys.executable, "-m", "tests.support.hostile_clients", str(port), hostile_key, str(SECONDS)]
        hostile = subprocess.Popen(hostile_command, stdout=subprocess.PIPE, text=True)
        # In the first third the decoders grow to the largest image, and the buffers to the flood.
        early_statuses, early = asyncio.run(send_requests(url, [one, two], SECONDS / 3))
        before = [measure_memory(server, title) for title in ("", INGRESS)]
        late_statuses, late = asyncio.run(send_requests(url, [one, two], 2 * SECONDS / 3))
        after = [measure_memory(server, title) for title in ("", INGRESS)]
        sent = int(hostile.communicate(timeout=60)[0])
        time.sleep(5)
        after_statuses, calm = asyncio.run(send_requests(url, [one, two], QUIET_SECONDS))
        ready = httpx.get(f"{url}/readyz").status_code
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=90)
    rows = {"quiet": quiet, "chaos, first third": early, "chaos, the rest": late, "afterwards": calm}
    for title, found in rows.items():
        p50, p95, p99 = (1000 * quantile for quantile in np.quantile(found, (0.5, 0.95, 0.99)))
        print(f"{title:20} {len(found):6} responses, p50 {p50:4.0f} ms, p95 {p95:4.0f} ms, p99 {p99:4.0f} ms")
    print(f"{sent} hostile requests; MB of all processes {before[0]:.0f} to {after[0]:.0f}, "
          f"of the ingress {before[1]:.0f} to {after[1]:.0f}; {early_statuses + late_statuses}")  # fmt: skip
    assert sent > SECONDS
    assert (early_statuses + late_statuses).keys() <= {200, 429}
    assert early_statuses[200] + late_statuses[200] > 0.9 * sum((early_statuses + late_statuses).values())
    assert after_statuses.keys() == {200}
    assert ready == 200
    # A short run on a shared machine has wide limits, which noise does not reach: without the protection of the
    # endpoint a median of 54 ms became 5 to 12 s.
    during, afterwards, slack_ms, during_p95 = (3, 1.5, 5, 6) if SECONDS >= 300 else (10, 5, 0, 15)
    usual, chaos, later = (1000 * np.quantile(found, (0.5, 0.95)) for found in (quiet, [*early, *late], calm))
    assert chaos[0] < during * usual[0]
    assert (later < afterwards * usual + slack_ms).all()
    assert chaos[1] < during_p95 * usual[1]
    if SECONDS >= 300:
        assert after[1] < 1.1 * before[1]
    assert after[0] < 1.15 * before[0] + 50
