"""The hosts that a reader fetches from: how many requests each gets, and which are left alone for a while."""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from storage.web.guard import Resolver

FAILURES, PAUSES = 10, 8
"""After so many requests in a row without an answer, or so many pauses in a row that a host has asked for, its other
images are not tried for `REST_SECONDS`. A dead host costs a few timeouts then, and not one for each of its images."""
REST_SECONDS = 300.0
BACKOFF_SECONDS, LONGEST_SECONDS = 0.5, 60.0
"""The first pause after a failure, which doubles each time, and the longest pause."""
ADDRESS_SECONDS = 60.0
"""How long the addresses of a host are kept. A list often has many images of one host one after the other, and a
resolver that is asked for each of them answers late, or that there is no such host."""
_HOSTS = 10_000
"""The most hosts of which something is kept."""


def back_off(failures: int) -> float:
    """Return the seconds to wait after so many failures: exponential, with a random part, and bounded."""
    return min(LONGEST_SECONDS, BACKOFF_SECONDS * 2.0 ** min(failures, 16) * random.uniform(0.5, 1.5))


@dataclass
class Host:
    """What is known of a host: its free slots, its latest failures, and until when it is left alone.

    `failures` counts the requests in a row without an answer, and `pauses` the times in a row that it asked for fewer
    requests. `resting` and `paused` are times of `time.monotonic`. A host that rests is not asked at all, because it
    seems to be dead or has asked for a long pause. The images of a host that is paused wait for the end of the pause.
    `users` counts the images that are tried now.
    """

    slots: asyncio.Semaphore
    failures: int = 0
    pauses: int = 0
    resting: float = 0.0
    paused: float = 0.0
    users: int = 0

    def note_answer(self) -> None:
        """Note that the host has answered for an image, whatever the answer is."""
        self.failures = self.pauses = 0

    def note_failure(self) -> None:
        """Note a request that the host did not answer."""
        self.failures += 1
        if self.failures >= FAILURES:
            self.rest(REST_SECONDS)

    def slow_down(self, seconds: float | None) -> None:
        """Note that the host has asked for fewer requests, and for a pause of this length, if it named one."""
        now = time.monotonic()
        if seconds is not None and seconds > LONGEST_SECONDS:
            self.rest(seconds)
            return
        new = self.paused <= now  # else this is the answer to a request that was made before the pause
        if seconds is not None:
            self.paused = max(self.paused, now + seconds)
        elif new:
            self.paused = now + back_off(self.pauses)
        if new:  # also if the host named it: else its images would wait for each other's pauses for days
            self.pauses += 1
            if self.pauses >= PAUSES:
                self.rest(REST_SECONDS)

    def rest(self, seconds: float) -> None:
        """Do not ask the host for so long."""
        self.resting = max(self.resting, time.monotonic() + seconds)

    def is_resting(self) -> bool:
        """Whether no image is to be tried now."""
        return self.resting > time.monotonic()


class Hosts:
    """The hosts of a reader, by name. Those that were not used for the longest time are forgotten."""

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._hosts: OrderedDict[str, Host] = OrderedDict()

    def of(self, name: str) -> Host:
        """Return the host with this name."""
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = Host(asyncio.Semaphore(self._connections))
            oldest = next(iter(self._hosts))
            if len(self._hosts) > _HOSTS and not self._hosts[oldest].users:
                del self._hosts[oldest]
        self._hosts.move_to_end(name)
        return host


@dataclass
class CachedResolver:
    """A resolver that asks another one once for a host, also if many ask for the host at the same time.

    Only answers are kept, for `ADDRESS_SECONDS`, and no failures. The guard checks the addresses at each connection.
    """

    resolver: Resolver
    _asked: OrderedDict[str, tuple[float, asyncio.Future[Sequence[str]]]] = field(default_factory=OrderedDict)

    async def __call__(self, host: str) -> Sequence[str]:
        """Return the addresses of a host. Raises `OSError`."""
        until, answer = self._asked.get(host, (0.0, None))
        if answer is None or until < time.monotonic() or (answer.done() and answer.exception() is not None):
            answer = asyncio.ensure_future(self.resolver(host))
            # A failure that nobody waits for any more is no error of this program, and asyncio is not to report it.
            answer.add_done_callback(lambda done: None if done.cancelled() else done.exception())
            self._asked[host] = time.monotonic() + ADDRESS_SECONDS, answer
            if len(self._asked) > _HOSTS:
                self._asked.popitem(last=False)
        return await asyncio.shield(answer)  # one that gives up must not end the look-up of the others
