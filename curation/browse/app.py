"""The web app of the page on which people look through an output."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from curation.browse.actions import Answers, Export, check_positions, list_ids
from curation.browse.follow import Follower
from curation.browse.query import BrowseQuery, Embedder
from curation.browse.results import BINS, FIRST, Result, Searcher, describe_rows
from curation.browse.snapshot import Snapshot
from curation.export.export import TARGETS
from curation.local_page import IMAGE_HEADERS, make_local_app
from curation.tagged_output import ID, INPUT_ID, read_embeddings
from storage.settings import ConfigError

_PAGE = Path(__file__).parent / "page"
_MOST_ROWS, _MOST_REJECTS = 500, 500
"""Images and rejected images that are sent with one response."""
_IMAGE_BYTES = 32 * 2**20
_SCORES = 12
"""Labels whose scores are shown beside an image."""
T = TypeVar("T")


class Selected(BaseModel):
    """Some images, by their positions."""

    model_config = ConfigDict(extra="forbid")

    positions: list[int] = Field(min_length=1)


class SelectedAnswers(Selected):
    """An answer about a label for each of some images."""

    label: str
    answer: Literal["right", "wrong", "taken back"]


class SelectedExport(Selected):
    """Where some images are exported to."""

    target: str
    destination: str
    thumbnails: bool = False


def make_app(follower: Follower, embedder: Embedder, answers: Path, review: FastAPI | None = None) -> FastAPI:
    """Make the app: the page and its API. The follower has been started.

    `answers` is the file that answers are appended to. With `review`, the app of a sample's review is at `/review/`.
    Positions belong to this process and to one output: a page that was opened before, or before another output took the
    place of the first one, is told to load again.
    """
    app = make_local_app(_PAGE)
    run = uuid.uuid4().hex[:12]
    searcher, saved, export = Searcher(embedder), Answers(answers), Export()

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Any, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return JSONResponse({"detail": f"{place}: {first['msg']}"}, 422)

    def name_run(snapshot: Snapshot) -> str:
        return f"{run}-{snapshot.number}"

    def check(of: str) -> Snapshot:
        snapshot = follower.snapshot
        if of != name_run(snapshot):
            raise HTTPException(
                410, "this page belongs to an earlier run of the command, or to another output: load it again"
            )
        return snapshot

    def find_result(name: str) -> Result:
        found = searcher.get(name)
        if found is None:
            raise HTTPException(409, "the result is no longer there: search again")
        return found

    @app.get("/api/about")
    def describe() -> JSONResponse:
        """Send what the output is, how far it was copied, and why images were rejected."""
        snapshot, state = follower.snapshot, follower.state
        reasons = Counter(snapshot.rejects["reason"].to_pylist())
        return JSONResponse(
            {
                "run": name_run(snapshot),
                "output": snapshot.output.uri,
                "model": snapshot.output.model,
                "version": snapshot.version,
                "copied": state.copied,
                "wanted": state.wanted,
                "as_of": state.complete,
                "problem": state.problem,
                "labels": snapshot.output.labels.label_names(),
                "thresholds": _find_thresholds(snapshot),
                "rejected": dict(reasons.most_common()),
                "thumbnails": snapshot.has_thumbnails,
                "bins": BINS,
                "folded_among": FIRST,
                "targets": list(TARGETS),
                "answers": str(answers),
                "review": review is not None,
            }
        )

    @app.post("/api/search/{of}")
    def search(of: str, query: BrowseQuery) -> JSONResponse:
        """Answer a query. The images are fetched by the name of the result."""
        snapshot = check(of)
        result, seconds = _try(lambda: searcher.search(query, snapshot))
        found = result.found
        return JSONResponse(
            {
                "result": result.name,
                "version": snapshot.version,
                "count": result.count,
                "found": len(found.positions),
                "searched": found.searched,
                "left_out": found.left_out,
                "cutoff": found.cutoff,
                "best": found.best,
                "labels": found.label_counts.tolist(),
                "unlabelled": found.unlabelled,
                "histograms": found.histograms,
                "rows": describe_rows(result, 0, 60),
                "ms": round(1000 * seconds, 1),
            }
        )

    @app.get("/api/rows/{of}/{name}")
    def send_rows(of: str, name: str, start: int, stop: int) -> JSONResponse:
        """Send the images from `start` to `stop` of a result."""
        check(of)
        if not 0 <= start <= stop <= start + _MOST_ROWS:
            raise HTTPException(422, f"start and stop: at most {_MOST_ROWS} images at once")
        return JSONResponse(describe_rows(find_result(name), start, stop))

    @app.get("/api/positions/{of}/{name}")
    def send_positions(of: str, name: str) -> Response:
        """Send the positions of all images of a result, in their order, as int32 in the order of bytes of this page."""
        check(of)
        positions = find_result(name).all_positions().astype("<i4")
        return Response(positions.tobytes(), media_type="application/octet-stream")

    @app.get("/api/thumbnail/{of}/{position}")
    def send_thumbnail(of: str, position: int) -> Response:
        """Send a row's thumbnail. The run is in the path, so that caches keep runs apart."""
        snapshot = check(of)
        if not 0 <= position < snapshot.rows:
            raise HTTPException(404)
        thumbnail = snapshot.thumbnail(position)
        if thumbnail is None:
            raise HTTPException(404)
        return Response(thumbnail, media_type="image/jpeg", headers=IMAGE_HEADERS)

    @app.get("/api/image/{of}/{position}")
    def describe_image(of: str, position: int) -> JSONResponse:
        """Send what the output has about an image, and its scores."""
        snapshot = check(of)
        if not 0 <= position < snapshot.rows:
            raise HTTPException(404)
        return JSONResponse(_describe_image(snapshot, position))

    @app.get("/api/rejects/{of}")
    def send_rejects(of: str, reason: str, start: int = 0) -> JSONResponse:
        """Send images that could not be tagged for one reason, from `start` on."""
        snapshot = check(of)
        rows = snapshot.rejects.filter(pa.compute.equal(snapshot.rejects["reason"], reason))
        return JSONResponse({"count": rows.num_rows, "rows": rows.slice(max(0, start), _MOST_REJECTS).to_pylist()})

    @app.post("/api/upload/{of}")
    async def upload(of: str, request: Request) -> JSONResponse:
        """Take an image, to search for images like it. Sends a token for it. A body that is too large is not held."""
        snapshot = check(of)
        data, size = bytearray(), 0
        async for part in request.stream():  # to its end, because browsers show no response before they have sent all
            size += len(part)
            if size <= _IMAGE_BYTES:
                data += part
        if size > _IMAGE_BYTES:
            raise HTTPException(413, f"the image has more than {_IMAGE_BYTES >> 20} MiB")
        token = await run_in_threadpool(_try, lambda: embedder.add_image(bytes(data), snapshot))
        return JSONResponse({"image": token})

    @app.post("/api/moved/{of}")
    def send_moved(of: str, selected: Selected) -> JSONResponse:
        """Send where some images are now, -1 for those that are no longer in the output: see `Snapshot.find_live`."""
        snapshot = check(of)
        positions = _try(lambda: check_positions(snapshot, selected.positions))
        return JSONResponse(snapshot.find_live(positions).tolist())

    @app.post("/api/list/{of}")
    def send_list(of: str, selected: Selected) -> Response:
        """Send the ids of some images, one on each line, as `sightline export --keep` takes them."""
        snapshot = check(of)
        ids = _try(lambda: list_ids(snapshot, selected.positions))
        return Response("".join(f"{id_}\n" for id_ in ids), media_type="text/plain; charset=utf-8")

    @app.post("/api/answers/{of}")
    def save(of: str, selected: SelectedAnswers) -> JSONResponse:
        """Append answers about some images. They are on disk before the response is sent."""
        snapshot = check(of)
        count = _try(lambda: saved.add(snapshot, selected.positions, selected.label, selected.answer))
        return JSONResponse({"saved": count, "file": str(answers), "next": saved.suggest(snapshot)})

    @app.post("/api/export/{of}")
    def start_export(of: str, selected: SelectedExport) -> JSONResponse:
        """Start to export some images. `GET /api/export` says how far it is."""
        snapshot = check(of)
        _try(
            lambda: export.start(
                snapshot, selected.positions, selected.target, selected.destination, thumbnails=selected.thumbnails
            )
        )
        return JSONResponse(export.describe())

    @app.get("/api/export")
    def describe_export() -> JSONResponse:
        return JSONResponse(export.describe())

    @app.delete("/api/export")
    def cancel_export() -> JSONResponse:
        """Cancel the export that is under way. It ends with its next images: `GET /api/export` says when it has."""
        export.cancel()
        return JSONResponse(export.describe())

    if review is not None:
        app.mount("/review", review)
    return app


def _try(function: Callable[[], T]) -> T:
    """Call a function, and answer 422 with the message of the `ConfigError` that it raises."""
    try:
        return function()
    except ConfigError as error:
        raise HTTPException(422, str(error)) from None


def _find_thresholds(snapshot: Snapshot) -> dict[str, float]:
    labels = snapshot.output.labels
    return {
        name: float(value)
        for name, value in zip(labels.label_names(), np.asarray(labels.thresholds(), np.float64).tolist(), strict=True)
        if np.isfinite(value)
    }


def _describe_image(snapshot: Snapshot, position: int) -> dict[str, Any]:
    stored = [name for name in snapshot.output.columns if name not in ("embedding", "thumbnail")]
    columns = [name for name in stored if name != ID]
    if ID in stored and INPUT_ID not in stored:
        columns.append(INPUT_ID)
    table = snapshot.take([position], [ID, *columns, "embedding"])
    scores = snapshot.output.head.scores(read_embeddings(table))[0]
    names = snapshot.output.labels.label_names()
    given = table["labels"][0].as_py() or []
    best = np.argsort(-scores, kind="stable")[:_SCORES].tolist()
    shown = dict.fromkeys([*given, *(names[label] for label in best)])
    by_name = dict(zip(names, scores.tolist(), strict=True))
    shown_as_scores = ("labels", "scores", "bands")
    values = {name: _show(table[name][0]) for name in [ID, *columns] if name not in shown_as_scores}
    return {
        "position": position,
        "live": bool(snapshot.live[position]),
        "values": values,
        "scores": [{"label": name, "score": by_name.get(name), "given": name in given} for name in shown],
    }


def _show(scalar: pa.Scalar) -> str | int | float | None:
    """Return a value as JSON has it: a number, a text, or the text of anything else. NaN and infinity are texts.

    So are integers that a page would round, and dates and times, of which Python's types have not all.
    """
    try:
        dated = pa.types.is_timestamp(scalar.type) or pa.types.is_date(scalar.type) or pa.types.is_time(scalar.type)
        value = scalar.cast(pa.string()).as_py() if dated else scalar.as_py()
    except (ValueError, OverflowError, pa.ArrowException):  # such as a list of dates after the year 9999
        return f"{scalar.type}, which cannot be shown"
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return value if abs(value) <= 2**53 else str(value)
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    return str(value)
