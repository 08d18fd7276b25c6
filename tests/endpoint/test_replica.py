"""The model's server by itself: what it does with its cores."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from serve.rayserve.replica import ModelServer
from siglip.scoring import Floats
from tests.support.endpoint import make_config


@pytest.fixture(params=[1, 2])
def cores(request: pytest.FixtureRequest) -> Iterator[int]:
    """Cores for a model, and torch's threads as they were afterwards."""
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)


def test_no_core_waits_for_the_end_of_a_batch(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On several cores the next batch is in the model before the one before it has ended; on one they take turns."""
    server = ModelServer(make_config(replicas={"num_cpus": cores}))
    size, batch = server.about.spec.size, server.about.batch_size
    pixels = np.random.default_rng(0).integers(0, 256, (2 * batch, size, size, 3), np.uint8)
    embed, lock, now, most = server.actor.embed, threading.Lock(), 0, 0
    both = threading.Event()

    def embed_slowly(images: NDArray[np.uint8]) -> Floats:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == 2:
                both.set()
        both.wait(60.0 if cores > 1 else 0.2)  # on one core no second batch comes
        try:
            return embed(images)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(server.actor, "embed", embed_slowly)

    async def ask() -> Floats:
        try:
            return (await server.embed_images(pixels, 30.0)).vectors
        finally:
            server.close()

    vectors = asyncio.run(ask())
    assert most == cores
    np.testing.assert_allclose(vectors, embed(pixels), atol=1e-6)
