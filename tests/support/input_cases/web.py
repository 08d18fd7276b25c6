"""Cases of the section "Images on the web". Each has a server of its own on loopback, `{web}` in its list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.input_cases.case import InputCase
from tests.support.input_cases.parquet import ONE
from tests.support.web_server import Respond, redirect, reply


def _case(
    kind: str, rule: str, response: Respond | None, url: str = "{web}/", tagged: int = 0, **expected: Any
) -> InputCase:
    def build(folder: Path) -> None:
        (folder / "l.csv").write_text(f"url,caption\n{url},x\n")

    web = {"/": response} if response else {}
    settings = {"input": "{folder}/l.csv", **expected.pop("settings", {})}
    return InputCase(kind, rule, build, tagged, settings=settings, web=web, **expected)


TITLE = "Images on the web"
TEXT = """\
An http(s) URL in a list is fetched if the job says `fetch.enabled: true`. Without it a list with a URL is refused
before any work, so that a list cannot make a job into a way into the network that the job runs in. With it, hosts on
the public internet are fetched from, on ports 80 and 443. Loopback, private and other special addresses are refused,
also after a redirect, by the same check as the endpoint's; `fetch.allowed_networks`, `fetch.ports` and
`fetch.allowed_hosts` change what is allowed. Proxies in environment variables are not used. In a cluster, the readers
need a network policy that lets them out. A list may also be a Parquet file that is itself an input, if the statistics
in its footer show that its image column holds nothing but URLs: its rows are as those of a CSV file, with
`parquet.key_column` or the URL as key, and columns of bytes are left out of the metadata.

**What waits.** A reject says something about an image. 408, 425, 429, 5xx, a timeout, a name without an address, no
connection, and a body that breaks off say something about a host: such a row is rejected as `host_trouble` for now,
and the next run of the same command tries it again, with no option. The rest of its shard is committed. The run ends
with exit code 1 and a line that counts what waits by host and reason; these rows do not count for
`max_reject_fraction`. After `fetch.runs` runs (5) the row is rejected as `unreachable`, which no run tries again
unless you ask for it with `--retry-rejects unreachable`. So the images of the output are always the tagged and the
rejected ones, and no run goes on for ever. An image that the host refuses to give, or that is none, is rejected at
once, with the status in the row's `detail`.

**How hosts are treated.** `fetch.connections` requests (256) are made at the same time, and `fetch.host_connections`
(8) to one host. The readers share these numbers, and each has at least one; on a cluster that grows, readers that come
later are not counted. A run requests an image up to three times, with pauses of 0.25 s to a minute that double and
have a random part. A host that answers 429 or 503 is left alone for as long as its Retry-After says, or for a pause
that doubles. A host that has not answered 10 requests or asked for 8 pauses in a row is not asked for 5 minutes, and
one that asks for more than a minute is not asked for as long as it says. Their images wait for the next run: one dead
host costs some timeouts and holds up no other. The address of a host is kept for a minute, and a reader makes 32
look-ups at once; a machine that fetches from thousands of hosts needs a caching resolver of its own.

**Who is asked.** Requests say `User-Agent: sightline`. Some hosts, such as Wikimedia's, answer 403 or 429 unless it
says how to reach you: set `fetch.user_agent: my-job/1.0 (me@example.org)`. An image whose host answers with `noai`,
`noimageai`, `noindex` or `noimageindex` in `X-Robots-Tag` is rejected as `forbidden`, as img2dataset does it; `none`
counts as `noindex`, and what is said to another agent by its name does not count. `fetch.robots_tags: []` ignores
them, for images that are yours. `robots.txt` is not read: it is for programs that find URLs by themselves, and here
you name each one.

**What is recorded.** A row's `source` and `key` are the URL of the list, and `sha256` is the digest of the bytes that
were tagged. Its `metadata` has in addition the key `sightline:http`, with the final URL if there was a redirect, and
`etag`, `last-modified` and `content-type` if the host gave them. A URL that is planned is not fetched again, whatever
it gives now: the plan has no version of it. To tag it anew, use a new output. A password in a URL is neither sent nor
stored: `source` has `***` in its place. Secrets in the rest of a URL, as in a signed one, are stored with it.

**Memory.** An image has at most `limits.max_bytes` and `fetch.max_seconds`. A reader holds at most 128 MiB of images
that are arriving or wait for a decoder, and one image more; those that arrive when this is full are fetched again.

**Measured.** `python -m benchmarks.web_list` runs a job twice over 10,000 URLs of 13 hosts on loopback, of which
6,400 are of fast hosts and the others of hosts that are slow, dead, reset the first request of each image, answer it
with 429, or say a wrong length or type. On two cores that had other work too, with the servers on the same cores, the
first run took 83 s (120 images/s), of which the 300 images of the host with too long a length took 60: its requests
are repeated with pauses, eight images at a time. The second run took 57 s for the 600 images that waited. The largest
reader had 342 MiB, and fetching the same list without a job took 71 s and 29 MiB more than at its start. All 10,000
URLs were in the output once: 8,400 tagged, 400 `missing`, 300 `not_an_image`, 300 `truncated` and 600 `unreachable`.
"""
CASES: tuple[InputCase, ...] = (
    _case(
        "an http(s) URL, without `fetch.enabled: true`",
        "refused by line",
        None,
        "https://host/1.jpg",
        refused="set fetch.enabled: true",
    ),
    _case(
        "an image, whatever its Content-Type says", "the bytes count", reply(ONE, Content_Type="text/html"), tagged=1
    ),
    _case("blanks around a URL", "no part of it", reply(ONE), " {web}/ ", tagged=1),
    _case("404 and 410", "", reply(b"", "404 Not Found"), rejected={"missing": 1}),
    _case("401, 402, 403 and 451", "", reply(b"", "403 Forbidden"), rejected={"forbidden": 1}),
    _case("another status than these, 200 and those that wait", "", reply(b"", "400 No"), rejected={"unreadable": 1}),
    _case("429, 5xx, no answer", "tried again by the next run", reply(b"", "503 No"), rejected={"host_trouble": 1}),
    _case(
        "the same at the last of `fetch.runs`",
        "final",
        reply(b"", "500 No"),
        rejected={"unreachable": 1},
        settings={"fetch": {"runs": 1}},
    ),
    _case(
        "a body that ends before its Content-Length",
        "tried again by the next run",
        reply(ONE[:99], length=len(ONE)),
        rejected={"host_trouble": 1},
    ),
    _case(
        "an image that ends early, with a length that fits", "", reply(ONE[: len(ONE) // 2]), rejected={"truncated": 1}
    ),
    _case(
        "a page with status 200, as after a redirect to a login",
        "the detail has the Content-Type",
        reply(b"<html>Log in", Content_Type="text/html"),
        rejected={"not_an_image": 1},
    ),
    _case(
        "a body in gzip or another encoding, which was not asked for",
        "not unpacked: a few bytes may become gigabytes",
        reply(ONE, Content_Encoding="gzip"),
        rejected={"unreadable": 1},
    ),
    _case(
        "more than `limits.max_bytes`",
        "also if Content-Length says less or nothing",
        reply(ONE),
        rejected={"too_many_bytes": 1},
        settings={"limits": {"max_bytes": 10}},
    ),
    _case(
        "`X-Robots-Tag: noai` and the like",
        "see `fetch.robots_tags`",
        reply(ONE, X_Robots_Tag="noai"),
        rejected={"forbidden": 1},
    ),
    _case(
        "a redirect to a private address",
        "checked like the first URL",
        redirect("http://10.0.0.1/"),
        rejected={"forbidden": 1},
        settings={"fetch": {"ports": [80]}},
    ),
    _case(
        "a private address, a port or a host that is not allowed",
        "the detail names the option",
        None,
        "http://10.0.0.1/",
        rejected={"forbidden": 1},
        settings={"fetch": {"enabled": True}},
    ),
    _case(
        "a redirect to `file://`, or more than `fetch.max_redirects`",
        "",
        redirect("file:///etc/passwd"),
        rejected={"unreadable": 1},
    ),
    _case(
        "a user name or a password in a URL",
        "neither sent nor stored",
        reply(ONE),
        "http://me:secret@127.0.0.1/",
        rejected={"unreadable": 1},
    ),
    _case("`ftp://` and other schemes", "", reply(ONE), "ftp://host/a.jpg", rejected={"unreadable": 1}),
)
