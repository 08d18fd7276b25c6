"""The web app of the review page: sends a sample's questions and images, and saves answers. For one person, locally."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.middleware.base import RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware

from curation.review.answers import AnswerFile
from curation.sampling.files import Thumbnails
from storage.settings import ConfigError

_PAGES = Path(__file__).parent
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_FILES = {"/": "page.html", "/review.css": "review.css", "/review.js": "review.js"}


class Answer(BaseModel):
    """A person's answer about a row of the sample."""

    model_config = ConfigDict(extra="forbid")

    row: int
    answer: Literal["right", "wrong", "unsure", "taken back"]


def make_app(sample: pa.Table, metadata: dict[str, Any], thumbnails: Thumbnails, answers: AnswerFile) -> FastAPI:
    """Make the app: the review page and its API.

    Refuses requests whose Host header is not a loopback name, because another site's domain may resolve to this machine
    (DNS rebinding), and answers that a script of another origin sends. Raises `ConfigError` for a sample without
    thumbnails.
    """
    if len(thumbnails) and thumbnails.read(0) is None:
        raise ConfigError("the sample has no thumbnails: tag with `thumbnails: true` and sample again")
    labels = list(dict.fromkeys(sample["label"].to_pylist()))
    indices = {label: index for index, label in enumerate(labels)}
    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])

    @app.middleware("http")
    async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
        origin = request.headers.get("origin")
        if request.method == "POST" and origin is not None and origin != f"http://{request.headers.get('host')}":
            return JSONResponse({"detail": "the request comes from a page of another origin"}, 403)
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    for path, name in _FILES.items():

        async def send(name: str = name) -> Response:
            return FileResponse(_PAGES / name, headers={"cache-control": "no-cache"})

        app.get(path, name=name, response_model=None)(send)

    @app.get("/api/sample")
    def describe_sample() -> JSONResponse:
        """Send the questions of the sample, and the answers so far."""
        return JSONResponse(
            {
                "output": metadata["output"],
                "answers_file": str(answers.path),
                "labels": labels,
                "label": [indices[label] for label in sample["label"].to_pylist()],
                "key": sample["key"].to_pylist(),
                "score": sample["score"].to_pylist(),
                "answers": {str(row): answer for row, answer in answers.current.items()},
            }
        )

    @app.get("/api/image/{row}")
    def send_thumbnail(row: int) -> Response:
        """Send the thumbnail of a row of the sample."""
        if not 0 <= row < len(thumbnails):
            raise HTTPException(404)
        headers = {"cache-control": "private, max-age=86400"}
        return Response(thumbnails.read(row), media_type="image/jpeg", headers=headers)

    @app.post("/api/answer")
    def save(answer: Answer) -> JSONResponse:
        """Save an answer. It is on disk before the response is sent."""
        try:
            answers.add(answer.row, answer.answer)
        except IndexError:
            raise HTTPException(404) from None
        except OSError as error:
            raise HTTPException(507, f"{answers.path} cannot be written: {error.strerror}") from error
        return JSONResponse({"answered": len(answers.current)})

    return app
