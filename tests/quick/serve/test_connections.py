"""The limits of connections, in a running HAProxy."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

from serve.app import build
from serve.config import EndpointConfig
from serve.rayserve.connections import CONNECTIONS, ConnectionsConfig, fit_files
from serve.rayserve.haproxy import read_connections
from serve.rayserve.internals import ENABLE_HAPROXY
from storage.settings import ConfigError
from tests.support.haproxy import run_haproxy
from tests.support.ports import free_port

LIMITS = ConnectionsConfig(total=400, per_source=16, exempt=[ip_network("127.0.0.9")])


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """HAProxy on all addresses of this machine, with small limits. Yields its port."""
    number = free_port()
    with TemporaryDirectory(prefix="sl-", dir="/tmp") as folder, run_haproxy(Path(folder), f"[::]:{number}", LIMITS):
        yield number


class Client:
    """Connections from one source address."""

    def __init__(self, port: int, source: str) -> None:
        self._server = ("::1" if ":" in source else "127.0.0.1", port)
        self._source = source
        self._open: list[socket.socket] = []

    def connect(self) -> socket.socket:
        opened = socket.socket(socket.AF_INET6 if ":" in self._source else socket.AF_INET)
        self._open.append(opened)
        opened.settimeout(60)
        opened.bind((self._source, 0))
        with suppress(ConnectionResetError):  # the next use of the socket raises an error too
            opened.connect(self._server)
        return opened

    def close(self) -> None:
        for one in self._open:
            one.close()


def get(connection: socket.socket) -> SimpleNamespace:
    """Send a request. Returns status, headers and body of the response, and status 0 if the connection was reset."""
    try:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        response = b""
        while b"\r\n\r\n" not in response or len(response.partition(b"\r\n\r\n")[2]) < length_of(response):
            if not (data := connection.recv(10_000)):
                return SimpleNamespace(status=0)
            response += data
    except OSError:
        return SimpleNamespace(status=0)
    head, _, body = response.decode().lower().partition("\r\n\r\n")
    return SimpleNamespace(status=int(head.split()[1]), closes="connection: close" in head, head=head, body=body)


def length_of(response: bytes) -> int:
    return int(response.lower().partition(b"content-length: ")[2].split()[0])


@contextmanager
def client_at(port: int, source: str) -> Iterator[Client]:
    client = Client(port, source)
    try:
        yield client
    finally:
        client.close()


def test_connections_beyond_a_sources_share_are_refused_and_other_sources_are_served(port: int) -> None:
    with client_at(port, "127.0.0.1") as many, client_at(port, "127.0.0.2") as other:
        waiting = [many.connect() for _ in range(40)]
        assert get(other.connect()).status == 200
        responses = [get(connection) for connection in waiting]
        statuses = [response.status for response in responses]
        # HAProxy's threads accept at the same time, so the order of the connections is not exactly that of the client.
        assert statuses.count(200) == LIMITS.per_source
        assert statuses.count(429) == LIMITS.per_source // 4
        assert statuses.count(0) == 40 - LIMITS.per_source * 5 // 4
        refused = next(response for response in responses if response.status == 429)
        assert refused.closes
        assert "retry-after: 1" in refused.head
        assert json.loads(refused.body)["error"]["code"] == "too_many_connections"


def test_an_address_with_half_of_its_share_idle_still_gets_responses(port: int) -> None:
    """As many users behind one NAT do: idle connections never take the whole share."""
    with client_at(port, "127.0.0.3") as client:
        responses = [get(client.connect()) for _ in range(100)]
    assert {response.status for response in responses} == {200}
    half = LIMITS.per_source // 2
    assert [response.closes for response in responses[:half]] == [False] * half
    assert all(response.closes for response in responses[half:])


def test_an_exempt_address_has_no_share(port: int) -> None:
    with client_at(port, "127.0.0.9") as balancer:
        responses = [get(connection) for connection in [balancer.connect() for _ in range(100)]]
    assert {(response.status, response.closes) for response in responses} == {(200, False)}


def test_an_ipv6_network_has_one_share_and_mapped_ipv4_addresses_have_their_own(port: int) -> None:
    """A socket on [::] sees IPv4 clients as ::ffff:a.b.c.d, which are all in one /64."""
    with client_at(port, "::1") as six, client_at(port, "127.0.0.4") as four:
        waiting = [six.connect() for _ in range(LIMITS.per_source * 5 // 4)]
        assert get(four.connect()).status == 200
        assert 429 in [get(connection).status for connection in waiting]


def test_while_connections_are_scarce_new_ones_get_a_smaller_share(port: int) -> None:
    with ExitStack() as stack:
        balancer = stack.enter_context(client_at(port, "127.0.0.9"))
        idle = [balancer.connect() for _ in range(LIMITS.total * 3 // 4 + 1)]
        assert get(idle[-1]).closes
        client = stack.enter_context(client_at(port, "127.0.0.5"))
        statuses = [get(connection).status for connection in [client.connect() for _ in range(8)]]
        assert statuses.count(200) == LIMITS.per_source // 8
        assert statuses.count(429) == 8 - LIMITS.per_source // 8


@pytest.mark.parametrize(
    ("files", "total", "per_source"), [(-1, 32_768, 2048), (1024, 256, 32), (20_000, 6581, 822), (100, 64, 8)]
)
def test_the_limits_fit_the_limit_of_open_files(files: int, total: int, per_source: int) -> None:
    fitted = fit_files(ConnectionsConfig(), files)
    assert (fitted.total, fitted.per_source) == (total, per_source)


def test_limits_that_haproxy_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster HAProxy runs before the configuration is deployed."""
    monkeypatch.setenv(ENABLE_HAPROXY, "1")
    monkeypatch.delenv(CONNECTIONS, raising=False)
    config = EndpointConfig.model_validate({"connections": {"per_source": 100, "exempt": ["10.0.0.0/8"]}})
    with pytest.raises(ConfigError, match=CONNECTIONS):
        build(config)
    monkeypatch.setenv(CONNECTIONS, config.connections.model_dump_json())
    assert read_connections() == config.connections
    build(config)
    monkeypatch.setenv(ENABLE_HAPROXY, "0")
    with pytest.raises(ConfigError, match=ENABLE_HAPROXY):
        build(config)
