"""A job over a list of web URLs: what waits is taken up by later runs, and nothing is lost or tried for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.inputs.web.images import RESPONSE_KEY
from tests.support.jobs import Place, make_image
from tests.support.web_server import Respond, Web, reply, reset, serve, url_of

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path), tmp_path)


def settings(place: Place, *webs: Web, **fetch: Any) -> dict[str, Any]:
    allowed = {"enabled": True, "ports": [web.port for web in webs], "allowed_networks": ["127.0.0.0/8"]}
    return {"input": f"{place.input}/l.csv", "rows_per_shard": 10, "fetch": {**allowed, **fetch}}


def check_counts(place: Place, listed: int) -> None:
    """Every row of the list is in the output once, tagged or rejected."""
    assert place.verify().problems == []
    manifest = json.loads(place.store.read(f"{place.output}/manifest.json"))
    assert manifest["rows_in"] == listed == manifest["rows_tagged"] + manifest["rows_rejected"]


def test_rows_of_hosts_in_trouble_wait_and_are_tagged_by_a_later_run(place: Place) -> None:
    images = [make_image(n) for n in range(20)]
    good: dict[str, Respond] = {f"/{n}.jpg": reply(images[n], ETag=f'"{n}"') for n in range(20)}
    good |= {"/gone.jpg": reply(b"", "404 Not Found"), "/page.jpg": reply(b"<html>", Content_Type="text/html")}
    bad: dict[str, Respond] = {f"/{n}.jpg": reply(b"", "500 Oh") for n in range(5)}
    bad |= {f"/{n}.jpg": reset for n in range(5, 10)}
    with serve(good) as one, serve(bad, "127.0.0.2") as two:
        # The same image of the bad host with two captions, in two shards: each row is itself.
        urls = [url_of(one, f"/{n}.jpg") for n in range(20)] + [url_of(one, "/gone.jpg"), url_of(one, "/page.jpg")]
        urls += [url_of(two, f"/{n}.jpg", "127.0.0.2") for n in range(10)] + [url_of(two, "/0.jpg", "127.0.0.2")]
        place.put("l.csv", "".join(["url,caption\n", *(f"{url},c{n}\n" for n, url in enumerate(urls))]).encode())
        keys = settings(place, one, two)
        first = place.tag(**keys)
        assert first.returncode == 1, first.stderr
        assert "waiting: 11 images whose hosts were in trouble; the next run tries them again" in first.stderr
        assert "127.0.0.2: HTTP 500 " in first.stderr
        assert "127.0.0.2: broken off " in first.stderr
        check_counts(place, 33)
        rejects = {row["source"]: row for row in place.rows("rejects")}
        assert rejects[url_of(one, "/gone.jpg")]["detail"] == "HTTP 404"
        assert "HTTP 200, text/html" in rejects[url_of(one, "/page.jpg")]["detail"]
        assert rejects[url_of(one, "/page.jpg")]["reason"] == "not_an_image"
        tagged = {row["source"]: row for row in place.rows("data")}
        assert len(tagged) == 20
        assert json.loads(tagged[url_of(one, "/3.jpg")]["metadata"]) == {
            "caption": "c3",
            RESPONSE_KEY: {"etag": '"3"'},
        }
        asked = len(one.seen)

        bad |= {f"/{n}.jpg": reply(images[n]) for n in range(10)}
        two.responses = bad
        second = place.tag(**keys)
        assert second.returncode == 0, second.stderr
        assert "waiting" not in second.stderr
        check_counts(place, 33)
        assert len(one.seen) == asked, "what is tagged or rejected for good is not fetched again"
        captions = sorted(json.loads(row["metadata"])["caption"] for row in place.rows("data"))
        assert captions == sorted(f"c{n}" for n in range(33) if n not in (20, 21))
        third = place.tag(**keys)
        assert (third.returncode, "nothing to do" in third.stdout) == (0, True), third.stderr


def test_a_host_that_stays_dead_is_given_up_after_some_runs(place: Place) -> None:
    with serve({"/a.jpg": reply(make_image())}) as one, serve({"/b.jpg": reset}, "127.0.0.2") as two:
        place.put("l.csv", f"url\n{url_of(one, '/a.jpg')}\n{url_of(two, '/b.jpg', '127.0.0.2')}\n".encode())
        keys = settings(place, one, two, runs=2)
        assert place.tag(**keys).returncode == 1
        assert [row["reason"] for row in place.rows("rejects")] == ["host_trouble"]
        done = place.tag(**keys)
        assert done.returncode == 0, done.stderr
        check_counts(place, 2)
        asked = len(two.seen)
        assert "nothing to do" in place.tag(**keys).stdout
        assert len(two.seen) == asked
        two.responses = {"/b.jpg": reply(make_image(1))}
        assert place.tag("--retry-rejects", "unreachable", **keys).returncode == 0
        check_counts(place, 2)
        assert len(place.rows("data")) == 2


def test_waiting_rows_do_not_count_as_rejected(place: Place) -> None:
    with serve({"/a.jpg": reply(make_image()), "/b.jpg": reset}) as web:
        place.put("l.csv", f"url\n{url_of(web, '/a.jpg')}\n{url_of(web, '/b.jpg')}\n".encode())
        done = place.tag(max_reject_fraction=0.1, **settings(place, web, runs=2))
        assert (done.returncode, "over max_reject_fraction" in done.stderr) == (1, False), done.stderr
        done = place.tag(max_reject_fraction=0.1, **settings(place, web, runs=2))
        assert (done.returncode, "over max_reject_fraction" in done.stderr) == (3, True), done.stderr


def test_nothing_is_fetched_unless_the_job_says_so(place: Place) -> None:
    with serve({"/a.jpg": reply(make_image())}) as web:
        place.put("l.csv", f"url\n{url_of(web, '/a.jpg')}\n".encode())
        done = place.tag(**settings(place, web, enabled=False))
        assert done.returncode == 2
        assert (
            "l.csv line 2 is an http(s) URL, and fetching from the web is off: set fetch.enabled: true" in done.stderr
        )
        assert not (Path(place.root) / "output").exists()
        done = place.tag(**settings(place, web, allowed_networks=[]))
        [row] = place.rows("rejects")
        assert (row["reason"], "fetch.allowed_networks" in row["detail"]) == ("forbidden", True), row
        assert web.seen == []


def test_trouble_waits_too_if_fetching_is_off_again(place: Place) -> None:
    with serve({"/a.jpg": reset}) as web:
        place.put("l.csv", f"url\n{url_of(web, '/a.jpg')}\n".encode())
        assert place.tag(**settings(place, web)).returncode == 1
        asked = len(web.seen)
        place.put("m.txt", b"0.jpg\n")
        place.put("0.jpg", make_image())
        done = place.tag(**{**settings(place, web, enabled=False), "input": f"{place.input}/m.txt"})
        assert done.returncode == 0
        assert "set fetch.enabled: true to try them again" in done.stderr
        assert len(web.seen) == asked
