"""Images on the web: what each answer of a host becomes, and the bounds of requests, of memory and of time.

Real servers on loopback, of which 127.0.0.1, 127.0.0.2, ... are the hosts. The cases under "reports" are what people
have reported of other programs that fetch lists of URLs; the numbers are those of the public reports.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipelines.config import ParquetConfig
from pipelines.inputs import lists
from pipelines.inputs.parquet.file import FILES_OF_URLS
from pipelines.inputs.rows import Input, Reading, Row
from pipelines.inputs.web import hosts, memory
from pipelines.inputs.web.config import FetchConfig
from pipelines.inputs.web.fetch import TRIES
from pipelines.inputs.web.hosts import FAILURES, PAUSES, CachedResolver, back_off
from pipelines.inputs.web.images import RESPONSE_KEY, _open_loop, fetch_urls
from siglip.images.rejection import REASONS
from storage.settings import ConfigError
from tests.support.input_folder import OPTIONS, Folder
from tests.support.jobs import make_image
from tests.support.web_server import HEAD, Respond, drip, redirect, reply, reset, serve, then, url_of

IMAGE = make_image()
LOOPBACK = ip_network("127.0.0.0/8")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "BACKOFF_SECONDS", 0.01)


def reading(port: int, max_bytes: int = 2**20, last: bool = False, **fetch: Any) -> Reading:
    settings = {"enabled": True, "ports": (port,), "allowed_networks": (LOOPBACK,), "max_seconds": 20, **fetch}
    return Reading(OPTIONS, max_bytes, ParquetConfig(), fetch=FetchConfig(**settings), last=last)


def listed(urls: Sequence[str]) -> list[tuple[int, Input]]:
    return [(number, Input("uri", lists.resolve(url, "/l.csv"), url, -1, "")) for number, url in enumerate(urls)]


def fetch(urls: Sequence[str], settings: Reading) -> list[Row]:
    """The rows of URLs, in the order of the list. Checks that each has one."""
    rows = [row for _, row in fetch_urls(listed(urls), settings)]
    assert sorted(row.number for row in rows) == [*range(len(urls))]
    assert _open_loop(settings.fetch, settings.max_bytes).fetcher.memory.held == 0 or rows
    return sorted(rows, key=lambda row: row.number)


def fetch_one(response: Respond, path: str = "/", **settings: Any) -> tuple[Row, list[str]]:
    """The row of one URL, and the requests that the server saw."""
    with serve({path: response}) as web:
        [row] = fetch([url_of(web, path)], reading(web.port, **settings))
        return row, web.seen


OUTCOMES: dict[str, tuple[Respond, str | None, str]] = {
    # (response, reason or None for an image, words of the detail or of the note)
    "an image": (reply(IMAGE, Content_Type="image/png"), None, "HTTP 200, image/png"),
    "an image that is said to be text": (reply(IMAGE, Content_Type="text/html"), None, "HTTP 200, text/html"),
    "no content type": (reply(IMAGE), None, "HTTP 200, no Content-Type"),
    "a page in the place of an image": (reply(b"<html>log in", Content_Type="text/html"), None, "text/html"),
    "404": (reply(b"", "404 Not Found"), "missing", "HTTP 404"),
    "410": (reply(b"", "410 Gone"), "missing", "HTTP 410"),
    "401": (reply(b"", "401 Unauthorized"), "forbidden", "HTTP 401"),
    "403": (reply(b"", "403 Forbidden"), "forbidden", "HTTP 403"),
    "451": (reply(b"", "451 Unavailable For Legal Reasons"), "forbidden", "HTTP 451"),
    "400": (reply(b"", "400 Bad Request"), "unreadable", "HTTP 400"),
    "206": (reply(b"x", "206 Partial Content"), "unreadable", "HTTP 206"),
    "204": (reply(b"", "204 No Content"), "unreadable", "HTTP 204"),
    "a redirect to nowhere": (reply(b"", "302 Found"), "unreadable", "HTTP 302"),
    "a redirect in a circle": (redirect("/"), "unreadable", "more than 3 times"),
    "a redirect to a private address": (redirect("http://10.0.0.1/a.jpg"), "forbidden", "port"),
    "a redirect to a file": (redirect("file:///etc/passwd"), "unreadable", "http"),
    "a redirect with a password": (redirect("http://u:secret@example.org/"), "unreadable", "password"),
    "too large by its length": (reply(b"", length=10**9), "too_many_bytes", "HTTP 200, over 1048576 bytes"),
    "too large without a length": (drip(bytes(2**16), 0, HEAD + b"\r\n"), "too_many_bytes", "over 1048576"),
    "408": (reply(b"", "408 Request Timeout"), "host_trouble", "127.0.0.1: HTTP 408"),
    "429": (reply(b"", "429 Too Many Requests"), "host_trouble", "127.0.0.1: HTTP 429"),
    "500": (reply(b"", "500 Internal Server Error"), "host_trouble", "127.0.0.1: HTTP 500"),
    "503": (reply(b"", "503 Service Unavailable"), "host_trouble", "127.0.0.1: HTTP 503"),
    "a reset connection": (reset, "host_trouble", "127.0.0.1: broken off"),
    "no HTTP": (drip(b"220 mail ESMTP\r\n", 0), "host_trouble", "127.0.0.1: broken off"),
    "less than it said": (reply(IMAGE[:50], length=len(IMAGE)), "host_trouble", "127.0.0.1: broken off"),
    "noai": (reply(IMAGE, X_Robots_Tag="NoAI"), "forbidden", "X-Robots-Tag: noai"),
    "noindex of all": (reply(IMAGE, X_Robots_Tag="nofollow, noindex"), "forbidden", "X-Robots-Tag: noindex"),
    "noai of this agent": (reply(IMAGE, X_Robots_Tag="Sightline: noai"), "forbidden", "X-Robots-Tag: noai"),
    "noindex of another agent": (reply(IMAGE, X_Robots_Tag="googlebot: noindex"), None, "HTTP 200"),
    "noai before a date": (
        reply(IMAGE, X_Robots_Tag="noai, unavailable_after: 25 Jun 2010 15:00:00 PST"),
        "forbidden",
        "X-Robots-Tag: noai",
    ),
    "noai after a value": (reply(IMAGE, X_Robots_Tag="max-snippet: 5, noai"), "forbidden", "X-Robots-Tag: noai"),
    "noai of this agent after another's tags": (
        reply(IMAGE, X_Robots_Tag="googlebot: nofollow, noarchive, sightline: noai"),
        "forbidden",
        "X-Robots-Tag: noai",
    ),
    "noindex of another agent, second": (reply(IMAGE, X_Robots_Tag="bot: nofollow, noindex"), None, "HTTP 200"),
    "none": (reply(IMAGE, X_Robots_Tag="none"), "forbidden", "X-Robots-Tag: none"),
    "another directive": (reply(IMAGE, X_Robots_Tag="nofollow"), None, "HTTP 200"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_each_answer_is_an_image_a_reject_or_waits(name: str) -> None:
    response, reason, words = OUTCOMES[name]
    row, seen = fetch_one(response)
    assert (row.rejected.reason if row.rejected else None) == reason, row.rejected
    assert words in (row.rejected.detail if row.rejected else row.note)
    assert (row.data is None) == (reason is not None)
    assert "secret" not in str(row.rejected)
    if reason == "host_trouble":
        assert (row.trouble, len(seen)) == (words, TRIES)
    else:
        assert row.trouble == ""
        assert len(seen) == (4 if "circle" in name else 1)


def test_every_reason_of_fetching_is_documented() -> None:
    assert {reason for _, reason, _ in OUTCOMES.values() if reason} | {"unreachable"} <= REASONS.keys()


def test_a_timeout_and_a_closed_port_wait() -> None:
    row, _ = fetch_one(drip(b"", 60), max_seconds=0.2)
    assert (row.rejected and row.rejected.reason, row.trouble) == ("host_trouble", "127.0.0.1: timeout")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    [row] = fetch([f"http://127.0.0.1:{port}/"], reading(port))
    assert (row.rejected and row.rejected.reason, row.trouble) == ("host_trouble", "127.0.0.1: no connection")


def test_the_last_run_rejects_what_would_wait() -> None:
    row, _ = fetch_one(reply(b"", "503 No"), last=True, runs=2)
    assert row.rejected is not None
    assert (row.rejected.reason, row.trouble) == ("unreachable", "")
    assert "127.0.0.1: HTTP 503, at the last of fetch.runs 2" in row.rejected.detail


def test_what_fails_once_is_tried_again() -> None:
    for failure in (reply(b"", "429 No"), reply(b"", "502 No"), reset, reply(IMAGE[:9], length=99)):
        row, seen = fetch_one(then(failure, reply(IMAGE)))
        assert (row.data, len(seen)) == (IMAGE, 2)


def test_retry_after_is_honoured_as_seconds_and_as_a_date() -> None:
    start = time.monotonic()
    row, _ = fetch_one(then(reply(b"", "429 No", Retry_After="1"), reply(IMAGE)))
    assert row.data == IMAGE
    assert time.monotonic() - start >= 1
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert fetch_one(then(reply(b"", "503 No", Retry_After=past), reply(IMAGE)))[0].data == IMAGE
    assert fetch_one(then(reply(b"", "503 No", Retry_After="soon"), reply(IMAGE)))[0].data == IMAGE


def test_a_host_that_asks_for_a_long_pause_is_left_to_the_next_run() -> None:
    with serve({f"/{n}": reply(b"", "429 No", Retry_After="3600") for n in range(50)}) as web:
        rows = fetch([url_of(web, f"/{n}") for n in range(50)], reading(web.port, host_connections=1))
        assert {row.rejected.reason for row in rows if row.rejected} == {"host_trouble"}
        assert len(web.seen) == 1
        assert "3,600 s" in str(rows[0].rejected)
        assert "not tried" in str(rows[1].rejected)


def test_a_host_that_always_asks_for_a_short_pause_is_left_to_the_next_run() -> None:
    """Else its images would wait for each other's pauses: of 10,000 images of a host that asks for 60 s, for days."""
    with serve({f"/{n}": reply(b"", "429 No", Retry_After="0") for n in range(400)}) as web:
        rows = fetch([url_of(web, f"/{n}") for n in range(400)], reading(web.port, host_connections=1))
        assert {row.rejected.reason for row in rows if row.rejected} == {"host_trouble"}
        assert len(web.seen) <= PAUSES + TRIES


def test_a_dead_host_costs_a_few_attempts_and_holds_up_no_other() -> None:
    dead = {f"/{n}": drip(b"", 60) for n in range(200)}
    alive = {f"/{n}": reply(IMAGE) for n in range(200)}
    with serve(dead, "127.0.0.2") as two, serve(alive) as one:
        urls = [url_of(two, f"/{n}", "127.0.0.2") for n in range(200)] + [url_of(one, f"/{n}") for n in range(200)]
        settings = reading(one.port, ports=(one.port, two.port), max_seconds=0.5, host_connections=2)
        order = [row.number for _, row in fetch_urls(listed(urls), settings)]
        rows = fetch(urls, settings)
        assert sum(row.data == IMAGE for row in rows) == 200
        assert sum(bool(row.trouble) for row in rows) == 200
        assert max(order.index(n) for n in range(200, 400)) < max(order.index(n) for n in range(200))
        # Until the host has failed often enough; then it rests, also for the second list.
        assert len(two.seen) <= FAILURES + 2


def test_requests_are_bounded_for_each_host_and_in_all() -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        await reply(IMAGE)(writer)

    pages = {f"/{n}": slow for n in range(40)}
    with serve(pages) as one, serve(pages, "127.0.0.2") as two, serve(pages, "127.0.0.3") as three:
        urls = [url_of(web, f"/{n}", f"127.0.0.{i}") for n in range(40) for i, web in enumerate((one, two, three), 1)]
        ports = (one.port, two.port, three.port)
        rows = fetch(urls, reading(0, ports=ports, host_connections=3, connections=7))
        assert all(row.data == IMAGE for row in rows)
        assert max(one.most, two.most, three.most) <= 3
        assert one.most + two.most + three.most <= 9
        rows = fetch(urls, reading(0, ports=ports, host_connections=3, connections=2))
        assert all(row.data == IMAGE for row in rows)


def test_the_readers_share_the_connections() -> None:
    config = FetchConfig(connections=100, host_connections=8)
    for readers, each, host in ((1, 100, 8), (4, 25, 2), (64, 1, 1)):
        share = config.for_reader(readers)
        assert (share.connections, share.host_connections) == (each, host)


def test_memory_is_bounded_however_large_and_many_the_images_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT_BYTES", 2**20)
    monkeypatch.setattr(memory, "MOST_BYTES", 2**21)
    body = bytes(900_000)
    with serve({f"/{n}": reply(body) for n in range(40)}) as web:
        settings = reading(web.port, host_connections=32)
        seen = 0
        for _, row in fetch_urls(listed([url_of(web, f"/{n}") for n in range(40)]), settings):
            assert row.data == body
            time.sleep(0.01)  # a slow decoder
            seen += 1
        counted = _open_loop(settings.fetch, settings.max_bytes).fetcher.memory
        assert seen == 40
        assert len(web.seen) > 40, "some images were dropped and fetched again"
        assert counted.most <= 2**21 + len(body)


def test_a_reader_that_stops_early_frees_what_was_fetched() -> None:
    with serve({**{f"/{n}": reply(IMAGE) for n in range(50)}, "/slow": drip(b"x", 0.1, HEAD + b"\r\n")}) as web:
        settings = reading(web.port)
        urls = [url_of(web, f"/{n}") for n in range(50)]
        rows: Iterator[Any] = fetch_urls(listed([url_of(web, "/slow"), *urls]), settings)
        next(rows)
        rows.close()  # type: ignore[attr-defined]
        assert len(fetch(urls, settings)) == 50
        loop = _open_loop(settings.fetch, settings.max_bytes)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop.loop).result()
        assert loop.fetcher.memory.held == 0


def test_what_identifies_the_version_of_an_image_is_recorded() -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    fields: dict[str, Any] = {"ETag": '"v1"', "Last_Modified": date, "Content_Type": "image/png"}
    with serve({"/a": redirect("/b"), "/b": reply(IMAGE, **fields), "/c": reply(IMAGE)}) as web:
        planned = [
            (0, Input("uri", url_of(web, "/a"), "k", -1, "", metadata='{"caption": "x", "n": 1.50}')),
            (1, Input("uri", url_of(web, "/c#part"), "k", -1, "")),
        ]
        rows = sorted((row for _, row in fetch_urls(planned, reading(web.port))), key=lambda row: row.number)
    assert (rows[0].metadata or "").startswith('{"caption": "x", "n": 1.50, ')
    assert json.loads(rows[0].metadata or "")[RESPONSE_KEY] == {
        "url": url_of(web, "/b"),
        "etag": '"v1"',
        "last-modified": date,
        "content-type": "image/png",
    }
    assert json.loads(rows[1].metadata or "") == {RESPONSE_KEY: {}}
    assert rows[0].sha256 == rows[1].sha256


def test_nothing_is_fetched_unless_it_is_enabled() -> None:
    with serve({"/": reply(IMAGE)}) as web:
        with pytest.raises(ConfigError, match=r"set fetch\.enabled: true"):
            fetch([url_of(web, "/")], reading(web.port, enabled=False))
        assert web.seen == []


@pytest.mark.parametrize(
    ("url", "settings", "words"),
    [
        ("http://127.0.0.1/a.jpg", {"allowed_networks": ()}, "127.0.0.1 is loopback (see fetch.allowed_networks)"),
        ("http://localhost/a.jpg", {"allowed_networks": ()}, "is loopback (see fetch.allowed_networks)"),
        ("http://10.0.0.1/a.jpg", {}, "10.0.0.1 is private (see fetch.allowed_networks)"),
        ("http://169.254.169.254/latest", {}, "link-local"),
        ("http://example.org:22/a.jpg", {}, "port 22: not allowed (see fetch.ports"),
        ("http://b.example/a.jpg", {"allowed_hosts": ("a.example",)}, "b.example: not allowed (see fetch.ports and"),
    ],
)
def test_addresses_that_are_not_allowed_are_rejected(url: str, settings: dict[str, Any], words: str) -> None:
    [row] = fetch([url], reading(80, **settings))
    assert row.rejected is not None
    assert (row.rejected.reason, words in row.rejected.detail) == ("forbidden", True), row.rejected
    assert row.trouble == ""


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"user_agent": "a\r\nb"}, {"user_agent": " "}, {"user_agent": "ü"}, {"runs": 0}, {"connections": 0}):
        with pytest.raises(ValidationError):
            FetchConfig.model_validate(wrong)


def test_pauses_grow_and_are_bounded() -> None:
    assert all(0.5 * 0.01 * 2**n <= back_off(n) <= 1.5 * 0.01 * 2**n for n in range(8))
    assert max(back_off(n) for n in range(2000)) <= hosts.LONGEST_SECONDS


# Reports


def test_a_resolver_is_asked_once_for_many_images_of_a_host() -> None:
    """img2dataset #209, #42: look-ups of each image overload the resolver, which then says that hosts do not exist."""
    asked: list[str] = []

    async def resolve(host: str) -> Sequence[str]:
        asked.append(host)
        await asyncio.sleep(0.01)
        if host == "bad.example":
            raise OSError("Temporary failure in name resolution")
        return ["127.0.0.1"]

    async def run() -> None:
        cached = CachedResolver(resolve)
        assert await asyncio.gather(*(cached("a.example") for _ in range(100))) == [["127.0.0.1"]] * 100
        assert asked == ["a.example"]
        for _ in range(2):
            with pytest.raises(OSError, match="Temporary"):
                await cached("bad.example")
        assert asked == ["a.example", "bad.example", "bad.example"], "a failure is not kept"

    asyncio.run(run())


def test_a_name_without_an_address_waits() -> None:
    """img2dataset #430, #452: after trouble of the resolver, all images are lost, and no run takes them up."""
    [row] = fetch(["http://host.invalid/a.jpg"], reading(80))
    assert row.rejected is not None
    assert (row.rejected.reason, row.trouble) == ("host_trouble", "host.invalid: no address")


def test_a_body_that_never_ends_or_drips_ends_at_the_time_limit() -> None:
    """img2dataset #289, #402: the last images of a list never come to an end."""
    start = time.monotonic()
    for response in (drip(b"x", 0.05, HEAD + b"\r\n"), drip(b"x", 0.05, HEAD + b"Content-Length: 10000\r\n\r\n")):
        row, _ = fetch_one(response, max_seconds=0.3)
        assert row.trouble == "127.0.0.1: timeout"
    assert time.monotonic() - start < 20


def test_compressed_bodies_are_rejected_and_not_taken_for_images() -> None:
    """transmission #753, wpull #14: servers send gzip although it was not asked for. A bomb must not be unpacked."""
    row, seen = fetch_one(reply(gzip.compress(IMAGE), Content_Encoding="gzip"))
    assert row.rejected is not None
    assert (row.rejected.reason, "gzip" in row.rejected.detail) == ("unreadable", True)
    assert "\r\nAccept-Encoding: identity\r\n" in seen[0]


def test_redirects_over_several_hosts_are_followed() -> None:
    """img2dataset #442: URLs of image stores redirect several times."""
    with serve({"/a": reply(IMAGE)}, "127.0.0.3") as three:
        second: dict[str, Respond] = {"/a": redirect(url_of(three, "/a", "127.0.0.3"), "307 Temporary Redirect")}
        with serve(second, "127.0.0.2") as two, serve({"/a": redirect(url_of(two, "/a", "127.0.0.2"))}) as one:
            settings = reading(0, ports=(one.port, two.port, three.port))
            [row] = fetch([url_of(one, "/a")], settings)
    assert row.data == IMAGE
    assert json.loads(row.metadata or "")[RESPONSE_KEY]["url"] == url_of(three, "/a", "127.0.0.3")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/cierra_mina_peñoles.png", "/cierra_mina_pe%C3%B1oles.png"),  # bing_image_downloader #36
        ("/a b.png", "/a%20b.png"),
        ("/a%20b%2Fc.png", "/a%20b%2Fc.png"),  # what is encoded already stays
        ("/a.png?x=ü&y=1%2C2", "/a.png?x=%C3%BC&y=1%2C2"),
        ("/100%.png", "/100%.png"),
        ("/Gradius II - Yabō.jpg", "/Gradius%20II%20-%20Yab%C5%8D.jpg"),  # Update_All_MiSTer #149
    ],
)
def test_urls_are_encoded_as_browsers_encode_them(url: str, path: str) -> None:
    with serve({path: reply(IMAGE)}) as web:
        [row] = fetch([url_of(web, url)], reading(web.port))
        assert row.data == IMAGE, row.rejected


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0", "\r\n"])
def test_blanks_around_a_url_do_not_belong_to_it(blank: str) -> None:
    with serve({"/": reply(IMAGE)}) as web:
        [row] = fetch([f"{blank}HTTP://127.0.0.1:{web.port}/{blank}"], reading(web.port))
        assert row.data == IMAGE, row.rejected


def test_a_password_in_a_url_is_neither_sent_nor_stored() -> None:
    """aria2 #1329 (CVE-2019-3500): passwords of URLs stand in logs."""
    with serve({"/": reply(IMAGE)}) as web:
        [row] = fetch([f"http://me:secret@127.0.0.1:{web.port}/"], reading(web.port))
        assert web.seen == []
    assert row.rejected is not None
    assert (row.rejected.reason, "password" in row.rejected.detail) == ("unreadable", True)
    assert row.source == f"http://***@127.0.0.1:{web.port}/"
    assert lists.resolve("https://example.org/@me/a@2x.png", "") == "https://example.org/@me/a@2x.png"


def test_an_agent_can_say_how_to_be_reached() -> None:
    """sotoki #252, d2 #2661: hosts answer 403 to requests without a way to contact the sender."""
    assert "\r\nUser-Agent: sightline\r\n" in fetch_one(reply(IMAGE))[1][0]
    agent = "my-job/1.0 (me@example.org)"
    assert f"\r\nUser-Agent: {agent}\r\n" in fetch_one(reply(IMAGE), user_agent=agent)[1][0]
    row, _ = fetch_one(reply(IMAGE, X_Robots_Tag="my-job: noai"), user_agent=agent)
    assert row.rejected is not None


def test_opting_out_can_be_ignored() -> None:
    """img2dataset #245, #249: X-Robots-Tag is honoured unless the user says otherwise."""
    assert fetch_one(reply(IMAGE, X_Robots_Tag="noai"), robots_tags=())[0].data == IMAGE


def test_tags_in_several_fields_are_told_apart() -> None:
    head = b"HTTP/1.1 200 OK\r\nX-Robots-Tag: googlebot: nofollow\r\nX-Robots-Tag: noai\r\nConnection: close\r\n\r\n"

    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(head + IMAGE)
        await writer.drain()

    row, _ = fetch_one(write)
    assert row.rejected is not None
    assert "noai" in row.rejected.detail


def test_one_host_that_limits_requests_delivers_all_images() -> None:
    """img2dataset #62, #331: a list with one host gets 429 for nearly all of its images."""
    answers = {f"/{n}": then(reply(b"", "429 Too Many Requests"), reply(IMAGE)) for n in range(60)}
    with serve(answers) as web:
        rows = fetch([url_of(web, f"/{n}") for n in range(60)], reading(web.port, host_connections=2))
        assert all(row.data == IMAGE for row in rows)


def test_a_url_that_comes_twice_is_fetched_once_and_both_rows_come() -> None:
    """img2dataset #438: no deduplication."""
    with serve({"/a": reply(IMAGE), "/b": reply(IMAGE)}) as web:
        a, b = url_of(web, "/a"), url_of(web, "/b")
        rows = fetch([a, b, a, a], reading(web.port))
        assert len(web.seen) == 2
        assert rows[0].data is rows[2].data
        assert rows[0].data is rows[3].data


def test_ipv6_hosts_are_fetched() -> None:
    with serve({"/": reply(IMAGE)}, "::1") as web:
        settings = reading(web.port, allowed_networks=(ip_network("::1/128"),))
        [row] = fetch([url_of(web, "/", "[::1]")], settings)
        assert row.data == IMAGE, row.rejected


@pytest.mark.parametrize(
    "url", ["http://", "https:///a.jpg", "http://a..b/", "http://[::1", "http://0x7f.1/", "https://"]
)
def test_broken_urls_are_rejected(url: str) -> None:
    [row] = fetch([url], reading(80))
    assert row.rejected is not None
    assert (row.rejected.reason, row.trouble) == ("unreadable", "")


def test_a_parquet_file_of_urls_is_a_list_if_it_is_itself_an_input(tmp_path: Path) -> None:
    """LAION's lists are Parquet files. Those that img2dataset leaves beside its tars must not be tagged once more."""
    folder = Folder(tmp_path)
    folder.write("b.jpg", IMAGE)
    with serve({"/a.jpg": reply(IMAGE), "/c.jpg": reply(b"", "404 No")}) as web:
        table = {
            "URL": [url_of(web, "/a.jpg"), url_of(web, "/c.jpg"), None, url_of(web, "/a.jpg")],
            "TEXT": ["ä", "b", "c", "d"],
            "similarity": [0.5, float("nan"), None, 1.0],
            "hash": pa.array([b"x"] * 4, pa.binary(1)),
        }
        path = folder.write("list.parquet", b"")
        pq.write_table(pa.table(table), path)
        fetching = {"enabled": True, "ports": [web.port], "allowed_networks": ["127.0.0.0/8"]}
        assert folder.plan(fetch=fetching).skipped.counts == {FILES_OF_URLS: 1}
        with pytest.raises(ConfigError, match=r"Parquet file of http.s. URLs, .* set fetch\.enabled: true"):
            folder.plan(input=str(path), output=str(tmp_path / "other"))
        with pytest.raises(ConfigError, match=r"parquet\.columns: .* leave parquet\.columns out"):
            folder.plan(input=str(path), output=str(tmp_path / "other"), fetch=fetching, parquet={"columns": ["TEXT"]})
        report = folder.plan(input=str(path), output=str(tmp_path / "third"), fetch=fetching)
        assert (report.rows, dict(report.skipped.counts)) == (4, {"columns with bytes of Parquet files of URLs": 1})
        assert folder.plan(input=str(path), output=str(tmp_path / "third"), fetch=fetching).known == 4
        rows = folder.rows(input=str(path), output=str(tmp_path / "fourth"), fetch=fetching)
    assert [row.rejected and row.rejected.reason for row in rows] == [None, "missing", "missing", None]
    assert [row.key for row in rows[:3]] == [table["URL"][0], table["URL"][1], f"{path} row 2"]
    found = [json.loads(row.metadata or "") for row in rows]
    assert [(one["TEXT"], one["similarity"]) for one in found] == [("ä", 0.5), ("b", "nan"), ("c", None), ("d", 1.0)]
    assert "hash" not in found[0]


def test_broken_images_of_a_host_that_answers_do_not_cost_its_others() -> None:
    answers: dict[str, Respond] = {f"/{n}": reply(IMAGE[:50], length=len(IMAGE)) for n in range(10)}
    answers |= {f"/{n}": reply(b"", "500 Oh") for n in range(10, 20)}
    answers |= {f"/{n}": reply(IMAGE) for n in range(20, 30)}
    with serve(answers) as web:
        rows = fetch([url_of(web, f"/{n}") for n in range(30)], reading(web.port, host_connections=1))
        assert len(web.seen) == 20 * TRIES + 10
    assert [row.data == IMAGE for row in rows] == [False] * 20 + [True] * 10
    assert {row.trouble for row in rows} == {"127.0.0.1: broken off", "127.0.0.1: HTTP 500", ""}


def test_an_unexpected_error_costs_one_image_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({"/a": reply(IMAGE), "/b": reply(IMAGE)}) as web:
        settings = reading(web.port)
        client = _open_loop(settings.fetch, settings.max_bytes).fetcher._client
        get = client.get

        async def fail(url: str, hold: Any) -> Any:
            if url.endswith("/a"):
                raise RuntimeError("a fault\nof this code")
            return await get(url, hold)

        monkeypatch.setattr(client, "get", fail)
        rows = fetch([url_of(web, "/a"), url_of(web, "/b")], settings)
    assert rows[1].data == IMAGE
    assert rows[0].rejected is not None
    assert rows[0].rejected.reason == "host_trouble"
    assert "RuntimeError (a fault" in rows[0].rejected.detail
