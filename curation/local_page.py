"""Web pages for one person on one machine: what their servers refuse, and how they send the pages' files."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.middleware.base import RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
IMAGE_HEADERS = {"cache-control": "private, max-age=86400"}


def make_local_app(page: Path) -> FastAPI:
    """Make an app that sends the files of the folder `page`, the HTML file as `/`.

    Refuses requests whose Host header is not a loopback name, because another site's domain may resolve to this machine
    (DNS rebinding), and POST requests that a script of another origin sends.
    """
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

    for path in sorted(page.iterdir()):
        if path.is_file():

            async def send(path: Path = path) -> Response:
                return FileResponse(path, headers={"cache-control": "no-cache"})

            app.get("/" if path.suffix == ".html" else f"/{path.name}", name=path.name, response_model=None)(send)
    return app
