"""Decoding off the event loop, in processes that may crash."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from serve.batcher import Batcher, Done
from siglip.config import ImageSpec, Limits
from siglip.decoder import Decoder
from siglip.images import Decoded, DecodeMode, ImageRejected

TOGETHER = 4
"""Images handed to a decoder process at once, at most: waking it costs as much as a third of a small decode."""


class DecoderPool:
    """`siglip.decoder.Decoder`s, each with its thread: the batch job's rule for every image, several at a time.

    Waiting images whose client has gone are not decoded. A decoder that hangs is ended after `limits.max_seconds`, for
    which the images that it was handed together wait.
    """

    def __init__(self, spec: ImageSpec, limits: Limits, mode: DecodeMode, processes: int) -> None:
        self._free = [Decoder(spec, limits, mode) for _ in range(processes)]
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decoder")
        self._batcher: Batcher[bytes, Decoded | ImageRejected] = Batcher(self._run, TOGETHER, runners=processes)

    async def decode(self, images: Sequence[bytes], deadline: float) -> Done[Decoded | ImageRejected]:
        """Decode images: for each its pixels, or why not. Raises `serve.batcher.Expired`."""
        return await self._batcher.submit(images, deadline)

    def close(self) -> None:
        """End the decoder processes."""
        self._batcher.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for decoder in self._free:
            decoder.close()

    async def _run(self, images: list[bytes]) -> list[Decoded | ImageRejected]:
        decoder = self._free.pop()
        running = asyncio.get_running_loop().run_in_executor(self._threads, decoder.decode, images)
        running.add_done_callback(lambda _: self._free.append(decoder))  # also when the waiting is cancelled
        return await running
