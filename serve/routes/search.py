"""Sightline's own API: `POST /v1/search`, which searches a finished output of `sightline tag`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from serve.http.bodies.json_body import read_json
from serve.http.errors import ApiError
from serve.http.json_response import LongList, make_response
from serve.http.responses import body_of, context_of, documented
from serve.routes.inputs import read_text
from serve.schemas import IMAGE_HELP, Fingerprint, LabelScore, NonEmptyStrings, ResponseModel, Strict, Usage
from serve.search.request import SearchQuery
from serve.service import Service
from siglip.label_text.values import Count

MOST = 1000
"""The most results of a search."""
MOST_THUMBNAILS = 100
"""The most results of a search with thumbnails: each may take reading a row group of the output."""
NUMBERS = 16
"""About how many numbers a result takes as much time to write as."""


class SearchRequest(Strict):
    """What to search for. Give at least one of `text`, `image` and `like`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"text": "red circle", "not": ["blue circle"], "top": 5, "thumbnails": True},
                {"text": ["red circle"], "labels": ["red circle"], "cutoff": "none", "fold": True},
            ]
        }
    )

    model: str | None = Field(None, description="An id of GET /v1/models. Optional.")
    text: str | NonEmptyStrings | None = Field(
        None,
        description="What the images show. It is scored as a label of this name would be, with the templates of the "
        "output. Of several texts, an image has the lowest score.",
    )
    not_: NonEmptyStrings | None = Field(
        None,
        alias="not",
        description="Texts: images are left out that a search for one of these would find relevant. With an index, "
        "this is an estimate.",
    )
    image: str | None = Field(None, description=f"An image that the images are like. {IMAGE_HELP}")
    like: str | None = Field(
        None, description="The id of an image of the output that they are like, or its key. It is no result itself."
    )
    labels: NonEmptyStrings | None = Field(None, description="Labels of the output that the images have, all of them.")
    top: Annotated[Count, Field(le=MOST)] = Field(
        20, description=f"The most results; with thumbnails up to {MOST_THUMBNAILS}."
    )
    cutoff: Literal["auto", "none"] = Field(
        "auto",
        description="auto: the results end where images are no longer relevant to the text, which is estimated for "
        "each query; there may be none. none: the nearest images, however far. Without a text nothing is cut off.",
    )
    fold: bool = Field(False, description="One result for each group of near-duplicates.")
    thumbnails: bool = Field(False, description="Each result with the output's thumbnail, as a data: URI of a JPEG.")


class FoundImage(ResponseModel):
    """An image of the output."""

    key: str
    id: str = Field(description="Identifies the image within the output. Several images may have the same key.")
    score: float | None = Field(description="The probability that the text belongs to it, of several the lowest.")
    similarity: float | None = Field(description="The cosine with the example image.")
    copies: int = Field(description="The number of near-duplicates that `fold` has left out for it.")
    labels: list[LabelScore] = Field(description="The labels that the output has given it, without bands.")
    width: int | None
    height: int | None
    source: str | None = Field(description="The file that it was read from.")
    thumbnail: str | None = Field(
        None,
        description="Only with `thumbnails`. null if the thumbnails before it took up search.thumbnail_bytes.",
    )


class SearchedState(ResponseModel):
    """How new the searched output is. A response is of one state of it."""

    opened_at: str = Field(description="When the state was opened that was searched, in UTC.")
    checked_at: str = Field(description="When the endpoint last looked for a newer state with success, in UTC.")
    problem: str | None = Field(description="Why it is not the latest state, if that cannot be searched.")
    not_searched: int = Field(
        description="Images that are in the output but not yet in its index, and that are too many to be compared "
        "besides."
    )


class SearchResponse(ResponseModel):
    """The images that were found, best first."""

    object: Literal["list"] = "list"
    model: str
    data: list[FoundImage]
    rows: int = Field(description="The images of the output.")
    searched: int = Field(description="Those that were searched: they have the labels, and are not too new.")
    left_out: int = Field(description="Those of them that show something unwanted (`not`).")
    relevant: int | None = Field(description="The others that are relevant to the text; null without a cut-off.")
    estimated: bool = Field(description="Whether left_out and relevant are estimates from a sample.")
    cutoff: float | None = Field(description="The score above which images are relevant; null without a cut-off.")
    best: float | None = Field(description="The highest score of those searched; null without a text.")
    notes: list[str] = Field(description="What else should be known about these results.")
    as_of: SearchedState
    usage: Usage
    fingerprint: Fingerprint


def add_search_routes(app: FastAPI, service: Service) -> None:
    """Register the route. Without `search` in the configuration it answers 404."""

    @app.post(
        "/v1/search",
        response_model=SearchResponse,
        responses=documented(400, 404),
        openapi_extra=body_of(SearchRequest),
        tags=["search"],
    )
    async def search(request: Request) -> Response:
        """Search the images of an output of `sightline tag`: by text, by an example image, and by labels.

        The results are those of `sightline search`. Without an index every image is compared. With one, a few of the
        nearest images may be missed; images that it does not have yet are compared besides.
        """
        context = context_of(request)
        if service.search is None:
            message = "this server searches no output: set search.output in its configuration"
            raise ApiError("not_found", message)
        body = await read_json(request, SearchRequest)
        service.check_model(body.model)
        query = make_query(body)
        found = await service.search.search(query, context)
        results, table, as_of = found.results, found.results.table, service.search.tell_age(found.opened)
        thumbnails = found.thumbnails

        def list_images(start: int, stop: int) -> list[dict[str, Any]]:
            rows: list[dict[str, Any]] = table.slice(start, stop - start).to_pylist()
            for place, row in enumerate(rows, start=start):
                row.pop("rank")
                scores = zip(row.pop("labels"), row.pop("scores"), strict=True)
                row["labels"] = [{"label": label, "score": score} for label, score in scores]
                if thumbnails is not None:
                    row["thumbnail"] = thumbnails[place]
            return rows

        size = sum(len(one or "") for one in thumbnails or ()) // max(1, table.num_rows)
        content = {
            "object": "list",
            "model": service.name,
            "data": LongList(table.num_rows, NUMBERS + size // 64, list_images),
            "rows": results.rows,
            "searched": results.searched,
            "left_out": results.left_out,
            "relevant": results.relevant,
            "estimated": results.estimated,
            "cutoff": results.cutoff,
            "best": results.best,
            "notes": list(results.notes),
            "as_of": {
                "opened_at": as_of.opened_at.isoformat(timespec="seconds"),
                "checked_at": as_of.checked_at.isoformat(timespec="seconds"),
                "problem": as_of.problem,
                "not_searched": found.opened.not_searched,
            },
            "usage": service.usage(context).model_dump(),
            "fingerprint": service.fingerprint(found.labels).model_dump(),
        }
        return await make_response(content, service, context)


def make_query(body: SearchRequest) -> SearchQuery:
    """The query of a request. Raises `ApiError` for one that says nothing, or contradicts itself."""
    texts = [body.text] if isinstance(body.text, str) else list(body.text or ())
    if not texts and body.image is None and body.like is None:
        message = "give at least one of text, image and like: images cannot be ordered without one"
        raise ApiError("invalid_request", message, param="text")
    unwanted = list(body.not_ or ())
    for field, given in (("text", texts), ("not", unwanted)):
        for text in given:
            read_text(text, field, instead="send it in image")
    if set(texts) & set(unwanted):
        raise ApiError("invalid_request", "not: a text is both wanted (text) and unwanted", param="not")
    if body.thumbnails and body.top > MOST_THUMBNAILS:
        message = f"top: with thumbnails at most {MOST_THUMBNAILS} results: send thumbnails=false, or fewer"
        raise ApiError("invalid_request", message, param="top")
    return SearchQuery(
        tuple(dict.fromkeys(texts)),
        tuple(dict.fromkeys(unwanted)),
        body.image,
        body.like,
        tuple(dict.fromkeys(body.labels or ())),
        body.top,
        body.cutoff,
        body.fold,
        body.thumbnails,
    )
