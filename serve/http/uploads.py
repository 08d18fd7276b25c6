"""Bodies that are an image file, and forms with image files."""

from __future__ import annotations

from fastapi import Request
from starlette.datastructures import FormData, QueryParams, UploadFile

from serve.config import EndpointLimits
from serve.http.errors import ApiError
from serve.http.json_body import media_type
from serve.http.quoting import shorten
from serve.http.structure import max_form_parts

ANY_IMAGE = "image/*"


async def read_uploads(request: Request, limits: EndpointLimits) -> tuple[list[bytes], FormData | QueryParams] | None:
    """Read the image files of a body and the request's other fields; None if the body is neither an image nor a form.

    The fields are those of the form or, if the body is an image, those of the query. Raises `ApiError`.
    """
    kind = media_type(request)
    if kind.startswith("image/"):
        return [await request.body()], request.query_params
    if kind != "multipart/form-data":
        return None
    most = max_form_parts(limits)  # `check_structure` has refused more already
    async with request.form(max_files=most, max_fields=most, max_part_size=limits.body_bytes) as form:
        fields = FormData([item for item in form.multi_items() if item[0] not in ("image", "images")])
        for name, value in fields.multi_items():
            if isinstance(value, UploadFile):
                raise ApiError("invalid_request", f"{shorten(name)}: a file where a value is expected", param=name)
        files = form.getlist("image") + form.getlist("images")
        if not files or not all(isinstance(file, UploadFile) for file in files):
            raise ApiError("invalid_request", "image: send at least one file, such as -F image=@cat.jpg", param="image")
        return [await file.read() for file in files if isinstance(file, UploadFile)], fields
