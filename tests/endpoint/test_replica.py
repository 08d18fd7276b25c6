"""The model server without HTTP: how many batches it computes at the same time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from serve.embedding.model_client import ModelClient
from serve.http.errors import ApiError
from serve.rayserve.replica import ModelServer
from serve.routes.openai import make_card
from serve.schemas import Fingerprint
from siglip.checkpoints.files import CheckpointError
from siglip.scoring import Floats
from siglip.torch_internals import has_vnni
from tests.conftest import require
from tests.support.endpoint import make_config


@pytest.fixture(params=[1, 2])
def cores(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of CPUs of the replica. Afterwards torch's number of threads is as before."""
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)


def test_a_model_in_int8_says_how_near_it_is_to_float32() -> None:
    require("AVX-512 VNNI", None if has_vnni() else "a CPU with AVX-512 VNNI is needed")
    server = ModelServer(make_config(model={"source": "tiny", "dtype": "int8", "compile": False}))
    server.close()
    assert server.about.dtype == "int8"
    assert server.about.min_cosine is not None
    assert 0.999 <= server.about.min_cosine < 1
    about = replace(server.about, min_cosine=0.989996)
    service: Any = SimpleNamespace(about=about, name="a", fingerprint=lambda: Fingerprint(model="b"), search=None)
    assert make_card(service).min_cosine == 0.98999  # never rounded up to a bound
    with pytest.raises(CheckpointError, match=r"model.dtype: int8: .*min_cosine"):
        ModelServer(make_config(model={"source": "tiny", "dtype": "int8", "compile": False, "min_cosine": 0.99999}))


@pytest.mark.parametrize("changed", [{"text_rule": "lowercase"}, {"dtype": "int8"}])
def test_replicas_with_other_numbers_do_not_answer_one_request(changed: dict[str, str]) -> None:
    """During an update, replicas of both settings answer. They have the same checkpoint, and other numbers."""
    if "dtype" in changed:
        require("AVX-512 VNNI", None if has_vnni() else "a CPU with AVX-512 VNNI is needed")
    settings = {"source": "tiny", "compile": False}
    before, after = (ModelServer(make_config(model={**settings, **more})) for more in ({}, changed))
    assert before.about.weights == after.about.weights

    async def ask(server: ModelServer) -> Floats:
        return (await ModelClient(server, before.about).embed_texts(["C++, a dog!"], 30.0)).vectors

    async def ask_both() -> None:
        try:
            assert (await ask(before)).shape == (1, before.about.width)
            with pytest.raises(ApiError, match="the endpoint is changing its model"):
                await ask(after)
        finally:
            before.close()
            after.close()

    asyncio.run(ask_both())


def test_as_many_batches_run_at_the_same_time_as_there_are_cores(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two cores the model gets the second batch before the first one ends; with one core it gets them in turn."""
    server = ModelServer(make_config(replicas={"num_cpus": cores}))
    batch = server.about.batch_size
    pixels = np.random.default_rng(0).integers(0, 256, (2 * batch, *server.about.spec.shape), np.uint8)
    embed, lock, running, peak = server.actor.embed, threading.Lock(), 0, 0
    both = threading.Event()

    def embed_slowly(images: NDArray[np.uint8]) -> Floats:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
            if running == 2:
                both.set()
        both.wait(60.0 if cores > 1 else 0.2)  # with one core no second batch starts meanwhile
        try:
            return embed(images)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(server.actor, "embed", embed_slowly)

    async def embed_two_batches() -> Floats:
        try:
            return (await server.embed_images(pixels, 30.0)).vectors
        finally:
            server.close()

    vectors = asyncio.run(embed_two_batches())
    assert peak == cores
    np.testing.assert_allclose(vectors, embed(pixels), atol=1e-6)
