"""Fetching by URL: hostile URLs in every notation are refused, and harmless ones are fetched."""

from __future__ import annotations

import asyncio
import gzip
import logging
import ssl
import threading
import time
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Network, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.fetch.fetcher import FetchConfig, Fetcher
from storage.web.addresses import Address, Network, classify_address
from storage.web.guard import CODES, FetchRefused, parse_url
from tests.support.web_server import HEAD, Respond, Web, drip, redirect, reply

METADATA = "169.254.169.254"
NAMES = {
    "localhost": ["127.0.0.1"],
    "localhost.example": ["127.0.0.1"],
    "metadata.google.internal": [METADATA],
    "kubernetes.default.svc": ["10.96.0.1"],
    "mixed.example": ["93.184.216.34", "10.0.0.7"],
    "mapped.example": ["::ffff:10.0.0.7"],
    "six.example": ["fd00::7"],
    "zone.example": ["fe80::1%eth0"],
    "nonsense.example": ["not an address"],
    "xn--bcher-kva.example": ["192.168.1.1"],
    "empty.example": [],
}


async def resolve_fixed(host: str) -> Sequence[str]:
    """A resolver that knows only `NAMES`."""
    if host not in NAMES:
        raise OSError("Name or service not known")
    return NAMES[host]


HOSTILE = [
    # (URL, code, words of the message or the detail)
    ("file:///etc/passwd", "fetch_bad_url", "http"),
    ("ftp://example.org/a.jpg", "fetch_bad_url", "http"),
    ("gopher://127.0.0.1:6379/_FLUSHALL", "fetch_bad_url", "http"),
    ("data:text/html,hello", "fetch_bad_url", "http"),
    ("//127.0.0.1/a.jpg", "fetch_bad_url", "http"),
    ("127.0.0.1/a.jpg", "fetch_bad_url", "http"),
    (" http://127.0.0.1/", "fetch_bad_url", "http"),
    ("http://", "fetch_bad_url", "no valid host"),
    ("http:///etc/passwd", "fetch_bad_url", "no valid host"),
    ("http:\\\\127.0.0.1\\a.jpg", "fetch_bad_url", "no valid host"),
    ("http://a..b/", "fetch_bad_url", "no valid host"),
    ("http://" + "a" * 64 + ".example/", "fetch_bad_url", "no valid host"),
    ("http://example.org/" + "a" * 9000, "fetch_bad_url", "longer"),
    ("http://user:secret@example.org/a.jpg", "fetch_bad_url", "password"),
    ("http://example.org@127.0.0.1/", "fetch_bad_url", "password"),
    ("http://example.org:80@127.0.0.1/", "fetch_bad_url", "password"),
    ("http://127.0.0.1\\@example.org/", "fetch_bad_url", "password"),
    ("http://127.0.0.1%2f@example.org/", "fetch_bad_url", "password"),
    ("http://127.0.0.1\\.example.org/", "fetch_bad_url", "no valid host"),
    ("http://127.0.0.1%00.example.org/", "fetch_bad_url", "no valid host"),
    ("http://127.0.0.1\r\nHost: inside/", "fetch_bad_url", "cannot be read"),
    ("http://127.0.0.1\t/", "fetch_bad_url", "cannot be read"),
    ("http://example.org:99999999/", "fetch_forbidden", "port"),
    ("http://example.org:-1/", "fetch_forbidden", "port"),
    ("http://example.org:22/", "fetch_forbidden", "port 22"),
    ("http://example.org:6379/", "fetch_forbidden", "port 6379"),
    ("http://example.org:0/", "fetch_forbidden", "port 0"),
    ("http://example.org:http/", "fetch_bad_url", "cannot be read"),
    # IPv4 in its usual and its other notations
    ("http://127.0.0.1/", "fetch_forbidden", "loopback"),
    ("http://127.255.255.254/", "fetch_forbidden", "loopback"),
    ("https://127.0.0.1/", "fetch_forbidden", "loopback"),
    ("http://127.0.0.1./", "fetch_forbidden", "loopback"),
    ("http://0.0.0.0/", "fetch_forbidden", "this network"),
    ("http://10.1.2.3/", "fetch_forbidden", "private"),
    ("http://172.31.255.255/", "fetch_forbidden", "private"),
    ("http://192.168.0.1/", "fetch_forbidden", "private"),
    ("http://100.64.0.1/", "fetch_forbidden", "CGNAT"),
    ("http://100.100.100.200/latest/meta-data/", "fetch_forbidden", "CGNAT"),
    (f"http://{METADATA}/latest/meta-data/", "fetch_forbidden", "link-local"),
    ("http://168.63.129.16/machine?comp=goalstate", "fetch_forbidden", "Azure"),
    ("http://192.0.0.192/opc/v2/instance/", "fetch_forbidden", "IETF"),
    ("http://192.0.2.1/", "fetch_forbidden", "documentation"),
    ("http://198.18.0.1/", "fetch_forbidden", "benchmarking"),
    ("http://192.88.99.1/", "fetch_forbidden", "6to4"),
    ("http://224.0.0.1/", "fetch_forbidden", "multicast"),
    ("http://240.0.0.1/", "fetch_forbidden", "reserved"),
    ("http://255.255.255.255/", "fetch_forbidden", "reserved"),
    ("http://2130706433/", "fetch_bad_url", "four decimal"),
    ("http://017700000001/", "fetch_bad_url", "four decimal"),
    ("http://0x7f000001/", "fetch_bad_url", "four decimal"),
    ("http://0X7F.1/", "fetch_bad_url", "four decimal"),
    ("http://127.1/", "fetch_bad_url", "four decimal"),
    ("http://127.0.1/", "fetch_bad_url", "four decimal"),
    ("http://0/", "fetch_bad_url", "four decimal"),
    ("http://0x/", "fetch_bad_url", "four decimal"),
    ("http://127.0.0.0x1/", "fetch_bad_url", "four decimal"),
    ("http://127.0.0.1.2/", "fetch_bad_url", "four decimal"),
    ("http://0177.0.0.1/", "fetch_bad_url", "cannot be read"),
    ("http://127.0.0.01/", "fetch_bad_url", "cannot be read"),
    ("http://256.0.0.1/", "fetch_bad_url", "cannot be read"),
    ("http://１２７.０.０.１/", "fetch_bad_url", "cannot be read"),
    ("http://①②⑦.⓪.⓪.①/", "fetch_bad_url", "cannot be read"),
    ("http://127。0。0。1/", "fetch_forbidden", "loopback"),
    ("http://ⓛocalhost/", "fetch_bad_url", "cannot be read"),
    # IPv6, and IPv4 addresses embedded in it
    ("http://[::1]/", "fetch_forbidden", "loopback"),
    ("http://[0:0:0:0:0:0:0:1]/", "fetch_forbidden", "loopback"),
    ("http://[::]/", "fetch_forbidden", "unspecified"),
    ("http://[::ffff:127.0.0.1]/", "fetch_forbidden", "mapped"),
    ("http://[::ffff:7f00:1]/", "fetch_forbidden", "mapped"),
    ("http://[::ffff:8.8.8.8]/", "fetch_forbidden", "mapped"),
    ("http://[::127.0.0.1]/", "fetch_forbidden", "compatible"),
    ("http://[::ffff:0:127.0.0.1]/", "fetch_forbidden", "translated"),
    ("http://[64:ff9b::169.254.169.254]/", "fetch_forbidden", "NAT64"),
    ("http://[64:ff9b:1::a9fe:a9fe]/", "fetch_forbidden", "NAT64"),
    ("http://[2002:7f00:1::]/", "fetch_forbidden", "6to4"),
    ("http://[2001:0:53aa:64c:0:fffe:80ff:fffe]/", "fetch_forbidden", "Teredo"),
    ("http://[2001:db8::1]/", "fetch_forbidden", "documentation"),
    ("http://[2606:4700::5efe:127.0.0.1]/", "fetch_forbidden", "ISATAP"),
    ("http://[fc00::1]/", "fetch_forbidden", "unique local"),
    ("http://[fd00:ec2::254]/latest/meta-data/", "fetch_forbidden", "unique local"),
    ("http://[fe80::1]/", "fetch_forbidden", "link-local"),
    ("http://[fe80::1%25eth0]/", "fetch_forbidden", "interface"),
    ("http://[2606:4700::1%25lo]/", "fetch_forbidden", "interface"),
    ("http://[fec0::1]/", "fetch_forbidden", "site-local"),
    ("http://[ff02::1]/", "fetch_forbidden", "multicast"),
    ("http://[4000::1]/", "fetch_forbidden", "not global"),
    ("http://[::1/", "fetch_bad_url", ""),
    ("http://[127.0.0.1]/", "fetch_bad_url", "cannot be read"),
    # host names
    ("http://localhost/", "fetch_forbidden", "127.0.0.1 is loopback"),
    ("http://LOCALHOST./", "fetch_forbidden", "127.0.0.1 is loopback"),
    ("http://localhost.example/", "fetch_forbidden", "127.0.0.1 is loopback"),
    ("http://metadata.google.internal/computeMetadata/v1/", "fetch_forbidden", "link-local"),
    ("https://kubernetes.default.svc/api", "fetch_forbidden", "private"),
    ("http://mixed.example/", "fetch_forbidden", "10.0.0.7 is private"),
    ("http://mapped.example/", "fetch_forbidden", "mapped"),
    ("http://six.example/", "fetch_forbidden", "unique local"),
    ("http://zone.example/", "fetch_forbidden", "interface"),
    ("http://nonsense.example/", "fetch_forbidden", "not an address"),
    ("http://bücher.example/", "fetch_forbidden", "private"),
    ("http://empty.example/", "fetch_forbidden", "no address"),
    ("http://nowhere.example/", "fetch_forbidden", "not known"),
]


def test_at_least_forty_hostile_urls_are_tested() -> None:
    assert len({url for url, _, _ in HOSTILE}) >= 40


@pytest.mark.parametrize(("url", "code", "words"), HOSTILE, ids=[url[:60] for url, _, _ in HOSTILE])
def test_a_hostile_url_is_refused(url: str, code: str, words: str) -> None:
    refused = fetch_refused(url, FetchConfig(enabled=True), resolve_fixed)
    assert (refused.code, words in f"{refused.message} {refused.detail}") == (code, True), refused.args
    assert "\n" not in refused.message
    assert "secret" not in refused.message


def test_fetching_is_off_by_default_and_the_error_says_so() -> None:
    refused = fetch_refused("http://example.org/a.jpg", FetchConfig(), resolve_fixed)
    assert refused.code == "fetch_disabled"
    assert "fetch.enabled" in refused.message
    assert "data:" in refused.message


def test_the_message_does_not_tell_which_internal_names_exist() -> None:
    config = FetchConfig(enabled=True)
    inside = fetch_refused("http://kubernetes.default.svc/", config, resolve_fixed)
    nowhere = fetch_refused("http://nowhere.example/", config, resolve_fixed)
    assert inside.message.split(": ", 1)[1] == nowhere.message.split(": ", 1)[1]
    assert "10.96" not in inside.message


def test_addresses_from_the_systems_resolver_are_checked_too() -> None:
    assert fetch_refused("http://localhost/", FetchConfig(enabled=True)).code == "fetch_forbidden"
    assert "loopback" in fetch_refused("http://localhost/", FetchConfig(enabled=True)).detail


def test_a_log_shows_no_part_of_a_url(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray.serve.sightline"):
        for url in (
            "http://user:secret@example.org/",
            "http://user:secret",
            "http://nowhere.example/secret?secret#secret",
        ):
            fetch_refused(url, FetchConfig(enabled=True), resolve_fixed)
        fetch_refused("http://localhost/", FetchConfig(enabled=True), resolve_fixed)
    assert "secret" not in caplog.text
    assert "127.0.0.1 is loopback" in caplog.text  # for the operator only, not for the client


def test_an_invalid_config_is_refused() -> None:
    for wrong in (
        {"max_byte": 1},
        {"max_bytes": 0},
        {"max_redirects": -1},
        {"ports": [0]},
        {"allowed_networks": ["10.0.0.1/8"]},
        {"allowed_hosts": ["https://images.example"]},
        {"allowed_hosts": ["Images.example"]},
        {"allowed_hosts": ["bücher.example"]},
        {"allowed_hosts": ["images.*"]},
    ):
        with pytest.raises(ValidationError):
            FetchConfig.model_validate(wrong)
    with pytest.raises(KeyError):
        FetchRefused("made_up", "")


# A real server on loopback. `allowed_networks` allows it, as an operator with an image store in the cluster does.

IMAGE = bytes(range(256)) * 40


LONG = 60
"""Seconds. Only a fetch that hangs takes so long, also on a busy machine."""


def fetch_from(responses: dict[str, Respond], path: str, **config: Any) -> tuple[bytes | FetchRefused, Web, float]:
    """Fetch a path from a server with these responses. Returns the body or the refusal, the server, and the seconds."""

    async def run() -> tuple[bytes | FetchRefused, Web, float]:
        async with Web(responses).run() as web:
            options = {
                "ports": (80, 443, web.port),
                "allowed_networks": ("127.0.0.1/32",),
                "max_seconds": LONG,
                **config,
            }
            async with Fetcher(FetchConfig(enabled=True, **options), resolve_fixed) as fetcher:
                start = time.perf_counter()
                try:
                    outcome: bytes | FetchRefused = await fetcher.fetch(f"http://127.0.0.1:{web.port}{path}")
                except FetchRefused as refused:
                    outcome = refused
                return outcome, web, time.perf_counter() - start

    return asyncio.run(run())


def fetch_refused(url: str, config: FetchConfig, resolver: Any = None) -> FetchRefused:
    """Return the refusal of a URL. Fails if the URL was fetched."""

    async def run() -> None:
        async with Fetcher(config, resolver) as fetcher:
            await fetcher.fetch(url)

    with pytest.raises(FetchRefused) as caught:
        asyncio.run(run())
    assert caught.value.code in CODES
    return caught.value


def test_an_image_is_fetched() -> None:
    outcome, web, _ = fetch_from({"/a%20b.png?x=1": reply(IMAGE)}, "/a b.png?x=1#part")
    assert outcome == IMAGE
    head = web.seen[0]
    assert f"\r\nHost: 127.0.0.1:{web.port}\r\n" in head
    assert "\r\nAccept-Encoding: identity\r\n" in head
    assert "ookie" not in head
    assert "uthorization" not in head


def test_an_image_is_fetched_from_the_standard_librarys_server(tmp_path: Path) -> None:
    (tmp_path / "an image.png").write_bytes(IMAGE)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]

        async def run() -> list[bytes]:
            config = FetchConfig(enabled=True, ports=(port,), allowed_networks=(IPv4Network("127.0.0.0/8"),))
            async with Fetcher(config) as fetcher:
                return list(
                    await asyncio.gather(*(fetcher.fetch(f"http://localhost:{port}/an image.png") for _ in range(8)))
                )

        assert asyncio.run(run()) == [IMAGE] * 8
        server.shutdown()


def test_harmless_redirects_are_followed() -> None:
    responses = {
        "/1": redirect("/2", "301 Moved Permanently"),
        "/2": redirect("3?q=ü", "307 Temporary Redirect"),
        "/3?q=%C3%BC": reply(IMAGE),
    }
    assert fetch_from(responses, "/1")[0] == IMAGE


@pytest.mark.parametrize(
    ("location", "code", "words"),
    [
        (f"http://{METADATA}/latest/meta-data/iam/", "fetch_forbidden", "link-local"),
        (f"//{METADATA}/", "fetch_forbidden", "link-local"),
        ("http://metadata.google.internal/", "fetch_forbidden", "link-local"),
        ("http://127.0.0.2/", "fetch_forbidden", "loopback"),
        ("http://[::1]/", "fetch_forbidden", "loopback"),
        ("http://2852039166/", "fetch_bad_url", "four decimal"),
        ("https://kubernetes.default.svc/", "fetch_forbidden", "private"),
        ("http://user:pass@example.org/", "fetch_bad_url", "password"),
        ("http://127.0.0.1:22/", "fetch_forbidden", "port 22"),
        ("file:///etc/passwd", "fetch_bad_url", "http"),
        ("http://nowhere.example/", "fetch_forbidden", "not known"),
    ],
)
def test_a_redirect_is_checked_like_the_first_url(location: str, code: str, words: str) -> None:
    outcome, web, _ = fetch_from({"/": redirect(location)}, "/")
    assert isinstance(outcome, FetchRefused)
    assert (outcome.code, words in f"{outcome.message} {outcome.detail}") == (code, True), outcome.args
    assert len(web.seen) == 1


def test_the_number_of_redirects_is_limited() -> None:
    outcome, web, _ = fetch_from({"/": redirect("/")}, "/", max_redirects=2)
    assert isinstance(outcome, FetchRefused)
    assert (outcome.code, "2 times" in outcome.message, len(web.seen)) == ("fetch_failed", True, 3)
    outcome, web, _ = fetch_from({"/": redirect("/next"), "/next": reply(IMAGE)}, "/", max_redirects=0)
    assert isinstance(outcome, FetchRefused)
    assert len(web.seen) == 1


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SLOW = {
    "no response": drip(b"", 60),
    "slow head": drip(b"H", 0.05),
    "endless head": drip(b"X-More: 1\r\n", 0.05, HEAD),
    "endless informational responses": drip(b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.05),
    "dripping body": drip(b"x", 0.05, HEAD + b"Content-Length: 1000\r\n\r\n"),
    "dripping chunks": drip(b"1\r\nx\r\n", 0.05, CHUNKED),
    "body without end or length": drip(b"x", 0.05, HEAD + b"\r\n"),
    "stalled body": drip(b"", 60, HEAD + b"Content-Length: 1000\r\n\r\nx"),
}


@pytest.mark.parametrize("response", SLOW.values(), ids=SLOW)
def test_every_slow_part_counts_towards_the_timeout(response: Respond) -> None:
    outcome, _, seconds = fetch_from({"/": response}, "/", max_seconds=0.4)
    assert isinstance(outcome, FetchRefused)
    assert (outcome.code, "0.4 s" in outcome.message) == ("fetch_timeout", True), outcome.args
    assert 0.3 < seconds < LONG


def test_redirects_share_one_timeout() -> None:
    async def wait(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await redirect("/")(writer)

    outcome, web, seconds = fetch_from({"/": wait}, "/", max_seconds=0.5, max_redirects=100)
    assert isinstance(outcome, FetchRefused)
    assert outcome.code == "fetch_timeout"
    assert len(web.seen) <= 3
    assert seconds < LONG


def test_a_slow_dns_lookup_counts_towards_the_timeout() -> None:
    async def resolve(host: str) -> Sequence[str]:
        await asyncio.sleep(60)
        return []

    start = time.perf_counter()
    refused = fetch_refused("http://slow.example/", FetchConfig(enabled=True, max_seconds=0.3), resolve)
    assert refused.code == "fetch_timeout"
    assert time.perf_counter() - start < LONG


LARGE = {
    "declared": reply(b"", length=10**12),
    "more than declared is never read": reply(IMAGE * 10, length=10**6),
    "endless": drip(b"x" * 65536, 0, HEAD + b"\r\n"),
    "endless chunks": drip(b"10000\r\n" + b"x" * 65536 + b"\r\n", 0, CHUNKED),
}


@pytest.mark.parametrize("response", LARGE.values(), ids=LARGE)
def test_a_too_large_response_is_refused(response: Respond) -> None:
    outcome, _, seconds = fetch_from({"/": response}, "/", max_bytes=len(IMAGE))
    assert isinstance(outcome, FetchRefused)
    assert (outcome.code, f"{len(IMAGE):,} bytes" in outcome.message) == ("fetch_too_large", True), outcome.args
    assert seconds < LONG


def test_a_response_of_exactly_the_limit_is_fetched() -> None:
    assert fetch_from({"/": reply(IMAGE)}, "/", max_bytes=len(IMAGE))[0] == IMAGE


BROKEN = {
    "compressed": (reply(gzip.compress(b"\0" * 10**6), Content_Encoding="gzip"), "fetch_encoded", "gzip"),
    "two encodings": (reply(b"x", Content_Encoding="identity, br"), "fetch_encoded", "br"),
    "not found": (reply(b"", "404 Not Found"), "fetch_failed", "404"),
    "an error": (reply(b"", "500 Oh"), "fetch_failed", "500"),
    "partial content": (reply(b"x", "206 Partial Content"), "fetch_failed", "206"),
    "a redirect without a location": (reply(b"", "302 Found"), "fetch_failed", "302"),
    "not HTTP": (drip(b"220 mail.example ESMTP\r\n", 0), "fetch_failed", "HTTP"),
    "less than declared": (reply(b"x", length=100), "fetch_failed", "closed the connection"),
    "two lengths": (reply(b"xy", Content_length="1"), "fetch_failed", "HTTP"),
    "an endless header line": (drip(b"X" * 10_000, 0, HEAD + b"X: "), "fetch_failed", "HTTP"),
}


@pytest.mark.parametrize(("response", "code", "words"), BROKEN.values(), ids=BROKEN)
def test_a_bad_response_is_refused_with_a_message(response: Respond, code: str, words: str) -> None:
    outcome, _, _ = fetch_from({"/": response}, "/")
    assert isinstance(outcome, FetchRefused)
    assert (outcome.code, words in outcome.message) == (code, True), outcome.args


def test_a_closed_port_is_refused_with_a_message() -> None:
    config = FetchConfig(enabled=True, ports=(1,), allowed_networks=(IPv4Network("127.0.0.1/32"),))
    refused = fetch_refused("http://127.0.0.1:1/", config)
    assert (refused.code, "could not be connected" in refused.message) == ("fetch_failed", True)


def test_the_connection_goes_to_the_checked_address() -> None:
    """DNS rebinding: the first lookup returns an allowed address, every later one a forbidden address."""
    asked = []

    async def rebind(host: str) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.2" if len(asked) == 1 else "127.0.0.1"]

    async def run() -> None:
        async with Web({"/": reply(b"outside")}).run("127.0.0.2") as outside:
            inside = Web({"/": reply(b"inside")})
            server = await asyncio.start_server(inside.handle, "127.0.0.1", outside.port)
            allowed = (IPv4Network("127.0.0.2/32"),)
            config = FetchConfig(enabled=True, ports=(outside.port,), allowed_networks=allowed)
            url = f"http://rebind.example:{outside.port}/"
            async with server, Fetcher(config, rebind) as fetcher:
                assert await fetcher.fetch(url) == b"outside"
                assert asked == ["rebind.example"]
                assert f"Host: rebind.example:{outside.port}\r\n" in outside.seen[0]
                with pytest.raises(FetchRefused) as caught:  # the server closed, so this is a new connection
                    await fetcher.fetch(url)
            assert (caught.value.code, "127.0.0.1" in caught.value.detail) == ("fetch_forbidden", True)
            assert (asked, inside.seen) == (["rebind.example"] * 2, [])

    asyncio.run(run())


def test_the_next_address_is_tried_if_one_refuses_the_connection() -> None:
    async def resolve(host: str) -> Sequence[str]:
        return ["127.0.0.3", "127.0.0.1"]

    async def run() -> None:
        async with Web({"/": reply(IMAGE)}).run() as web:
            allowed = (IPv4Network("127.0.0.0/8"),)
            config = FetchConfig(enabled=True, ports=(web.port,), allowed_networks=allowed)
            async with Fetcher(config, resolve) as fetcher:
                assert await fetcher.fetch(f"http://two.example:{web.port}/") == IMAGE

    asyncio.run(run())


def test_only_allowed_hosts_are_fetched() -> None:
    config = FetchConfig(enabled=True, allowed_hosts=("images.example", "*.cdn.example"))
    for host in ("example.org", "cdn.example", "evilcdn.example", "images.example.evil.example", "93.184.216.34"):
        refused = fetch_refused(f"http://{host}/", config, resolve_fixed)
        assert (refused.code, "does not fetch from this host" in refused.message) == ("fetch_forbidden", True)
    for host in ("IMAGES.example", "a.b.cdn.example."):  # allowed, but without an address
        assert "not known" in fetch_refused(f"http://{host}/", config, resolve_fixed).detail


@pytest.mark.parametrize(("certified", "works"), [("images.example", True), ("other.example", False)])
def test_the_tls_certificate_must_be_for_the_host_name(
    certified: str, works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(certified).configure_cert(context)

    async def resolve(host: str) -> Sequence[str]:
        return ["127.0.0.1"]

    async def run() -> bytes:
        async with Web({"/": reply(IMAGE)}).run(tls=context) as web:
            allowed = (IPv4Network("127.0.0.1/32"),)
            config = FetchConfig(enabled=True, ports=(web.port,), allowed_networks=allowed)
            async with Fetcher(config, resolve) as fetcher:
                try:
                    return await fetcher.fetch(f"https://images.example.:{web.port}/")
                finally:
                    assert web.server_names == ["images.example"]

    if works:
        assert asyncio.run(run()) == IMAGE
        return
    with pytest.raises(FetchRefused) as caught:
        asyncio.run(run())
    assert (caught.value.code, "certificate" in caught.value.message) == ("fetch_failed", True)
    assert "images.example" in caught.value.detail


def test_a_cancelled_fetch_frees_its_connection() -> None:
    async def run() -> None:
        async with Web({"/": drip(b"x", 0.05, HEAD + b"\r\n"), "/ok": reply(IMAGE)}).run() as web:
            allowed = (IPv4Network("127.0.0.1/32"),)
            config = FetchConfig(enabled=True, ports=(web.port,), allowed_networks=allowed, max_seconds=LONG)
            async with Fetcher(config) as fetcher:
                tasks = [asyncio.create_task(fetcher.fetch(f"http://127.0.0.1:{web.port}/")) for _ in range(40)]
                await asyncio.sleep(0.3)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert await fetcher.fetch(f"http://127.0.0.1:{web.port}/ok") == IMAGE

    asyncio.run(run())


# Properties

# Written from the RFCs, independently of the table under test.
SPECIAL = """
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24
192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3 ::/3 4000::/2 8000::/1 2001::/23
2001:db8::/32 2002::/16 3fff::/20
"""
NEVER: list[Network] = [ip_network(text) for text in SPECIAL.split()]
EDGES = [  # the addresses just before and after each network, which a wrong mask would classify wrongly
    type(network[0])(number)
    for network in NEVER
    for number in (int(network[0]) - 1, int(network[-1]) + 1)
    if 0 <= number < 2**network.max_prefixlen
]
ADDRESSES: st.SearchStrategy[Address] = st.one_of(
    st.ip_addresses(), st.sampled_from(EDGES), *(st.ip_addresses(network=str(network)) for network in NEVER)
)


@settings(max_examples=600, deadline=None, database=None)
@given(ADDRESSES)
def test_no_accepted_address_is_special(address: Address) -> None:
    if classify_address(address) is None:
        assert not any(address in network for network in NEVER)
        assert address.is_global
        for kind in ("multicast", "reserved", "unspecified", "loopback", "private", "link_local"):
            assert not getattr(address, f"is_{kind}")
        if isinstance(address, IPv6Address):
            assert (address.ipv4_mapped, address.sixtofour, address.teredo) == (None, None, None)


def test_public_addresses_are_accepted() -> None:
    public = (
        "1.1.1.1 8.8.8.8 93.184.216.34 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 172.15.255.255 172.32.0.0 "
    )
    public += (
        "168.63.129.15 169.253.255.255 192.0.1.0 223.255.255.255 2606:4700::1111 2a00:1450:4001::1 2001:4860::8888"
    )
    for text in public.split():
        assert classify_address(ip_address(text)) is None, text


@settings(max_examples=200, deadline=None, database=None)
@given(st.text(max_size=60), st.sampled_from(["http://", "https://", "", "http:", "//", "http://["]))
def test_any_text_is_a_url_or_is_refused(text: str, prefix: str) -> None:
    try:
        url = parse_url(prefix + text)
    except FetchRefused:
        return
    assert url.scheme in ("http", "https")
    assert url.raw_host
    assert not url.userinfo
