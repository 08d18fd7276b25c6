"""The calls of unmodified clients that the tests make. `docs/clients.md` is the list of them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec

import pytest

CLIENTS = Path(__file__).parents[2] / "clients"
NODE_FOLDER = CLIENTS / "node"
"""The package.json, its lock file and the programs that call npm's clients."""
PYTHON_FOLDER = CLIENTS / "python"
"""The pinned requirements of the environments that are not the project's own, and the programs that run in them."""

Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Client:
    """A client as the page names it. `package` is its name on PyPI or npm.

    `where` is `node`, or the name of a file of requirements in `PYTHON_FOLDER`, or `project` for a package of the
    project's own environment. `beside` are packages that the client needs to reach this endpoint.
    """

    name: str
    package: str
    where: str = "project"
    beside: tuple[str, ...] = ()

    def versions(self) -> str:
        """The packages with their versions, as the tests install them."""
        return ", ".join(f"`{package}` {read_version(package, self.where)}" for package in (self.package, *self.beside))


def read_version(package: str, where: str) -> str:
    """The version of a package in an environment. See `Client`."""
    if where == "project":
        return version(package)
    if where == "node":
        lock = json.loads((NODE_FOLDER / "package-lock.json").read_text())
        return str(lock["packages"][f"node_modules/{package}"]["version"])
    [found] = re.findall(rf"^{re.escape(package)}==(\S+)$", (PYTHON_FOLDER / f"{where}.txt").read_text(), re.MULTILINE)
    return str(found)


@dataclass(frozen=True)
class Call:
    """One call of a client, and what comes of it."""

    client: Client
    call: str
    note: str
    refused: str | None
    test: str

    def outcome(self) -> str:
        """The last column of the page."""
        outcome = "works" if self.refused is None else f"refused: “{self.refused}”"
        return f"{outcome}; {self.note}" if self.note else outcome


CALLS: list[Call] = []
"""All calls, in the order of the tests, once the modules with the tests are imported."""


def client_call(
    client: Client, call: str, note: str = "", refused: str | None = None
) -> Callable[[Callable[Arguments, None]], Callable[Arguments, None]]:
    """A decorator of a test that makes `call`, which puts the call on the page.

    With `refused` the test has to end with the client's exception, whose text contains `refused`; so the page has no
    message that the client does not show. Without it, the test has to check the values that the client returns.
    """

    def register(test: Callable[Arguments, None]) -> Callable[Arguments, None]:
        CALLS.append(Call(client, call, note, refused, test.__name__))
        if refused is None:
            return test

        @functools.wraps(test)
        def expect_refusal(*args: Any, **options: Any) -> None:
            with pytest.raises(Exception) as raised:  # noqa: PT011 - each client has its own types
                test(*args, **options)
            assert refused in str(raised.value)

        return expect_refusal

    return register
