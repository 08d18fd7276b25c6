"""The stores of Google and Azure behind a proxy that injects faults: retries, errors, and reads that are whole."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from storage.cloud import store as cloud
from storage.cloud.store import CloudStore
from storage.store import (
    ATTEMPTS,
    Changed,
    Forbidden,
    InvalidUri,
    NotFound,
    StoreError,
    StoreOptions,
    Unreachable,
    join,
)
from tests.support.stores import azurite as azurite_module
from tests.support.stores import fault_proxy as faults
from tests.support.stores import google_server
from tests.support.stores.azurite import ACCOUNT, Azurite
from tests.support.stores.fault_proxy import (
    Action,
    CutShort,
    ErrorResponse,
    FaultProxy,
    Reset,
    Silence,
    fault_proxy,
)
from tests.support.stores.google_server import GoogleServer

DATA = random.Random(7).randbytes(3_000_000)
MIDDLE = 1_234_567
Place = tuple[FaultProxy, CloudStore, str]


@pytest.fixture(scope="module", params=["gs", pytest.param("az", marks=pytest.mark.azure)])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, GoogleServer | Azurite, FaultProxy, dict[str, str]]]:
    """The scheme, its server, a proxy before it, and the environment of a client of the proxy."""
    name = {"gs": "google", "az": "azurite"}[request.param]
    server: GoogleServer | Azurite = request.getfixturevalue(name)
    with fault_proxy(server.endpoint) as proxy:
        env = google_server.make_env(proxy.endpoint)
        if request.param == "az":
            env = azurite_module.make_env(f"{proxy.endpoint}/{ACCOUNT}")
        yield request.param, server, proxy, env


@pytest.fixture
def place(
    served: tuple[str, GoogleServer | Azurite, FaultProxy, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Place:
    """The proxy, a store behind it, and an empty folder."""
    scheme, server, proxy, env = served
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("storage.retry.PAUSE_SECONDS", 0.01)
    proxy.clear()
    return proxy, CloudStore("gs" if scheme == "gs" else "az", StoreOptions()), f"{scheme}://{server.new_bucket()}/root"


@pytest.mark.parametrize(
    "action",
    [
        faults.FAILS,
        faults.SLOW_DOWN,
        ErrorResponse(408, "RequestTimeout"),
        ErrorResponse(429, "TooManyRequests"),
        Reset(),
        Reset(MIDDLE),
        CutShort(0),
        CutShort(MIDDLE),
        CutShort(MIDDLE, lying=True),
        Silence(30, MIDDLE),
    ],
    ids=str,
)
def test_a_read_returns_all_bytes(place: Place, action: Action, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(action, Silence):  # only here: on a busy machine any response may be silent for so long
        monkeypatch.setattr(cloud, "READ_SECONDS", 2.0)
    proxy, store, root = place
    entry = store.put(join(root, "read"), DATA)
    times = 1 if isinstance(action, Silence) else ATTEMPTS - 1
    for start, stop, etag in ((0, None, None), (100, 2_900_000, entry.etag), (0, entry.size, entry.etag)):
        rule = proxy.add(action, "read", times=times)
        assert store.read(entry.uri, start, stop, etag) == DATA[start:stop]
        assert rule.done == times
        proxy.clear()


def test_a_read_that_never_succeeds(place: Place) -> None:
    proxy, store, root = place
    entry = store.put(join(root, "never"), DATA)
    for action in (faults.FAILS, Reset(1000), CutShort(1, lying=True)):
        rule = proxy.add(action, "never", times=None)
        with pytest.raises(Unreachable, match="/never"):
            store.read(entry.uri, 0, entry.size, entry.etag)
        assert rule.done == ATTEMPTS
        proxy.clear()


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (faults.FORBIDDEN, Forbidden),
        (ErrorResponse(401, "Unauthorized"), Forbidden),
        (ErrorResponse(409, "BlobArchived"), Forbidden),
        (faults.ABSENT, NotFound),
        (faults.PRECONDITION, Changed),
    ],
    ids=str,
)
def test_permanent_errors_are_not_retried(place: Place, action: Action, kind: type[StoreError]) -> None:
    proxy, store, root = place
    entry = store.put(join(root, "refused"), DATA)
    rule = proxy.add(action, "refused")
    with pytest.raises(kind, match=r"(gs|az)://.*/refused") as error:
        store.read(entry.uri, 0, entry.size, entry.etag)
    assert "\n" not in str(error.value)
    assert rule.done == 1
    assert store.read(entry.uri) == DATA


def test_the_end_of_an_object_is_confirmed(place: Place) -> None:
    _, store, root = place
    entry = store.put(join(root, "short"), b"12345")
    assert store.read(entry.uri, 3, 100) == b"45"
    assert store.read(entry.uri, 5) == store.read(entry.uri, 5, 9, entry.etag) == b""
    assert store.read(store.put(join(root, "empty"), b"").uri) == b""
    store.put(entry.uri, b"other")
    with pytest.raises(Changed):
        store.read(entry.uri, 100, None, entry.etag)
    with pytest.raises(NotFound):
        store.read(join(root, "none"), 100)


@pytest.mark.parametrize("action", [faults.FAILS, Reset(), faults.DONE_BUT_FAILS], ids=str)
def test_a_conditional_write_knows_its_own_object(place: Place, action: Action) -> None:
    """The response to a write that was done may be lost: the next attempt finds the object there."""
    proxy, store, root = place
    rule = proxy.add(action, "commit", method="PUT", times=2, conditional=True)
    assert store.put_if_absent(join(root, "commit"), b"mine")
    assert rule.done >= 1
    proxy.clear()
    rule = proxy.add(action, "commit", method="PUT", conditional=True)
    assert not store.put_if_absent(join(root, "commit"), b"another's")
    assert rule.done == 1
    assert store.read(join(root, "commit")) == b"mine"


def test_a_listing_is_whole_though_a_page_fails(place: Place) -> None:
    proxy, store, root = place
    names = {f"{number:04d}.jpg" for number in range(1203)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(join(root, name), b""), sorted(names)))
    for skip in (0, 1):
        rule = proxy.add(faults.FAILS, "", method="LIST", times=2, skip=skip)
        assert sorted(entry.uri.removeprefix(f"{root}/") for entry in store.list(root)) == sorted(names)
        assert rule.done == (2 if skip == 0 or rule.done else 0)
        proxy.clear()
    assert sorted(store.names(root)) == sorted(names)
    proxy.add(faults.FAILS, "", method="LIST", times=None)
    with pytest.raises(Unreachable):
        list(store.list(root))


def test_large_objects_are_uploaded_in_parts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, store, root = place
    monkeypatch.setattr(cloud, "_PART_BYTES", 5 * 2**20)
    data = random.Random(3).randbytes(12 * 2**20)
    proxy.add(faults.FAILS, "large", method="PUT")
    with io.BytesIO(data) as file:
        entry = store.put(join(root, "large"), file)
    assert store.stat(entry.uri) == entry
    assert store.read(entry.uri, etag=entry.etag) == data
    assert sum(method == "PUT" for method, _ in proxy.requests) > 3


@pytest.mark.parametrize("name", ["a//b", "./a", "a/../b", "line\nbreak", "tab\t", "x" * 1025, "folder/", "\ud800"])
def test_names_that_obstore_would_change_are_refused(place: Place, name: str) -> None:
    _, store, root = place
    with pytest.raises(InvalidUri) as error:
        store.put(f"{root}/{name}", b"")
    assert "\n" not in str(error.value)
    if name != "folder/":
        with pytest.raises(InvalidUri):
            store.stat(f"{root}/{name}")


def test_errors_say_what_to_change(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    _, store, root = place
    scheme = root.partition("://")[0]
    with pytest.raises(NotFound, match="no such bucket"):
        list(store.list(f"{scheme}://no-such-bucket-here/prefix"))
    with pytest.raises(InvalidUri, match=r"expected (gs://bucket|az://container)/prefix"):
        store.stat(f"{scheme}:///a")
    for variable, value in {**google_server.make_env("http://127.0.0.1:1")}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:1")
    begun = time.monotonic()
    with pytest.raises(Unreachable, match="connection broke off or was silent"):
        list(CloudStore("gs" if scheme == "gs" else "az", StoreOptions(attempts=2)).list(f"{root}/other"))
    assert time.monotonic() - begun < 60


def test_without_an_account_the_message_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(StoreError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        CloudStore("az", StoreOptions(attempts=1)).stat("az://container/a.jpg")


def test_without_obstore_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setitem(__import__("sys").modules, "obstore", None)
        with pytest.raises(StoreError, match=r"pip install 'sightline\[cloud\]'"):
            cloud.open_cloud("gs", StoreOptions())
