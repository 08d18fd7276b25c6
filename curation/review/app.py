"""The review page's server: a sample's images and questions out, answers in. On loopback, for one person."""

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
    """What a person says about row `place` of the sample."""

    model_config = ConfigDict(extra="forbid")

    place: int
    answer: Literal["right", "wrong", "unsure", "taken back"]


def make_app(sample: pa.Table, about: dict[str, Any], answers: AnswerFile) -> FastAPI:
    """The page and its API.

    Requests with another host's name are refused, because a page elsewhere can point its own name at this machine; so
    are answers that another page's script sends. Raises `ConfigError` for a sample without thumbnails.
    """
    if sample["thumbnail"].null_count:
        raise ConfigError("the sample has no thumbnails to look at: tag with `thumbnails: true` and sample again")
    thumbnails = sample["thumbnail"].combine_chunks()
    labels = list(dict.fromkeys(sample["label"].to_pylist()))
    indices = {label: index for index, label in enumerate(labels)}
    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])

    @app.middleware("http")
    async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
        origin = request.headers.get("origin")
        if request.method == "POST" and origin is not None and origin != f"http://{request.headers.get('host')}":
            return JSONResponse({"detail": "another page's request"}, 403)
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    for path, name in _FILES.items():

        async def send(name: str = name) -> Response:
            return FileResponse(_PAGES / name, headers={"cache-control": "no-cache"})

        app.get(path, name=name, response_model=None)(send)

    @app.get("/api/work")
    def describe() -> JSONResponse:
        """Everything that is asked, and what was answered."""
        return JSONResponse(
            {
                "output": about["output"],
                "answers_file": str(answers.path),
                "labels": labels,
                "label": [indices[label] for label in sample["label"].to_pylist()],
                "key": sample["key"].to_pylist(),
                "score": sample["score"].to_pylist(),
                "given": {str(place): answer for place, answer in answers.given.items()},
            }
        )

    @app.get("/api/image/{place}")
    def picture(place: int) -> Response:
        """A thumbnail."""
        if not 0 <= place < len(thumbnails):
            raise HTTPException(404)
        headers = {"cache-control": "private, max-age=86400"}
        return Response(thumbnails[place].as_py(), media_type="image/jpeg", headers=headers)

    @app.post("/api/answer")
    def save(answer: Answer) -> JSONResponse:
        """Keep an answer. It is on disk when the page hears of it."""
        try:
            answers.add(answer.place, answer.answer)
        except IndexError:
            raise HTTPException(404) from None
        except OSError as error:
            raise HTTPException(507, f"{answers.path} cannot be written: {error.strerror}") from error
        return JSONResponse({"answered": len(answers.given)})

    return app
