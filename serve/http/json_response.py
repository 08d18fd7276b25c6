"""JSON responses. A large one is written in pieces, in a thread, so that the event loop can serve other requests.

The numbers of a response stay arrays until a piece is written. A pydantic object for each number, which is FastAPI's
way, took 1.6 s of the event loop for the similarities of 64 images and 2,048 texts; writing the same arrays takes 0.1 s
in the thread, and delays the event loop by at most a few milliseconds at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.context import RequestContext
from serve.http.errors import ApiError
from serve.service import Service

PIECE_NUMBERS = 8192
"""Numbers in a piece of a response: writing it takes about two milliseconds."""
SMALL = PIECE_NUMBERS
"""Numbers up to which a response is written in the event loop: passing it to the thread would take longer."""


@dataclass(frozen=True)
class LongList:
    """A JSON list in a response, of which pieces are made one after another.

    `make(start, stop)` returns the elements from `start` to `stop`, which may contain numpy's arrays and numbers.
    `numbers` is about how many numbers an element has.
    """

    count: int
    numbers: int
    make: Callable[[int, int], list[Any]]


class JsonResponse(Response):
    """A JSON body in several pieces, which are sent one after another: a slow client holds up nobody else."""

    media_type = "application/json"

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__(None)
        self._pieces = pieces
        self.headers["content-length"] = str(sum(map(len, pieces)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = len(self._pieces) - 1
        for number, piece in enumerate(self._pieces):
            await send({"type": "http.response.body", "body": piece, "more_body": number < last})


async def make_response(content: Any, service: Service, context: RequestContext) -> JsonResponse:
    """Write `content`: what orjson can write, with any `LongList` in its dicts and lists of dicts.

    The body's bytes count against `limits.in_flight_bytes` until the response is sent. Raises `ApiError`, also for a
    body of more than `limits.response_bytes`, and `serve.admission.batcher.Expired`.
    """
    limit = service.config.limits.response_bytes
    size = 0

    def hold(piece: bytes) -> None:
        nonlocal size
        size += len(piece)
        if size > limit:
            raise ApiError(
                "response_too_large",
                f"the response has more than {limit} bytes: ask for fewer labels (top_k), or send fewer items",
            )
        service.admission.add_bytes(context.permit, len(piece))

    steps = _list_steps(content)
    if _count_numbers(content) > SMALL:
        return JsonResponse(await context.work_on(list(steps), hold))
    body = b"".join(step() for step in steps)
    hold(body)
    return JsonResponse([body])


def _count_numbers(content: Any) -> int:
    match content:
        case LongList():
            return content.count * content.numbers
        case dict():
            return sum(map(_count_numbers, content.values()))
        case [dict(), *_]:
            return sum(map(_count_numbers, content))
    return 0


def _list_steps(content: Any) -> Iterator[Callable[[], bytes]]:
    """Functions that write the pieces of `content`, in order, each with about `PIECE_NUMBERS` numbers."""
    writers: list[Callable[[], bytes]] = []
    numbers = 0
    for writer, count in _list_writers(content):
        writers.append(writer)
        numbers += count
        if numbers >= PIECE_NUMBERS:
            yield partial(_join, writers)
            writers, numbers = [], 0
    if writers:
        yield partial(_join, writers)


def _list_writers(content: Any) -> Iterator[tuple[Callable[[], bytes], int]]:
    """Functions that write the parts of `content`, in order, and how many numbers each of them writes."""
    match content:
        case LongList():
            yield partial(bytes, b"["), 0
            rows = max(1, PIECE_NUMBERS // max(1, content.numbers))
            for start in range(0, content.count, rows):
                stop = min(start + rows, content.count)
                yield partial(_write_rows, content, start, stop), (stop - start) * content.numbers
            yield partial(bytes, b"]"), 0
        case dict():
            separator = b"{"
            for name, value in content.items():
                yield partial(bytes, separator + orjson.dumps(name) + b":"), 0
                yield from _list_writers(value)
                separator = b","
            yield partial(bytes, b"}" if content else b"{}"), 0
        case [dict(), *_]:
            separator = b"["
            for value in content:
                yield partial(bytes, separator), 0
                yield from _list_writers(value)
                separator = b","
            yield partial(bytes, b"]"), 0
        case _:
            yield partial(_write, content), 0


def _write_rows(rows: LongList, start: int, stop: int) -> bytes:
    written = _write(rows.make(start, stop))[1:-1]
    return b"," + written if start else written


def _join(writers: list[Callable[[], bytes]]) -> bytes:
    return b"".join(write() for write in writers)


def _write(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
