"""The limit of each key's requests a minute."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.admission.auth import RateLimiter
from serve.http.errors import ApiError
from serve.http.middleware.request_context import get_context


class RateLimitMiddleware:
    """Refuses a key's requests beyond `per_minute`; None is no limit.

    Images and texts have a limit of their own (`serve.embedding.embedder.Embedder.admit`).
    """

    def __init__(self, app: ASGIApp, per_minute: int | None) -> None:
        self._app = app
        self._rates = RateLimiter(per_minute) if per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = get_context(scope)
        if context.key is not None and self._rates is not None:
            quota = context.quotas["requests"] = self._rates.check(context.key)
            if not quota.allowed:
                raise ApiError(
                    "rate_limit_exceeded",
                    f"this key may send {quota.limit} requests a minute; come back in {quota.retry_after_s:.1f} s",
                    retry_after=quota.retry_after_s,
                )
        await self._app(scope, receive, send)
