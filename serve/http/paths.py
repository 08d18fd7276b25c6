"""Paths and methods that the middlewares treat in a special way."""

from __future__ import annotations

HEALTH_PATHS = ("/healthz", "/readyz", "/health", "/ping")
"""Paths of health checks: they need no key and no loopback client, and are not logged while they succeed."""
OPEN_PATHS = ("/", "/docs", "/openapi.json", *HEALTH_PATHS)
OPEN_PREFIXES = ("/playground/", "/docs/")
"""Paths that a GET reads without an API key: the page, the documentation and health checks."""


def is_read(method: str) -> bool:
    """Whether requests of this method have no body and never use the model."""
    return method in ("GET", "HEAD")


def is_open(path: str) -> bool:
    """Whether a GET reads this path without an API key."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
