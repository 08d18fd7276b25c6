"""The ingress's decoders: a decoder has one user at a time, and a dead one costs no sound image."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from serve.admission.batcher import Interrupted
from serve.admission.service_time import ServiceTime
from serve.decoder_pool import DecoderPool
from serve.http.errors import ApiError, image_error
from siglip.config import ImageSpec, Limits
from siglip.images.decode import Decoded, ImageRejected
from siglip.images.decoder import DecoderLost
from siglip.images.decoder_server import DecoderServer
from tests.support.images import encode, make_rgb

LATER = time.monotonic() + 3600


@asynccontextmanager
async def run_pool(processes: int) -> AsyncIterator[DecoderPool]:
    """A pool whose decoders have started."""
    pool = DecoderPool(ImageSpec(size=32), Limits(max_seconds=300), "exact", processes, ServiceTime())
    for decoder in pool._free:
        await asyncio.to_thread(decoder.wait)
    try:
        yield pool
    finally:
        pool.close()


async def decode(pool: DecoderPool, *widths: int) -> list[int | str | None]:
    """The width of each image, or the reason why it was rejected."""
    async with asyncio.timeout(120):
        done = await pool.decode([encode(make_rgb(width, 30)) for width in widths], 10**9, LATER)
    return [
        outcome.width
        if isinstance(outcome, Decoded)
        else outcome.reason
        if isinstance(outcome, ImageRejected)
        else outcome
        for outcome in done.results
    ]


def test_a_decoder_whose_batch_was_cancelled_has_no_second_user_while_it_works() -> None:
    """It was free at once, two threads read from its socket, and requests hung or got each other's images."""

    async def scenario() -> None:
        async with run_pool(2) as pool:
            busy = pool._free[-1]  # the one that is taken first
            assert busy.pid is not None
            os.kill(busy.pid, signal.SIGSTOP)
            try:
                held = asyncio.create_task(decode(pool, 20))
                while len(busy) == 0:
                    await asyncio.sleep(0.01)
                for task in pool._batcher._supervisor._tasks:
                    task.cancel()
                with pytest.raises(Interrupted):
                    await held
                for width in range(21, 27):
                    assert await decode(pool, width) == [width]
                assert busy not in pool._free
            finally:
                os.kill(busy.pid, signal.SIGCONT)
            while busy not in pool._free:
                await asyncio.sleep(0.01)
            assert len(busy) == 0
            assert await asyncio.gather(*(decode(pool, width) for width in range(30, 60))) == [
                [width] for width in range(30, 60)
            ]

    asyncio.run(scenario())


def test_a_decoder_killed_from_outside_costs_no_sound_image(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with run_pool(1) as pool:
            [decoder] = pool._free
            assert decoder.pid is not None
            os.kill(decoder.pid, signal.SIGKILL)
            assert await decode(pool, 20, 21) == [20, 21]

    asyncio.run(scenario())
    assert [record.getMessage() for record in caplog.records] == ["1 decoder processes died and were replaced"]


def test_without_a_decoder_requests_are_unavailable_and_later_ones_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError("a limit on processes")

    async def scenario() -> None:
        async with run_pool(1) as pool:
            [decoder] = pool._free
            decoder.close()
            with monkeypatch.context() as patch:
                patch.setattr(DecoderServer, "start_decoder", refuse)
                with pytest.raises(ApiError) as refused:
                    await decode(pool, 20, 21)
            assert (refused.value.status_code, refused.value.code) == (503, "unavailable")
            assert refused.value.retry_after is not None
            assert await decode(pool, 22, 23) == [22, 23]

    asyncio.run(scenario())


def test_only_an_image_that_is_known_to_be_bad_is_the_clients_fault() -> None:
    lost = image_error(DecoderLost("the decoder server died"), "images.3")
    assert (lost.status_code, lost.code, lost.param) == (503, "unavailable", "images.3")
    assert "retry-after" in lost.headers_out()
    crashed = image_error(ImageRejected("decoder_crashed", "the decoder's exit status was -11"), "images.3")
    assert (crashed.status_code, crashed.code, crashed.param) == (400, "decoder_crashed", "images.3")
