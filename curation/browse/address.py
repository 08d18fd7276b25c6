"""The address of the page, with what it shows first."""

from __future__ import annotations

import json
from urllib.parse import quote

PORT = 8020
"""The port of the page, unless `sightline browse --port` names another."""


def make_address(text: str | None = None, label: str | None = None, port: int = PORT) -> str:
    """Return the page's address on this machine. It shows what a text finds, or the images that have a label."""
    state = {"q": text, "labels": None if label is None else [{"label": label}]}
    shown = {name: value for name, value in state.items() if value}
    fragment = "#" + quote(json.dumps(shown, ensure_ascii=False, separators=(",", ":"))) if shown else ""
    return f"http://127.0.0.1:{port}/{fragment}"
