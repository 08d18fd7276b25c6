"""Decoding of requests' images in decoder processes, whose crashes do not affect the ingress."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from serve.admission.batcher import Batcher, Done
from serve.admission.service_time import ServiceTime
from serve.http.errors import RETRY_AFTER, ApiError
from serve.log import log
from siglip.config import ImageSpec, Limits
from siglip.images.decode import Decoded, DecodeMode, ImageRejected
from siglip.images.decoder import Decoder

TOGETHER = 4
"""Largest number of images passed to a decoder process in one call. Waking the process costs as much as a third of
decoding a small image."""


class TooManyPixels(Exception):
    """The images of a request have more pixels together than `limits.pixels`."""


@dataclass
class _Budget:
    """Pixels that a request's images may still have. `rejected` is set when one was rejected: the request has failed,
    so its other images are not decoded. `begun` is called for each image that is decoded."""

    pixels: int
    begun: Callable[[], None]
    rejected: bool = False

    def spend(self, outcome: Decoded | ImageRejected) -> None:
        """Subtract the pixels of a decoded image, or mark the request as failed."""
        if isinstance(outcome, ImageRejected):
            self.rejected = True
        else:
            self.pixels -= outcome.width * outcome.height

    @property
    def spent(self) -> bool:
        """Whether the request's other images need no decoding, because the request has failed."""
        return self.rejected or self.pixels < 0


class DecoderPool:
    """Pool of `siglip.images.decoder.Decoder` processes, each called in a thread. They decode as in the batch job.

    Queued images are not decoded if their client has disconnected or another image of their request was rejected. A
    decoder that hangs is killed after `limits.max_seconds`; the images of the same call wait for that long. When no
    decoder can be started, `decode` raises `ApiError` (unavailable).
    """

    def __init__(
        self, spec: ImageSpec, limits: Limits, mode: DecodeMode, processes: int, service_time: ServiceTime
    ) -> None:
        self._free = [Decoder(spec, limits, mode) for _ in range(processes)]
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decoder")
        self._pending = 0
        self._batcher: Batcher[tuple[bytes, _Budget], Decoded | ImageRejected | None] = Batcher(
            self._run, TOGETHER, runners=processes, service_time=service_time
        )

    async def decode(
        self,
        images: Sequence[bytes],
        pixels: int,
        deadline: float,
        key: str = "",
        begun: Callable[[], None] = lambda: None,
    ) -> Done[Decoded | ImageRejected | None]:
        """Decode a request's images. A result is the pixels, the rejection, or None for an image that was skipped.

        An image is skipped when another image of the request was rejected before. `deadline` is a time of
        `time.monotonic`. Requests with different `key` take turns. `begun` is called for each image that is decoded.
        Raises `TooManyPixels` when the images have more than `pixels` together, which is known only after that many
        pixels were decoded, and `serve.admission.batcher.Expired` when the deadline passed before decoding started.
        """
        budget = _Budget(pixels, begun)
        self._pending += len(images)
        try:
            done = await self._batcher.submit([(image, budget) for image in images], deadline, key)
        finally:
            self._pending -= len(images)
        if budget.pixels < 0 and not budget.rejected:
            raise TooManyPixels
        return done

    def count(self) -> int:
        """Return the number of images of all requests that are not completely decoded."""
        return self._pending

    @property
    def died(self) -> int:
        """Batch runners that ended and were replaced since the start."""
        return self._batcher.died

    def close(self) -> None:
        """Stop the decoder processes. Queued images are never decoded."""
        self._batcher.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for decoder in self._free:
            decoder.close()

    async def _run(self, images: list[tuple[bytes, _Budget]]) -> list[Decoded | ImageRejected | None]:
        wanted = [number for number, (_, budget) in enumerate(images) if not budget.spent]
        outcomes: list[Decoded | ImageRejected | None] = [None] * len(images)
        for number in wanted:
            images[number][1].begun()
        if wanted:
            decoding = asyncio.get_running_loop().run_in_executor(
                self._threads, self._decode, [images[number][0] for number in wanted]
            )
            for number, outcome in zip(wanted, await decoding, strict=True):
                outcomes[number] = outcome
                images[number][1].spend(outcome)
        return outcomes

    def _decode(self, images: list[bytes]) -> list[Decoded | ImageRejected]:
        """Decode images with a free decoder, in one of the pool's threads.

        The thread itself takes the decoder and puts it back. A cancelled future looks done while its thread still runs.
        There are as many threads as decoders, so one is always free.
        """
        decoder = self._free.pop()
        deaths = decoder.deaths
        try:
            return decoder.decode(images)
        except (OSError, RuntimeError) as error:
            log.exception("no decoder process could be started")
            raise ApiError("unavailable", "no decoder is running: try again", retry_after=RETRY_AFTER) from error
        finally:
            if decoder.deaths > deaths:
                log.warning("%d decoder processes died and were replaced", decoder.deaths - deaths)
            self._free.append(decoder)
