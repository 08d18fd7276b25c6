"""The error codes of the API, and OpenAI's error envelope."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import Message

from serve.http.quoting import shorten
from siglip.images.decode import REASONS, ImageRejected
from siglip.images.decoder import DecoderLost

CODES: dict[str, tuple[int, str]] = {
    "invalid_request": (400, "a field is missing, unknown or of the wrong type; `param` names the field"),
    "invalid_json": (400, "the body is not JSON"),
    "invalid_image": (400, "the image field has neither base64 nor a data: URI nor a URL"),
    "unsupported_dimensions": (400, "SigLIP's embeddings cannot be shortened: leave `dimensions` out"),
    "unsupported_input": (
        400,
        "token ids (without token_vocabulary), several images in one message, or other input without embedding",
    ),
    "too_many_images": (400, "the request has more images than limits.images"),
    "too_many_pixels_together": (400, "the sum of the pixels of the request's images is larger than limits.pixels"),
    "too_many_texts": (400, "the request has more texts than limits.texts"),
    "text_too_long": (400, "a text has more tokens than the model's input, and the request says not to cut it"),
    "too_many_labels": (400, "the request has more prompts (labels times templates) than limits.labels"),
    "too_many_pairs": (400, "the response would have more labels or matches than limits.pairs"),
    "unsupported_search": (400, "the searched output cannot answer this query; `param` names the field"),
    "response_too_large": (400, "the response has more bytes than limits.response_bytes"),
    "label_too_long": (400, "a label or template has more characters than limits.label_characters"),
    "label_set_not_found": (404, "no label set of this name is registered: see GET /v1/label-sets"),
    "invalid_api_key": (401, "the request has no API key, or an unknown one"),
    "loopback_only": (403, "no API keys are configured, so only clients on the same machine are accepted"),
    "origin_not_allowed": (403, "web pages of this origin may not call the API, or not so: see cors.origins"),
    "model_not_found": (404, "this server does not run the requested model: see GET /v1/models"),
    "not_found": (404, "the path does not exist"),
    "method_not_allowed": (405, "the path does not allow this method"),
    "body_timeout": (408, "the request's body did not arrive in time"),
    "body_too_large": (413, "the request's body is larger than limits.body_bytes"),
    "unsupported_media_type": (415, "this path does not read bodies of this Content-Type or Content-Encoding"),
    "rate_limit_exceeded": (429, "the key has reached its rate limit; Retry-After has the seconds to wait"),
    "too_many_connections": (429, "the client's address has too many connections: see connections.per_source"),
    "overloaded": (429, "too many requests or bytes are in flight, or the queue is too long for the deadline"),
    "deadline_exceeded": (429, "the deadline passed while the request waited; nothing was computed"),
    "unavailable": (503, "the replica that held the request ended, or no replica is ready; try again"),
    "internal_error": (500, "an unexpected error of the server; its log has the request id"),
}
"""The status and the meaning of every error code, except those of rejected images (`siglip.images.decode.REASONS`) and
of refused URLs (`storage.web.guard`)."""

MESSAGE_CHARACTERS, PARAM_CHARACTERS = 1000, 200
"""Longest message of an error, and longest name of its field. A message quotes a client's string with
`serve.http.quoting.quote`, which cuts it; these bounds hold also for a message that does not."""

RETRY_AFTER = 2.0
"""Seconds in Retry-After of an error that a second attempt may not meet: a process of the server has failed."""

IMAGE_STATUS = {"too_many_bytes": 413}
"""The statuses of rejected images that are not 400."""

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A refused request: a machine-readable `code`, a `message` that says what to change, and the field `param`.

    `retry_after` is in seconds; the header Retry-After has it rounded up. `status` replaces the code's own status.
    `allow` has the methods that the path allows, for 405. `message` and `param` are made one line of a bounded length.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        allow: Sequence[str] = (),
    ) -> None:
        self.message = shorten(message, MESSAGE_CHARACTERS)
        super().__init__(CODES[code][0] if status is None else status, self.message)
        self.code = code
        self.param = None if param is None else shorten(param, PARAM_CHARACTERS)
        self.retry_after = retry_after
        self.allow = allow

    def body(self) -> dict[str, Any]:
        """The error envelope of this error."""
        return make_envelope(self.status_code, self.message, self.code, self.param)

    def headers_out(self) -> dict[str, str]:
        """Retry-After and Allow if they are known, and WWW-Authenticate for 401."""
        headers = {"www-authenticate": "Bearer"} if self.status_code == 401 else {}
        if self.allow:
            headers["allow"] = ", ".join(self.allow)
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        return headers

    def messages(self) -> tuple[Message, Message]:
        """The whole response as ASGI messages: start and body."""
        body = json.dumps(self.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **self.headers_out()}
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        start = {"type": "http.response.start", "status": self.status_code, "headers": pairs}
        return start, {"type": "http.response.body", "body": body}


def make_envelope(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients read it."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def image_error(rejected: ImageRejected, param: str) -> ApiError:
    """The error of a rejected image; `param` is the image's field. The code is the batch job's reject reason.

    An image that was lost with its decoders may be sound: its error is `unavailable`.
    """
    if isinstance(rejected, DecoderLost):
        return ApiError("unavailable", f"{param}: {rejected.detail}: try again", param=param, retry_after=RETRY_AFTER)
    detail = f" ({rejected.detail})" if rejected.detail else ""
    reason = REASONS[rejected.reason].replace("limits.max_", "limits.image.max_")  # the keys of an endpoint
    message = f"{param}: {reason}{detail}"
    return ApiError(rejected.reason, message, status=IMAGE_STATUS.get(rejected.reason, 400), param=param)
