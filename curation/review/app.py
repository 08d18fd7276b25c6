"""The web app of the review page: sends a sample's questions and pictures, and saves one person's answers."""

from __future__ import annotations

import asyncio
import hashlib
import shlex
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from curation.local_page import IMAGE_HEADERS, make_local_app
from curation.review.agreement import About, read_reviews
from curation.review.answers import AnswerFile, Conflict, NewAnswer, State
from curation.review.originals import NoPicture, Originals
from curation.sampling.files import Thumbnails, is_audit
from curation.tagged_output import ID
from storage.settings import ConfigError

_PAGE = Path(__file__).parent / "page"
_PICTURE_SECONDS = 20.0
"""How long a request for a larger picture waits. Reading goes on, and a later request finds the picture."""
_MAX_ANSWERS = 1000


class OneAnswer(BaseModel):
    """A person's answer about a row of the sample, and the version of the row's answer that the page shows."""

    model_config = ConfigDict(extra="forbid")

    row: int
    answer: Literal["right", "wrong", "unsure", "taken back"]
    version: int


class Answers(BaseModel):
    """Answers to save, all or none. `review` is the review that the page is of, `since` the last version it knows."""

    model_config = ConfigDict(extra="forbid")

    review: str
    since: int
    answers: list[OneAnswer] = Field(min_length=1, max_length=_MAX_ANSWERS)


def make_app(
    sample: pa.Table,
    metadata: dict[str, Any],
    thumbnails: Thumbnails,
    originals: Originals,
    answers: AnswerFile,
    name: str = "",
    disputed: dict[About, dict[str, str]] | None = None,
) -> FastAPI:
    """Make the app: the review page and its API.

    `name` is shown on the page. With `disputed`, the page asks only about these questions, and shows what people have
    answered (see `Reviews.disagreements`).

    Refuses what `make_local_app` does, and the requests of a page that was opened for another sample or person: such a
    page may still be open on the same port. Raises `ConfigError` for a sample without thumbnails.
    """
    if len(thumbnails) and thumbnails.read(0) is None:
        raise ConfigError("the sample has no thumbnails: tag with `thumbnails: true` and sample again")
    review = _identify(sample, answers.path)
    labels = list(dict.fromkeys(sample["label"].to_pylist()))
    app = make_local_app(_PAGE)

    def check_review(of: str) -> None:
        if of != review:
            raise HTTPException(410, "this page belongs to another review: reload it")

    def send_changes(since: int, status: int = 200, **more: Any) -> JSONResponse:
        return JSONResponse({"version": answers.version, "changes": answers.changes(since), **more}, status)

    @app.get("/api/sample")
    def describe_sample() -> JSONResponse:
        """Send the questions of the sample, and the answers so far."""
        indices = {label: index for index, label in enumerate(labels)}
        about = list(zip(sample[ID].to_pylist(), sample["label"].to_pylist(), strict=True))
        said = None if disputed is None else {row: disputed[one] for row, one in enumerate(about) if one in disputed}
        return JSONResponse(
            {
                "review": review,
                "person": name,
                "answers_file": str(answers.path),
                "next": _suggest_command(metadata, answers.path.parent),
                "labels": labels,
                "label": [indices[label] for _, label in about],
                "key": sample["key"].to_pylist(),
                "score": sample["score"].to_pylist(),
                "said": said,
                "version": answers.version,
                "answers": answers.changes(0),
            }
        )

    @app.get("/api/changes")
    def send_answers(of: str, since: int) -> JSONResponse:
        """Send the answers that were saved after a version, by this page or another one."""
        check_review(of)
        return send_changes(since)

    @app.post("/api/answers")
    def save(request: Answers) -> JSONResponse:
        """Save answers, all or none. They are on disk before the response is sent.

        409 when a question has got another answer than the page knows of; `conflicts` says which.
        """
        check_review(request.review)
        try:
            answers.save([NewAnswer(one.row, one.answer, one.version) for one in request.answers])
        except Conflict as conflict:
            return _refuse(conflict.states)
        except IndexError:
            raise HTTPException(404, "no such question") from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        except OSError as error:
            raise HTTPException(507, f"{answers.path} cannot be written: {error.strerror}") from error
        return send_changes(request.since)

    @app.get("/api/agreement")
    def describe_agreement() -> JSONResponse:
        """Send lines about how far people agree; none when one person has answered."""
        try:
            return JSONResponse({"lines": read_reviews(answers.path.parent).describe()})
        except ConfigError as error:
            return JSONResponse({"lines": [str(error)]})

    @app.get("/api/thumbnail/{of}/{row}")
    def send_thumbnail(of: str, row: int) -> Response:
        """Send the thumbnail of a row's image. The review is in the path, so that caches keep samples apart."""
        check_review(of)
        if not 0 <= row < len(thumbnails):
            raise HTTPException(404)
        return Response(thumbnails.read(row), media_type="image/jpeg", headers=IMAGE_HEADERS)

    @app.get("/api/picture/{of}/{row}")
    async def send_picture(of: str, row: int) -> Response:
        """Send a larger picture of a row's image, made from the original, or JSON that says why there is none.

        A missing original is no error: the page shows the thumbnail.
        """
        check_review(of)
        if not 0 <= row < sample.num_rows:
            raise HTTPException(404)
        try:
            # No thread waits for the picture, so however long it takes, answers are saved.
            picture = await _wait(originals.request(row))
        except NoPicture as error:
            return JSONResponse({"missing": str(error)}, headers={"cache-control": "no-store"})
        except TimeoutError:
            raise HTTPException(503, "the original is still being read: try again later") from None
        return Response(picture, media_type="image/jpeg", headers=IMAGE_HEADERS)

    return app


async def _wait(picture: Future[bytes]) -> bytes:
    """Wait for a picture, and leave its future as it is if that takes too long. Raises `NoPicture`, `TimeoutError`."""
    waiting = asyncio.wrap_future(picture)
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may end after this request
    return await asyncio.wait_for(asyncio.shield(waiting), _PICTURE_SECONDS)


def _identify(sample: pa.Table, path: Path) -> str:
    """Return a text that differs for each sample and each answers file."""
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=9)
    for column in (ID, "label", "sha256"):
        for value in sample[column].to_pylist():
            digest.update(f"{value}\0".encode())
    return digest.hexdigest()


def _suggest_command(metadata: dict[str, Any], folder: Path) -> str:
    """Return the command that uses the answers, by what the sample was drawn for.

    A sample of an unknown purpose is evaluated, which is right for all answers. A calibration also uses the answers
    that the sample excluded, without those to an audit: an audit judges the thresholds only if it did not choose them.
    """
    output, mine = shlex.quote(str(metadata["output"])), shlex.quote(str(folder))
    purpose, _, target = str(metadata.get("for", "evaluation")).partition("=")
    if purpose == "audit":
        return f"sightline audit {output} {mine}"
    if purpose != "precision":
        return f"sightline evaluate {output} --truth {mine}"
    earlier = [path for path in map(Path, metadata.get("excluded", [])) if not is_audit(path)]
    truth = "".join(f" --truth {shlex.quote(str(path))}" for path in (folder, *earlier))
    return f"sightline calibrate {output}{truth}" + (f" --precision {target}" if target else "")


def _refuse(states: Sequence[State]) -> JSONResponse:
    detail = "answered differently in another tab in the meantime"
    return JSONResponse({"detail": detail, "conflicts": states}, 409)
