"""Twenty well-behaved clients on two keys beside a mob that leaves, stalls, floods, and sends bombs and garbage."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from serve.admission.auth import new_key
from sightline.demo.shapes import LABELS
from tests.support.endpoint import data_uri, shape_png
from tests.support.ports import free_port
from tests.support.ray_cluster import SIGHTLINE

SECONDS = float(os.environ.get("SIGHTLINE_CHAOS_SECONDS", "30"))
"""Of the mob. Five minutes show leaks that this does not."""
QUIET_SECONDS = 10.0
BODY = {"image": data_uri(shape_png("red circle")), "label_set": "shapes"}


async def ask(url: str, keys: list[str], seconds: float) -> tuple[Counter[int | str], list[float]]:
    """Twenty clients, who ask one thing after another: statuses and latencies."""
    statuses: Counter[int | str] = Counter()
    latencies: list[float] = []
    end = time.monotonic() + seconds

    async def client(key: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"}) as http:
            while time.monotonic() < end:
                started = time.monotonic()
                try:
                    answer = await http.post("/v1/classify", json=BODY)
                except httpx.HTTPError as error:
                    statuses[repr(error)] += 1
                    continue
                statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    latencies.append(time.monotonic() - started)

    await asyncio.gather(*(client(keys[n % 2]) for n in range(20)))
    return statuses, latencies


def memory_of(server: subprocess.Popen[str]) -> float:
    """Megabytes of all that the command started, shared ones once."""
    total = 0.0
    for process in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss / 1e6
    return total


@pytest.mark.alone
def test_a_mob_spoils_it_for_nobody(tmp_path: Path) -> None:
    (one, first), (two, second), (mob_key, third) = (new_key(name) for name in ("one", "two", "mob"))
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
        asyncio.run(ask(url, [one, two], 3))  # caches, and the first of everything
        quiet_statuses, quiet = asyncio.run(ask(url, [one, two], QUIET_SECONDS))
        assert quiet_statuses.keys() == {200}
        mob_command = [sys.executable, "-m", "tests.support.hostile_clients", str(port), mob_key, str(SECONDS)]
        mob = subprocess.Popen(mob_command, stdout=subprocess.PIPE, text=True)
        # Decoders grow to what the largest image needs, and buffers to what a flood does: that is the first third.
        early_statuses, early = asyncio.run(ask(url, [one, two], SECONDS / 3))
        before = memory_of(server)
        late_statuses, late = asyncio.run(ask(url, [one, two], 2 * SECONDS / 3))
        after = memory_of(server)
        asked = int(mob.communicate(timeout=60)[0])
        time.sleep(5)
        after_statuses, calm = asyncio.run(ask(url, [one, two], QUIET_SECONDS))
        ready = httpx.get(f"{url}/readyz").status_code
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=90)
    medians = [1000 * statistics.median(found) for found in (quiet, [*early, *late], calm)]
    print(f"median ms quiet, chaos, afterwards {medians}; {asked} of the mob; {before:.0f} to {after:.0f} MB")
    print(early_statuses + late_statuses)
    assert asked > SECONDS
    assert (early_statuses + late_statuses).keys() <= {200, 429}
    assert early_statuses[200] + late_statuses[200] > 0.9 * sum((early_statuses + late_statuses).values())
    assert after_statuses.keys() == {200}
    assert ready == 200
    # In a short run on a machine which others use too, bars that it does not reach by itself: spoilt was 54 ms that
    # became 5 to 12 s.
    during, afterwards, slack_ms = (3, 1.5, 5) if SECONDS >= 300 else (10, 5, 0)
    assert medians[1] < during * medians[0], medians
    assert medians[2] < afterwards * medians[0] + slack_ms, medians
    assert after < 1.15 * before + 50, (before, after)
