"""The store of the hub behind proxies that inject faults, and what it makes of the hub's errors."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import NamedTuple

import pytest

from storage.hub.store import HubStore
from storage.store import (
    ATTEMPTS,
    Changed,
    Forbidden,
    NotFound,
    StoreError,
    StoreOptions,
    Unreachable,
)
from tests.support.stores import fault_proxy as faults
from tests.support.stores import hub_server
from tests.support.stores.fault_proxy import (
    Action,
    CutShort,
    ErrorResponse,
    FaultProxy,
    Reset,
    Silence,
    Trickle,
    fault_proxy,
)
from tests.support.stores.hub_server import HubServer, Reply

DATA = random.Random(7).randbytes(3_000_000)
MIDDLE = 1_234_567
_count = itertools.count()


class Place(NamedTuple):
    """A proxy before the hub, one before the host of large files, a store behind both, and a dataset with `FILES`."""

    hub: HubServer
    proxy: FaultProxy
    storage: FaultProxy
    store: HubStore
    root: str

    @property
    def large(self) -> str:
        """A file in LFS."""
        return f"{self.root}/large.tar"

    @property
    def small(self) -> str:
        """A file that comes from the hub itself."""
        return f"{self.root}/small.txt"


@pytest.fixture(scope="module")
def proxies(hub: HubServer) -> Iterator[tuple[FaultProxy, FaultProxy]]:
    """Proxies before the hub and before the host of large files, whose addresses have the first one's."""
    direct = hub.storage
    with fault_proxy(hub.endpoint) as proxy, fault_proxy(direct) as storage:
        hub.storage = storage.endpoint
        yield proxy, storage
    hub.storage = direct


@pytest.fixture
def place(hub: HubServer, proxies: tuple[FaultProxy, FaultProxy], monkeypatch: pytest.MonkeyPatch) -> Place:
    proxy, storage = proxies
    monkeypatch.setattr("storage.retry.PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("storage.hub.client.READ_SECONDS", 1.0)
    monkeypatch.setattr("storage.hub.client.CALL_SECONDS", 1.0)
    monkeypatch.setattr("storage.hub.bodies.READ_SECONDS", 1.0)
    repo = f"owner/faults-{next(_count)}"
    hub.commit(repo, {"large.tar": DATA, "small.txt": DATA[:50_000]})
    hub.use(monkeypatch, endpoint=proxy.endpoint)
    for one in proxies:
        one.clear()
    return Place(hub, proxy, storage, HubStore(proxy.endpoint, StoreOptions()), f"hf://datasets/{repo}")


PASSING: list[Action] = [
    faults.FAILS,
    faults.SLOW_DOWN,
    ErrorResponse(408, "RequestTimeout"),
    ErrorResponse(429, "TooManyRequests"),
    ErrorResponse(502, "BadGateway"),
    Reset(),
    Silence(30),
]
BODIES: list[Action] = [
    Reset(MIDDLE),
    CutShort(0),
    CutShort(MIDDLE),
    CutShort(MIDDLE, lying=True),
    Silence(30, MIDDLE),
    Trickle(200),
]


@pytest.mark.parametrize("action", [*PASSING, *BODIES], ids=str)
def test_a_read_returns_all_bytes(place: Place, action: Action) -> None:
    """The faults of the host of large files."""
    entry = place.store.stat(place.large)
    assert entry is not None
    times = 1 if isinstance(action, Silence | Trickle) else ATTEMPTS - 1
    for start, stop, etag in ((0, None, None), (100, 2_900_000, entry.etag), (0, entry.size, entry.etag)):
        rule = place.storage.add(action, times=times)
        assert place.store.read(entry.uri, start, stop, etag) == DATA[start:stop]
        assert rule.done == times
        place.storage.clear()


@pytest.mark.parametrize("action", PASSING, ids=str)
@pytest.mark.parametrize("request_", ["/revision/", "/tree/", "/resolve/", "/resolve-cache/"])
def test_faults_of_the_hub_itself(place: Place, action: Action, request_: str) -> None:
    times = 1 if isinstance(action, Silence) else ATTEMPTS - 1
    rule = place.proxy.add(action, request_, times=times)
    found = {entry.uri: entry for entry in place.store.list(place.root)}
    assert set(found) == {place.large, place.small}
    small = found[place.small]
    assert place.store.read(small.uri, 5, 40_000, small.etag) == DATA[5:40_000]
    assert rule.done == times


@pytest.mark.parametrize("action", [CutShort(100), CutShort(20_000, lying=True), Reset(20_000)], ids=str)
def test_broken_bodies_of_the_hub_itself(place: Place, action: Action) -> None:
    for key in ("/resolve-cache/", "/tree/") if isinstance(action, CutShort) and not action.lying else ("/cache/",):
        rule = place.proxy.add(action, key.replace("/cache/", "/resolve-cache/"), times=ATTEMPTS - 1)
        small = next(entry for entry in place.store.list(place.root) if entry.uri == place.small)
        assert place.store.read(small.uri, 0, small.size, small.etag) == DATA[:50_000]
        assert rule.done == ATTEMPTS - 1
        place.proxy.clear()


def test_a_read_that_never_succeeds(place: Place) -> None:
    entry = place.store.stat(place.large)
    assert entry is not None
    for action in (faults.FAILS, Reset(1000), CutShort(1, lying=True), faults.FORBIDDEN):
        rule = place.storage.add(action, times=None)
        with pytest.raises(Unreachable, match=r"/large\.tar"):
            place.store.read(entry.uri, 0, entry.size, entry.etag)
        # A known address that is refused is asked for anew within the same attempt.
        assert ATTEMPTS <= rule.done <= ATTEMPTS + 1
        place.storage.clear()
    rule = place.proxy.add(faults.FAILS, "/tree/", times=None)
    with pytest.raises(Unreachable):
        list(place.store.list(place.root))
    assert rule.done == ATTEMPTS


def test_a_listing_is_whole_though_a_page_fails(place: Place) -> None:
    repo = place.root.removeprefix("hf://datasets/")
    names = {f"{number:04d}.jpg" for number in range(2203)}
    place.hub.commit(repo, dict.fromkeys(names, b""))
    for skip in range(3):
        rule = place.proxy.add(faults.FAILS, "/tree/", times=2, skip=skip)
        assert {entry.uri.rpartition("/")[2] for entry in place.store.list(place.root)} > names
        assert rule.done == 2
        place.proxy.clear()


@pytest.mark.parametrize("where", ["large", "small"])
def test_a_server_that_ignores_ranges(place: Place, where: str) -> None:
    uri, data = (place.large, DATA) if where == "large" else (place.small, DATA[:50_000])
    entry = place.store.stat(uri)
    assert entry is not None
    sha = place.hub.datasets[place.root.removeprefix("hf://datasets/")].refs["main"]
    whole = Reply(200, {"X-Repo-Commit": sha, "ETag": f'"{entry.etag}"', "Content-Type": "text/html"}, data)
    with place.hub.fault("GET .*/resolve/", whole, times=None):
        store = HubStore(place.hub.endpoint, StoreOptions())
        for start, stop in ((0, None), (10, 20), (49_000, 10**9), (10**8, None)):
            assert store.read(uri, start, stop, entry.etag) == data[start:stop]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": "bytes 0-9/50000"},
        {"Content-Range": "bytes 10-18/50000"},
        {"Content-Range": "bytes 10-19/49999"},
        {"Content-Range": "bytes */50000"},
        {"Content-Range": "bytes 10-19/50000", "Content-Encoding": "gzip"},
        {},
    ],
    ids=str,
)
def test_another_range_than_was_asked_for(place: Place, headers: dict[str, str]) -> None:
    """It is no fault that passes, perhaps, but it gives no bytes."""
    entry = place.store.stat(place.small)
    assert entry is not None
    sha = place.hub.datasets[place.root.removeprefix("hf://datasets/")].refs["main"]
    known = {"X-Repo-Commit": sha, "X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": "50000"}
    with place.hub.fault("GET .*/resolve/", Reply(206, {**known, **headers}, b"0123456789"), times=None) as done:
        with pytest.raises(Unreachable) as error:
            place.store.read(place.small, 10, 20, entry.etag)
        assert len(done) == ATTEMPTS
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [206, 416])
def test_an_end_that_one_response_alone_says_is_not_believed(place: Place, status: int) -> None:
    """As of a cache that has another file's length: the read is repeated, not shortened."""
    entry = place.store.stat(place.small)
    assert entry is not None
    sha = place.hub.datasets[place.root.removeprefix("hf://datasets/")].refs["main"]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{entry.etag}"', "Content-Range": "bytes 100-199/200"}
    with place.hub.fault("GET .*/resolve/", Reply(status, headers, b"x" * 100), times=2) as done:
        assert place.store.read(place.small, 100, 60_000, entry.etag) == DATA[100:50_000]
        assert len(done) == 2


def test_headers_without_the_hash(place: Place) -> None:
    """A mirror may leave them out. Then the API says which version it is."""
    entry = place.store.stat(place.small)
    assert entry is not None
    sha = place.hub.datasets[place.root.removeprefix("hf://datasets/")].refs["main"]
    bare = Reply(200, {"X-Repo-Commit": sha}, DATA[:50_000])
    for etag, expected in ((entry.etag, DATA[:50_000]), (None, DATA[:50_000])):
        with place.hub.fault("GET .*/resolve/", bare) as done:
            assert place.store.read(place.small, 0, entry.size, etag) == expected
            assert len(done) == 1
    with place.hub.fault("GET .*/resolve/", bare, times=None), pytest.raises(Changed):
        place.store.read(place.small, 0, entry.size, "another")
    with place.hub.fault("HEAD .*/resolve/", Reply(200, {"X-Repo-Commit": sha})):
        assert HubStore(place.hub.endpoint, StoreOptions()).stat(place.small) == entry


def soon(seconds: float) -> str:
    """A date as `Retry-After` may have it."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (429, {"RateLimit": '"resolvers";r=0;t=1', "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'}),
        (429, {"Retry-After": "1"}),
        (503, {"Retry-After": "1"}),
        (429, {"Retry-After": "a date"}),
    ],
    ids=str,
)
def test_a_pause_that_the_hub_asks_for(place: Place, status: int, headers: dict[str, str]) -> None:
    if headers.get("Retry-After") == "a date":
        headers = {"Retry-After": soon(2)}
    entry = place.store.stat(place.large)
    assert entry is not None
    store = HubStore(place.hub.endpoint, StoreOptions())
    with place.hub.fault("GET .*/resolve/", Reply(status, headers)) as done:
        begun = time.monotonic()
        assert store.read(entry.uri, 0, 10, entry.etag) == DATA[:10]
        assert 0.9 < time.monotonic() - begun < 4
        assert len(done) == 1


def test_a_limit_of_calls_is_none_of_files(place: Place) -> None:
    """The hub counts them apart, so a listing that has to wait holds up no reader."""
    entry = place.store.stat(place.large)
    assert entry is not None
    with place.hub.fault("/tree/", Reply(429, {"RateLimit": '"api";r=0;t=320'})):
        begun = time.monotonic()
        with pytest.raises(ZeroDivisionError):
            _stop_instead_of_waiting(place)
        assert place.store.read(entry.uri, 0, 10, entry.etag) == DATA[:10]
        assert time.monotonic() - begun < 2


def _stop_instead_of_waiting(place: Place) -> None:
    def stop(seconds: float) -> None:
        if seconds > 300:
            raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.hub.client.time.sleep", stop)
        list(place.store.list(place.root))


def test_a_pause_that_is_too_long(place: Place) -> None:
    with place.hub.fault("/tree/", Reply(429, {"Retry-After": "3600"}), times=None) as done:
        with pytest.raises(Unreachable, match=r"no requests for 3(600|59\d) s: set HF_TOKEN"):
            list(place.store.list(place.root))
        assert len(done) == 1


REFUSED = [
    (hub_server.NO_REPOSITORY, Forbidden, "there is no dataset owner/.*, or it is private: .* HF_TOKEN"),
    (hub_server.refuse(404, "RepoNotFound", "Repository not found"), Forbidden, "there is no dataset"),
    (hub_server.refuse(401, "", "Invalid username or password."), Forbidden, "there is no dataset"),
    (hub_server.GATED, Forbidden, "gated: ask for access at http://127.0.0.1:.*/datasets/owner/.* HF_TOKEN"),
    (hub_server.refuse(401, "GatedRepo", "Access is restricted"), Forbidden, "gated: ask for access"),
    (hub_server.DISABLED, Forbidden, "has disabled access"),
    (hub_server.EXPIRED, Forbidden, "refuses the token .*: set HF_TOKEN to a new one"),
    (hub_server.refuse(401, "", 'User Access Token "x" is expired'), Forbidden, "refuses the token"),
    (hub_server.refuse(403, "", "Token has no permission"), Forbidden, "refused .Token has no permission"),
    (hub_server.NO_REVISION, NotFound, "no such revision: see its branches and tags at http"),
    (hub_server.refuse(400, "", "Invalid query"), StoreError, "answered 400 .Invalid query"),
    (
        Reply(404, {"Content-Type": "text/html"}, b"<html>Not here</html>"),
        StoreError,
        "check that HF_ENDPOINT is a hub",
    ),
    (hub_server.LOGIN_PAGE, StoreError, "did not answer as the hub does: check HF_ENDPOINT"),
]


@pytest.mark.parametrize(("reply", "kind", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_errors_say_what_to_change(place: Place, reply: Reply, kind: type[StoreError], says: str) -> None:
    """They are not tried again, and each is one line."""
    calls = (
        lambda store: list(store.list(place.root)),
        lambda store: store.read(place.large),
        lambda store: store.read(place.large, 0, 10, "etag"),
        lambda store: store.stat(place.large),
    )
    for call in calls[:3] if kind is NotFound else calls:
        with place.hub.fault("", reply, times=None) as done, pytest.raises(kind, match=says) as error:
            call(HubStore(place.hub.endpoint, StoreOptions()))
        assert type(error.value) is kind or kind is NotFound
        assert len(str(error.value).splitlines()) == 1
        assert "hf://datasets/owner/" in str(error.value)
        assert len(done) == 1


@pytest.mark.parametrize(("reply", "kind", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_errors_of_a_file(place: Place, reply: Reply, kind: type[StoreError], says: str) -> None:
    """As when access is lost while a job runs. A file does not count as missing then."""
    assert place.store.read(place.large, 0, 1) == DATA[:1]
    with place.hub.fault("/resolve/", reply, times=None), pytest.raises(kind, match=says):
        place.store.read(place.small)


def test_a_dataset_with_a_wrong_token(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.hub.use(monkeypatch, token="hf_expired")
    with pytest.raises(Forbidden, match="refuses the token"):
        HubStore(place.hub.endpoint, StoreOptions()).stat(place.large)


def test_a_gated_dataset_is_refused_before_any_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names are public, and each of its files would be refused."""
    place.hub.datasets[place.root.removeprefix("hf://datasets/")].gated = True
    with pytest.raises(Forbidden, match="gated: ask for access at"):
        next(place.store.list(place.root))
    with pytest.raises(Forbidden, match="gated: ask for access at"):
        place.store.read(place.large)
    with place.hub.fault("/auth-check", Reply(404, {}, b"not here")):
        assert len(list(place.store.list(place.root))) == 2, "a mirror may not have this call"
    place.hub.use(monkeypatch, token=place.hub.token, endpoint=place.proxy.endpoint)
    assert {entry.uri for entry in place.store.list(place.root)} == {place.large, place.small}
    assert place.store.read(place.large) == DATA


def test_offline(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE is set: set it to 0") as error:
        list(place.store.list(place.root))
    assert type(error.value) is StoreError
    assert place.proxy.requests == []


@pytest.mark.parametrize(
    ("endpoint", "kind", "says"),
    [
        (
            "http://127.0.0.1:1",
            Unreachable,
            "cannot reach the hub at http://127.0.0.1:1: check the network and HF_ENDP",
        ),
        ("huggingface.co", StoreError, "no request can be sent to huggingface.co: check HF_ENDPOINT"),
        ("http://127.0.0.1:x", StoreError, "check HF_ENDPOINT"),
        ("ftp://127.0.0.1", StoreError, "check HF_ENDPOINT"),
    ],
)
def test_a_wrong_endpoint(place: Place, endpoint: str, kind: type[StoreError], says: str) -> None:
    with pytest.raises(kind, match=says) as error:
        list(HubStore(endpoint, StoreOptions(attempts=2)).list(place.root))
    assert type(error.value) is kind


def test_a_token_that_cannot_be_sent(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_\u00fc")
    with pytest.raises(StoreError, match="check HF_TOKEN"):
        list(place.store.list(place.root))


def test_redirects_that_lead_nowhere(place: Place) -> None:
    path = f"/datasets/{place.root.removeprefix('hf://datasets/')}/resolve/x"
    with (
        place.hub.fault("/resolve/", Reply(307, {"Location": path}), times=None),
        pytest.raises(StoreError, match="redirects"),
    ):
        place.store.read(place.large)
