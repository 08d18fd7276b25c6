"""Every way in which a request can fail, in OpenAI's error envelope."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import Message

from siglip.images.decode import REASONS, ImageRejected

CODES: dict[str, tuple[int, str]] = {
    "invalid_request": (400, "a field is missing, unknown or of the wrong kind; `param` names it"),
    "invalid_json": (400, "the body is not JSON"),
    "invalid_image": (400, "the image's field is neither base64 nor a data: URI nor a URL"),
    "unsupported_dimensions": (400, "SigLIP's embeddings cannot be shortened: leave `dimensions` out"),
    "unsupported_input": (400, "token ids, several images in one message, or another input that has no embedding"),
    "too_many_images": (400, "more images in one request than limits.images"),
    "too_many_pixels_together": (400, "the images in one request have more pixels together than limits.pixels"),
    "too_many_texts": (400, "more texts in one request than limits.texts"),
    "text_too_long": (400, "a text has more characters than limits.text_characters"),
    "too_many_labels": (400, "more labels, or more prompts for them, than limits.labels"),
    "label_too_long": (400, "a label or template has more characters than limits.label_characters"),
    "label_set_not_found": (404, "no label set of that name is registered: see GET /v1/label-sets"),
    "invalid_api_key": (401, "no API key was sent, or one that is not known"),
    "loopback_only": (403, "no API keys are configured, so only this machine's own clients are answered"),
    "model_not_found": (404, "this server runs another model: see GET /v1/models"),
    "not_found": (404, "there is no such path"),
    "method_not_allowed": (405, "the path exists, and takes another method"),
    "body_timeout": (408, "the request's body did not arrive in time"),
    "body_too_large": (413, "the request's body is larger than limits.body_bytes"),
    "unsupported_media_type": (415, "the body's Content-Type is none that this path reads"),
    "rate_limit_exceeded": (429, "this key has used up its rate; Retry-After says when to come back"),
    "overloaded": (429, "the queue is full, or too long for the deadline; nothing was computed"),
    "deadline_exceeded": (429, "the deadline passed while the request waited; nothing was computed"),
    "unavailable": (503, "the replica that held the request died, or none is ready; try again"),
    "internal_error": (500, "a fault of this server; its log has the request id"),
}
"""Every code that the server itself answers with: status and meaning. Images and URLs add their own."""

IMAGE_STATUS = {"too_many_bytes": 413}
"""Statuses of rejected images, where it is not 400."""

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A refused request. `code` is for programs, `message` says what to change, `param` names the field.

    `retry_after` are seconds: sent as Retry-After, rounded up.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(CODES[code][0] if status is None else status, message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """OpenAI's envelope."""
        return make_envelope(self.status_code, self.message, self.code, self.param)

    def headers_out(self) -> dict[str, str]:
        """Retry-After, and what the status asks for."""
        headers = {"www-authenticate": "Bearer"} if self.status_code == 401 else {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        return headers

    def messages(self) -> tuple[Message, Message]:
        """The whole answer, as ASGI sends it."""
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
    """A rejected image as an error of the field that held it. The code is the reason of the batch job's rejects."""
    detail = f" ({rejected.detail})" if rejected.detail else ""
    message = f"{param}: {REASONS[rejected.reason]}{detail}"
    return ApiError(rejected.reason, message, status=IMAGE_STATUS.get(rejected.reason, 400), param=param)
