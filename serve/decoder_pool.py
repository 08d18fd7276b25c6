"""Decoding off the event loop, in processes that may crash."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from serve.admission.batcher import Batcher, Done
from serve.admission.meter import Meter
from siglip.config import ImageSpec, Limits
from siglip.images.decode import Decoded, DecodeMode, ImageRejected
from siglip.images.decoder import Decoder

TOGETHER = 4
"""Images handed to a decoder process at once, at most: waking it costs as much as a third of a small decode."""


class TooManyPixels(Exception):
    """The images of a request have more pixels together than it may have."""


@dataclass
class _Budget:
    """What a request's images may still cost. `spoiled` when one was rejected: nobody wants the others then."""

    pixels: int
    spoiled: bool = False

    def spend(self, outcome: Decoded | ImageRejected) -> None:
        if isinstance(outcome, ImageRejected):
            self.spoiled = True
        else:
            self.pixels -= outcome.width * outcome.height

    @property
    def spent(self) -> bool:
        return self.spoiled or self.pixels < 0


class DecoderPool:
    """`siglip.images.decoder.Decoder`s, each with its thread: the batch job's rule for every image, several at a time.

    Waiting images whose client has gone are not decoded, nor are those of a request of which one was rejected. A
    decoder that hangs is ended after `limits.max_seconds`, for which the images that it was handed together wait.
    """

    def __init__(self, spec: ImageSpec, limits: Limits, mode: DecodeMode, processes: int, meter: Meter) -> None:
        self._free = [Decoder(spec, limits, mode) for _ in range(processes)]
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decoder")
        self._held = 0
        self._batcher: Batcher[tuple[bytes, _Budget], Decoded | ImageRejected | None] = Batcher(
            self._run, TOGETHER, runners=processes, meter=meter
        )

    async def decode(
        self, images: Sequence[bytes], pixels: int, deadline: float, key: str = ""
    ) -> Done[Decoded | ImageRejected | None]:
        """Decode a request's images: for each its pixels, or why not, or None where another was rejected before.

        Raises `TooManyPixels` when they have more than `pixels` together, known only when so many were decoded, and
        `serve.admission.batcher.Expired`.
        """
        budget = _Budget(pixels)
        self._held += len(images)
        try:
            done = await self._batcher.submit([(image, budget) for image in images], deadline, key)
        finally:
            self._held -= len(images)
        if budget.pixels < 0 and not budget.spoiled:
            raise TooManyPixels
        return done

    def count(self) -> int:
        """Images that were taken in and of whose requests not all are decoded."""
        return self._held

    @property
    def died(self) -> int:
        """Runners that ended and were replaced."""
        return self._batcher.died

    def close(self) -> None:
        """End the decoder processes."""
        self._batcher.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for decoder in self._free:
            decoder.close()

    async def _run(self, images: list[tuple[bytes, _Budget]]) -> list[Decoded | ImageRejected | None]:
        wanted = [number for number, (_, budget) in enumerate(images) if not budget.spent]
        outcomes: list[Decoded | ImageRejected | None] = [None] * len(images)
        if wanted:
            decoder = self._free.pop()
            running = asyncio.get_running_loop().run_in_executor(
                self._threads, decoder.decode, [images[number][0] for number in wanted]
            )
            running.add_done_callback(lambda _: self._free.append(decoder))  # also when the waiting is cancelled
            for number, outcome in zip(wanted, await running, strict=True):
                outcomes[number] = outcome
                images[number][1].spend(outcome)
        return outcomes
