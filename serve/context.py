"""The state of one HTTP request, shared by middlewares, routes and the service."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from serve.admission.auth import Quota
from serve.admission.load import Permit
from serve.worker import WorkerThread

Result = TypeVar("Result")
LARGE = 256 * 1024
"""Bytes or characters of input from which it is checked or parsed in the worker thread."""


@dataclass
class RequestContext:
    """One request's id, admission permit and measurements. Headers, metrics and the log line are made from it.

    * `worker` is the ingress's thread for work that would stop the event loop.
    * `started` is on the clock of `time.monotonic`.
    * `key` is the name of the request's API key: None before authentication and on paths that need no key.
    * `images` and `texts` count the items that were given to the model, `stages` the seconds in each stage.
    * `tokens` counts the text tokens that the model read, `truncated` the texts and prompts whose end it did not read.
    * `charged` is what was taken from the key's items a minute. `fetched` and `decoded` count images, `embedded` texts,
      with which this was begun.
    * `code` is the error code of the response, empty for a success.
    * `status` is the HTTP status of the response, 0 before the response has begun.
    * `quotas` has a rate limit's state by unit: `requests` and `items`.
    * `body_received` tells a slow client from a slow model when the deadline passes.

    It does not know the request's headers or body.
    """

    request_id: str
    permit: Permit
    worker: WorkerThread
    started: float = field(default_factory=time.monotonic)
    key: str | None = None
    images: int = 0
    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    charged: int = 0
    fetched: int = 0
    decoded: int = 0
    embedded: int = 0
    code: str = ""
    status: int = 0
    body_received: bool = False
    labels_digest: str | None = None
    stages: dict[str, float] = field(default_factory=dict)
    quotas: dict[str, Quota] = field(default_factory=dict)

    @property
    def queue_key(self) -> str:
        """The queue of `Batcher` and `Fetcher` that the request's work goes to: keys take turns there."""
        return self.key or ""

    @property
    def begun(self) -> int:
        """The images that were fetched or decoded, and the texts that were given to the model."""
        return max(self.fetched, self.decoded) + self.embedded

    def count_decoded(self) -> None:
        """Count an image whose decoding begins."""
        self.decoded += 1

    def count_embedded(self) -> None:
        """Count a text that is given to the model."""
        self.embedded += 1

    async def work(self, function: Callable[..., Result], *arguments: Any, size: int) -> Result:
        """Call a function: at once, or for `LARGE` input in the worker thread when it is the turn of the request's key.

        `size` is that of the input, in bytes or characters. Raises what the function raises, and what
        `serve.worker.WorkerThread.run` raises.
        """
        if size < LARGE:
            return function(*arguments)
        [result] = await self.work_on([partial(function, *arguments)])
        return result

    async def work_on(
        self, steps: Sequence[Callable[[], Result]], check: Callable[[Result], None] = lambda result: None
    ) -> list[Result]:
        """Run steps in the worker thread: see `serve.worker.WorkerThread.run`."""
        return await self.worker.run(steps, self.permit.deadline, self.queue_key, check)

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage. Negative seconds count as 0."""
        self.stages[stage] = self.stages.get(stage, 0.0) + max(0.0, seconds)

    def count_text(self, tokens: int, longest: int, is_cut: bool = False) -> None:
        """Count a text with `tokens` tokens, of which the model reads `longest`. `is_cut`: it had more characters."""
        self.tokens += min(tokens, longest)
        self.truncated += is_cut or tokens > longest
