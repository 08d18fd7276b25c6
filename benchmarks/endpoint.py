"""Benchmarks of the endpoint against its limits.

    python -m benchmarks.endpoint tiny     HTTP is the limit: compares with a bare FastAPI + Ray Serve app that only
                                           decodes
    python -m benchmarks.endpoint base     the model is the limit: compares with the encoder alone and, if installed,
                                           with infinity-emb and the same weights (--infinity .../bin/infinity_emb)
    python -m benchmarks.endpoint labels   the same request with 1,000 labels, ten times
    python -m benchmarks.endpoint overload four times as many clients as the endpoint admits, which retry at once

Every figure comes from one run on one machine; compare ratios, not figures of different runs. The load generator runs
on the same cores as the endpoint.

Install infinity-emb==0.0.78 into its own virtual environment, with sentencepiece, protobuf and aiohttp, and without
torchvision.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks.photos import make_photo
from sightline.demo.shapes import LABELS
from siglip.checkpoints.architectures import init_checkpoint
from siglip.encoder import CPU_BATCH

CLIENTS = 64
READY_SECONDS = 600
"""How long infinity-emb may take to start."""
ROUNDS = 3
"""How often the endpoint and the encoder alone are measured in turn, because a shared machine's speed varies."""
RESPONSE_SECONDS = 15.0
"""Longest latency of a model-bound response that the number of clients aims at: half of the endpoint's deadline."""


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def server(command: list[str], folder: Path, checkout: Path | None = None) -> Iterator[str]:
    """Run a server in its own process until the `with` block ends. Yields the line "ready..." that the server prints.

    If `checkout` is given, it is another version of this repository, and the server runs its code.
    """
    log = folder / f"server-{free_port()}.log"
    environment = {**os.environ, "PYTHONPATH": str(checkout)} if checkout else None
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=output, text=True, cwd=checkout, env=environment
        )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready"):
                yield line
                break
        else:
            raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


@contextmanager
def endpoint(folder: Path, checkout: Path | None = None, **config: Any) -> Iterator[tuple[int, str]]:
    """Run `sightline serve` with this config. Yields the port and the metrics' URL.

    With `checkout` it is that of another checkout, which should have a `.venv` of its own: HAProxy's launcher is one of
    the commands in it.
    """
    path, port = folder / "endpoint.yaml", free_port()
    path.write_text(yaml.safe_dump({"label_sets": {"shapes": list(LABELS)}, **config}))
    own = checkout / ".venv" / "bin" / "python" if checkout else None
    python = str(own) if own and own.exists() else sys.executable
    command = [python, "-m", "sightline", "serve", str(path), "--port", str(port)]
    with server(command, folder, checkout) as ready:
        yield port, re.findall(r"http://\S+/metrics", ready)[0]


def load(
    port: int,
    body: bytes,
    folder: Path,
    seconds: float,
    clients: int = CLIENTS,
    path: str = "/v1/classify",
    warm: float = 2.0,
) -> dict[str, Any]:
    """Generate load from another process. Requests of the first `warm` seconds do not count."""
    file = folder / "body.json"
    file.write_bytes(body)
    command = [sys.executable, "-m", "benchmarks.load", f"127.0.0.1:{port}", path, str(file)]
    command += [str(clients), str(warm), str(seconds)]
    text = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(text.stdout)
    return result


def batch_fill(url: str) -> float:
    """Return the mean of images per forward pass / batch size since the server started, read from its metrics."""
    with urllib.request.urlopen(url) as response:
        lines = [line for line in response.read().decode().splitlines() if 'kind="image"' in line]
    total, count = (
        sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"ray_sightline_batch_fill_{name}"))
        for name in ("sum", "count")
    )
    return total / count if count else float("nan")


def photo_body(width: int = 640, height: int = 480) -> bytes:
    """Return the JSON body of a classification request with a JPEG photo."""
    photo = base64.b64encode(make_photo(np.random.default_rng(0), width, height)).decode()
    return json.dumps({"image": f"data:image/jpeg;base64,{photo}", "label_set": "shapes"}).encode()


def print_load(title: str, result: dict[str, Any], note: str = "") -> None:
    """Print one line of the report."""
    print(
        f"{title:38} {result['rate']:8.2f} /s   p50 {result['p50']:7.1f} ms   p99 {result['p99']:7.1f} ms  "
        f"{result['statuses']}  {note}",
        flush=True,
    )


def measure_tiny(
    folder: Path, seconds: float, old: Path | None, counts: list[int], ingresses: list[int], size: str
) -> None:
    """Benchmark with the tiny checkpoint, where HTTP is the limit, in turn with the bare app and another version."""
    width, height = size.split("x")
    body = photo_body(int(width), int(height))
    rates: dict[str, list[float]] = {"bare": [], "old": [], "ours": []}
    for _ in range(2):
        port = free_port()
        with server([sys.executable, "-m", "benchmarks.bare", str(port)], folder):
            result = load(port, body, folder, seconds, clients=counts[-1])
            rates["bare"].append(result["rate"])
            print_load("bare FastAPI + Ray Serve, decodes only", result)
        if old:
            with endpoint(folder, old) as (port, _metrics):
                for count in counts:
                    result = load(port, body, folder, seconds, clients=count)
                    print_load(f"the other version, {count} clients", result)
                    if count == counts[-1]:
                        rates["old"].append(result["rate"])
        for number in ingresses:
            with endpoint(folder, ingress={"min": number}) as (port, metrics):
                for count in counts:
                    result = load(port, body, folder, seconds, clients=count)
                    print_load(f"{number} ingress, {count} clients", result, f"batch fill {batch_fill(metrics):.0%}")
                    if count == counts[-1] and number == ingresses[0]:
                        rates["ours"].append(result["rate"])
    cores, ours = len(os.sched_getaffinity(0)), statistics.mean(rates["ours"])
    print(f"{ours / cores:.0f} requests/s per core, with the load generator on the same {cores} cores")
    for name, title in (("bare", "the bare app's"), ("old", "the other version's")):
        if rates[name]:
            print(f"the endpoint has {ours / statistics.mean(rates[name]):.2f} times {title} rate")


_ALONE = """
import sys, torch
from benchmarks.batch import encoder_rate
from siglip.checkpoint import pin_model
from siglip.config import ModelConfig
from siglip.encoder import Encoder
torch.set_num_threads(int(sys.argv[3]))
print(encoder_rate(Encoder(pin_model(ModelConfig(source=sys.argv[1], compile=sys.argv[2] == "True")), texts=False), 30))
"""


@contextmanager
def infinity(program: str, directory: Path, folder: Path) -> Iterator[int]:
    """Run infinity-emb with a checkpoint's weights, as its documentation says. Yields the port."""
    port = free_port()
    command = [program, "v2", "--model-id", str(directory), "--served-model-name", "base", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--device", "cpu", "--engine", "torch", "--batch-size", "16"]
    with (folder / "infinity.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(READY_SECONDS):
            time.sleep(1)
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            if process.poll() is not None:
                raise RuntimeError(f"infinity did not start: {(folder / 'infinity.log').read_text()[-2000:]}")
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def measure_base(folder: Path, seconds: float, compile: bool, program: str | None) -> None:
    """Benchmark with random weights of siglip-base-patch16-256's architecture, where the model is the limit."""
    directory = folder / "base"
    init_checkpoint(directory, "base")
    cores = str(len(os.sched_getaffinity(0)))

    def alone() -> float:
        command = [sys.executable, "-c", _ALONE, str(directory), str(compile), cores]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    # Enough clients for two full batches at all times, but few enough that responses meet their deadline. Counting
    # starts when batches are full, and lasts for thirty batches in total.
    limits = [alone()]
    clients = max(2 * CPU_BATCH, min(CLIENTS, int(RESPONSE_SECONDS * limits[0])))
    warm, seconds = 3 * CPU_BATCH / limits[0], max(seconds, 30 * CPU_BATCH / limits[0]) / ROUNDS
    rates = []
    for _ in range(ROUNDS):
        with endpoint(folder, model={"source": str(directory), "compile": compile}) as (port, metrics):
            result = load(port, photo_body(), folder, seconds, clients, warm=warm)
            print_load(f"the endpoint, {clients} clients", result, f"batch fill {batch_fill(metrics):.0%}")
        rates.append(result["rate"])
        limits.append(alone())
        print(f"{'encoder alone, before and after':38} {limits[-2]:8.2f} and {limits[-1]:.2f} /s", flush=True)
    ours = statistics.mean(rates)
    print(f"the endpoint has {ours / statistics.mean(limits):.0%} of the encoder's rate")
    if program:
        image = json.loads(photo_body())["image"]
        body = json.dumps({"model": "base", "input": [image], "modality": "image"}).encode()
        with infinity(program, directory, folder) as port:
            theirs = load(port, body, folder, seconds, clients, path="/embeddings", warm=warm)
        note = f"the endpoint has {ours / theirs['rate']:.1f} times that" if theirs["rate"] else "no success"
        print_load(f"infinity-emb, {clients} clients", theirs, note)


def measure_labels(folder: Path) -> None:
    """Benchmark of the label cache: the same 1,000 labels ten times."""
    photo = base64.b64encode(make_photo(np.random.default_rng(0))).decode()
    labels = [f"{color} {n}" for n in range(250) for color in ("red", "green", "blue", "black")]
    body = json.dumps({"image": photo, "labels": labels, "top_k": 5}).encode()
    with endpoint(folder) as (port, _):
        for number in range(1, 11):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/classify", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as response:
                result, timing = json.load(response), response.headers["server-timing"]
            print(f"request {number:2}: {result['usage']['prompt_tokens']:6} text tokens   {timing}")


def measure_overload(folder: Path, seconds: float) -> None:
    """Benchmark with four times as many clients as the endpoint admits, which send the next request immediately."""
    admitted = 64
    limits = {"requests": admitted}
    body = photo_body()
    with endpoint(folder, limits=limits) as (port, _):
        print_load("before, one client", load(port, body, folder, 5, clients=1))
        load(port, body, folder, seconds / 4, clients=4 * admitted)
        before = resident_megabytes()  # under load, when caches and buffers have grown to what this load needs
        print_load(f"{4 * admitted} clients", load(port, body, folder, seconds, clients=4 * admitted))
        after = resident_megabytes()
        print_load("afterwards, one client", load(port, body, folder, 5, clients=1))
    for title, megabytes in before.items():
        print(f"{title:38} {megabytes:8.0f} MB after a quarter of the time, {after.get(title, 0):.0f} MB at the end")


def resident_megabytes() -> dict[str, float]:
    """Return the resident memory in MB of the proxy and the replicas that this process started, by process title."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline()).strip().partition(".")[0]
            if title.startswith(("ray::Proxy", "ray::ServeReplica")):
                found[title] = process.memory_info().rss / 1e6
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["tiny", "base", "labels", "overload"])
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--old", type=Path, help="A checkout of another version to compare with.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, CLIENTS])
    parser.add_argument("--ingresses", type=int, nargs="+", default=[1])
    parser.add_argument("--size", default="640x480", help="Width and height of the photo, for tiny.")
    parser.add_argument("--infinity", help="The program infinity_emb, in its own virtual environment.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.what == "tiny":
            measure_tiny(
                Path(temporary),
                arguments.seconds or 15,
                arguments.old,
                arguments.clients,
                arguments.ingresses,
                arguments.size,
            )
        elif arguments.what == "base":
            measure_base(Path(temporary), arguments.seconds or 60, not arguments.no_compile, arguments.infinity)
        elif arguments.what == "overload":
            measure_overload(Path(temporary), arguments.seconds or 60)
        else:
            measure_labels(Path(temporary))
