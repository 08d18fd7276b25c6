"""Speed of reading loose images from an object store, by the store's latency.

    python -m benchmarks.latency --images 600

Uses a real S3 server on loopback (see CONTRIBUTING.md), behind a proxy that delays each request. Reads the same photos
as planned objects (one request each) and as names from a list (two requests each), at several latencies in turns. The
photos are not decoded. The proxy and the server use the same cores as the reader.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.photos import make_photo
from pipelines.config import ParquetConfig
from pipelines.inputs.images import fetch_images
from pipelines.inputs.rows import Input, Reading
from storage.schemes import open_store
from storage.store import StoreOptions
from tests.support.stores.delay_proxy import delay_proxy
from tests.support.stores.radosgw import Radosgw

LATENCIES_MS = (0, 5, 30)
TURNS = 3
"""Measurements for each latency, of which the fastest counts."""


def main() -> None:
    """Measure, and print one line for each kind of input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=600)
    images: int = parser.parse_args().images
    photo = make_photo(np.random.default_rng(0))
    with tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp") as folder:
        server = Radosgw(Path(folder))
        os.environ.update(server.env)
        try:
            bucket = f"s3://{server.new_bucket()}"
            store = open_store(bucket, StoreOptions(server.endpoint, "us-east-1"))
            entries = [store.put(f"{bucket}/{number}.jpg", photo) for number in range(images)]
            inputs = {
                "planned": [Input("image", e.uri, e.uri, e.size, e.etag) for e in entries],
                "listed": [Input("uri", e.uri, e.uri, -1, "") for e in entries],
            }
            seconds: dict[tuple[str, int], float] = defaultdict(lambda: float("inf"))
            for _ in range(TURNS):
                for latency in LATENCIES_MS:
                    with delay_proxy(server.endpoint, latency / 1000) as proxy:
                        reading = Reading(StoreOptions(proxy.endpoint, "us-east-1"), 2**26, ParquetConfig())
                        for kind, planned in inputs.items():
                            start = time.perf_counter()
                            assert all(row.data for row in fetch_images(planned, reading))
                            seconds[kind, latency] = min(seconds[kind, latency], time.perf_counter() - start)
        finally:
            server.stop()
    for kind in inputs:
        rates = {latency: images / seconds[kind, latency] for latency in LATENCIES_MS}
        said = ", ".join(f"{ms} ms: {rate:.0f} images/s ({rate / rates[0]:.0%})" for ms, rate in rates.items())
        print(f"{kind}: {said}")


if __name__ == "__main__":
    main()
