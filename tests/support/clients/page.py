"""`docs/clients.md`, composed from the tests' calls. `python -m tests.support.clients.page` writes it."""

from __future__ import annotations

import importlib
from itertools import groupby
from pathlib import Path

from tests.support.clients.calls import CALLS, CLIENTS, Call

PAGE = Path(__file__).parents[3] / "docs" / "clients.md"

_INTRODUCTION = """# Clients, and what each of them can do

The tests in `tests/clients/` install each of these clients from npm or PyPI and run it unmodified against
`sightline serve` with an API key, behind HAProxy. A call that is refused is here with the message that the client
shows. The tests compare this page with the calls that they make and the versions that they install.

[endpoint.md](endpoint.md) shows the clients of OpenAI, Hugging Face and Cohere in whole programs. An image is a `data:`
URI (`data:image/png;base64,...`) wherever a client takes a string.

| client | version tested | call | outcome |
|---|---|---|---|
"""


def write_page() -> str:
    """Return the text of the page. Imports the tests, which register the calls."""
    for path in sorted(CLIENTS.glob("test_*.py")):
        importlib.import_module(f"tests.clients.{path.stem}")
    rows = []
    ordered = sorted(CALLS, key=_client_name)
    for _, calls in groupby(ordered, key=_client_name):
        for call in calls:
            cells = (call.client.name, call.client.versions(), call.call, call.outcome())
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return _INTRODUCTION + "".join(rows)


def _client_name(call: Call) -> str:
    return call.client.name.lower()


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
