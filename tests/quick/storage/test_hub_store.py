"""The store of the hub on a stand-in for it: versions, commits that move, redirects, requests, and memory."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.inputs.lists import resolve
from storage.hub.store import HubStore
from storage.schemes import open_store
from storage.store import ATTEMPTS, Changed, Entry, InvalidUri, NotFound, StoreError, StoreOptions, Unreachable
from tests.support.stores.hub_server import NO_REPOSITORY, Dataset, HubServer, Reply

LARGE = random.Random(1).randbytes(300_000)
FILES = {
    "README.md": b"# a dataset\n",
    "data/train-00000-of-00001.parquet": LARGE,
    "data/c#/a b%20c@1.tar": LARGE[:5000],
    "images/\u00fc ?&=+.jpg": LARGE[:300],
    "images/empty.jpg": b"",
    "labels.csv": b"path,label\n",
}
"""Names as in reports: `#` and `%` that were cut off or decoded, `@` that was taken for a revision."""
_count = itertools.count()


@pytest.fixture
def repo(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new dataset with `FILES`. All reads look for a newer commit at once if a file does not fit."""
    monkeypatch.setattr("storage.retry.PAUSE_SECONDS", 0.001)
    monkeypatch.setattr("storage.hub.store._AGAIN_SECONDS", 0.0)
    name = f"owner/store-{next(_count)}"
    hub.commit(name, FILES)
    hub.use(monkeypatch)
    yield name
    hub.page = 1000


@pytest.fixture
def store(hub: HubServer, repo: str) -> HubStore:
    """A store in a process of its own, as it were: it has not read anything yet."""
    return HubStore(hub.endpoint, StoreOptions())


def by_path(store: HubStore, root: str) -> dict[str, Entry]:
    """Return the listed entries by their paths in the dataset."""
    return {entry.uri.removeprefix(f"{root}/"): entry for entry in store.list(root)}


def test_files_are_listed_and_read(hub: HubServer, store: HubStore, repo: str) -> None:
    hub.page = 4
    root = f"hf://datasets/{repo}"
    found = by_path(store, root)
    assert {path: entry.size for path, entry in found.items()} == {path: len(data) for path, data in FILES.items()}
    for path, data in FILES.items():
        entry = found[path]
        assert store.read(entry.uri) == store.read(entry.uri, 0, entry.size, entry.etag) == data
        assert store.read(entry.uri, 3, 9, entry.etag) == data[3:9]
        assert store.read(entry.uri, 3, 10**9, entry.etag) == data[3:]
        assert store.read(entry.uri, len(data), None, entry.etag) == b""
        assert store.stat(entry.uri) == HubStore(hub.endpoint, StoreOptions()).stat(entry.uri) == entry
    assert sorted(by_path(store, f"{root}/data")) == ["c#/a b%20c@1.tar", "train-00000-of-00001.parquet"]
    assert list(store.list(f"{root}/images/")) == list(store.list(f"{root}/images"))
    assert by_path(store, f"{root}/dat") == by_path(store, f"{root}/labels.csv") == {}
    assert sorted(store.names(root)) == ["README.md", "labels.csv"]
    assert list(store.names(f"{root}/images", "em")) == ["empty.jpg"]
    assert list(store.names(root, "images/")) == []
    for name in ("", "/images", "/images/", "/none.jpg", "/README.md/"):
        assert store.stat(root + name) is None
    with pytest.raises(NotFound, match="no such file"):
        store.read(f"{root}/none.jpg")


def test_the_hubs_own_client_sees_the_same(hub: HubServer, store: HubStore, repo: str) -> None:
    """The stand-in is one that huggingface_hub takes for the hub, and which says the same to it."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    hub.page = 4
    api = HfApi(endpoint=hub.endpoint, token=False)
    sha = api.dataset_info(repo, revision="main", expand=["sha"]).sha
    assert sha == hub.datasets[repo].refs["main"]
    found = by_path(store, f"hf://datasets/{repo}")
    tree = list(api.list_repo_tree(repo, recursive=True, repo_type="dataset", revision=sha))
    files = api.get_paths_info(repo, list(FILES), repo_type="dataset", revision=sha)
    for listed in ([one for one in tree if hasattr(one, "blob_id")], files):
        assert {one.path: (one.size, one.lfs.sha256 if one.lfs else one.blob_id) for one in listed} == {
            path: (entry.size, entry.etag) for path, entry in found.items()
        }
    for path, entry in found.items():
        url = hf_hub_url(repo, path, repo_type="dataset", revision=sha, endpoint=hub.endpoint)
        known = get_hf_file_metadata(url, token=False, endpoint=hub.endpoint)
        assert (known.etag, known.size, known.commit_hash) == (entry.etag, entry.size, sha)


def test_the_scheme_opens_one_store(hub: HubServer, repo: str) -> None:
    assert open_store("hf://datasets/o/n") is open_store(f"hf://datasets/{repo}")
    assert open_store("hf://datasets/o/n").read(f"hf://datasets/{repo}/labels.csv") == FILES["labels.csv"]


@pytest.mark.parametrize("revision", ["v1.0", "feature%2Fx", "refs/pr/3", "refs/convert/parquet", "~parquet", "sha"])
def test_revisions(hub: HubServer, store: HubStore, repo: str, revision: str) -> None:
    ref = {"feature%2Fx": "feature/x", "~parquet": "refs/convert/parquet"}.get(revision, revision)
    hub.commit(repo, {"default/train/0000.parquet": b"other"}, ref)
    if revision == "sha":
        revision = hub.datasets[repo].refs[ref]
    root = f"hf://datasets/{repo}@{revision}"
    (entry,) = store.list(root)
    assert entry.uri == f"{root}/default/train/0000.parquet"
    assert store.read(entry.uri, etag=entry.etag) == b"other"
    assert store.stat(entry.uri) == entry
    assert [call for _, call in hub.requests if "/revision/" in call][1:] == []


def test_a_branch_that_moves(hub: HubServer, store: HubStore, repo: str) -> None:
    """An unchanged file is the same version at a later commit, and a changed one is noticed."""
    root = f"hf://datasets/{repo}"
    worker = HubStore(hub.endpoint, StoreOptions())
    before = by_path(store, root)
    parquet, labels = before["data/train-00000-of-00001.parquet"], before["labels.csv"]
    assert worker.read(labels.uri, etag=labels.etag) == FILES["labels.csv"]
    hub.commit(repo, {"labels.csv": b"new", "later.jpg": b"1", "images/empty.jpg": None})
    # A process that knows the listed commit reads on there, as it was listed.
    assert worker.read(labels.uri, etag=labels.etag) == FILES["labels.csv"]
    # One that does not know it finds what did not change, and no other version.
    other = HubStore(hub.endpoint, StoreOptions())
    assert other.read(parquet.uri, etag=parquet.etag) == LARGE
    with pytest.raises(Changed, match=r"labels\.csv changed since it was listed"):
        other.read(labels.uri, etag=labels.etag)
    with pytest.raises(NotFound):
        other.read(before["images/empty.jpg"].uri, 0, 1, before["images/empty.jpg"].etag)
    # The next night's listing has the new commit, and a process that knows the old one goes on to it.
    after = by_path(store, root)
    assert {path for path in after if after[path] != before.get(path)} == {"labels.csv", "later.jpg"}
    for path in ("labels.csv", "later.jpg"):
        assert worker.read(after[path].uri, etag=after[path].etag) == {"labels.csv": b"new", "later.jpg": b"1"}[path]


def test_a_known_commit_does_not_stay_for_ever(
    hub: HubServer, store: HubStore, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"hf://datasets/{repo}/labels.csv"
    first = store.stat(uri)
    hub.commit(repo, {"labels.csv": b"new"})
    assert store.stat(uri) == first
    monkeypatch.setattr("storage.hub.store.RESOLVED_SECONDS", 0.0)
    assert store.read(uri) == b"new"
    assert store.stat(uri) != first


def test_a_commit_that_is_gone(hub: HubServer, store: HubStore, repo: str) -> None:
    """A history that was rewritten has the old commit no more."""
    root = f"hf://datasets/{repo}"
    before = by_path(store, root)
    hub.commit(repo, {"labels.csv": b"new"})
    dataset = hub.datasets[repo]
    dataset.commits = {dataset.refs["main"]: dataset.commits[dataset.refs["main"]]}
    kept = before["README.md"]
    assert store.read(kept.uri, etag=kept.etag) == FILES["README.md"]
    with pytest.raises(Changed):
        store.read(before["labels.csv"].uri, etag=before["labels.csv"].etag)


def test_how_many_requests_a_file_costs(hub: HubServer, store: HubStore, repo: str) -> None:
    hub.commit(repo, {f"images/{number:04}.jpg": b"%d" % number for number in range(2500)})
    root = f"hf://datasets/{repo}"
    found = by_path(store, root)
    assert [path.split("/")[5] for _, path in hub.requests] == ["revision", "tree", "tree", "tree"]
    hub.clear()
    entry = found["data/train-00000-of-00001.parquet"]
    for start in range(0, 300_000, 30_000):
        assert store.read(entry.uri, start, start + 30_000, entry.etag) == LARGE[start : start + 30_000]
    assert len(hub.requests) == 1
    assert len(hub.fetches) == 10
    worker = HubStore(hub.endpoint, StoreOptions())
    hub.clear()
    with ThreadPoolExecutor(8) as pool:
        images = [found[f"images/{number:04}.jpg"] for number in range(100)]
        assert list(pool.map(lambda one: worker.read(one.uri, 0, one.size, one.etag), images)) == [
            b"%d" % number for number in range(100)
        ]
    calls = [path for _, path in hub.requests if path.startswith("/api/")]
    assert len(calls) == 1, "threads that begin together ask for the commit once"
    assert len(hub.requests) - len(calls) == len(hub.fetches) == 100


def test_a_signed_address_that_expires(hub: HubServer, store: HubStore, repo: str) -> None:
    uri = f"hf://datasets/{repo}/data/train-00000-of-00001.parquet"
    assert store.read(uri, 0, 10) == LARGE[:10]
    hub.signature += 1
    hub.clear()
    assert store.read(uri, 10, 20) == LARGE[10:20]
    assert (len(hub.requests), len(hub.fetches)) == (1, 2)


def test_the_token_goes_to_the_hub_alone(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are on another host, which must not get the token, and which refuses requests with one."""
    hub.use(monkeypatch, token=hub.token)
    hub.datasets[repo].refused = NO_REPOSITORY
    store = HubStore(hub.endpoint, StoreOptions())
    for entry in store.list(f"hf://datasets/{repo}"):
        assert store.read(entry.uri, etag=entry.etag) == FILES[entry.uri.removeprefix(f"hf://datasets/{repo}/")]
    assert hub.fetches
    assert set(hub.tokens) == {""}


def test_a_dataset_that_was_renamed(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old name goes on to work, with the token, and costs no redirect for each file."""
    hub.use(monkeypatch, token=hub.token)
    hub.datasets[repo].refused = NO_REPOSITORY
    old = f"{repo}-old"
    hub.renamed[old] = repo
    store = HubStore(hub.endpoint, StoreOptions())
    root = f"hf://datasets/{old}"
    found = by_path(store, root)
    assert set(found) == set(FILES)
    entry = found["data/c#/a b%20c@1.tar"]
    assert store.read(entry.uri, etag=entry.etag) == LARGE[:5000]
    assert sum(old in path for _, path in hub.requests) == 1
    # A commit is not resolved, so each request is redirected.
    sha = hub.datasets[repo].refs["main"]
    uri = f"hf://datasets/{old}@{sha}/labels.csv"
    assert store.read(uri) == FILES["labels.csv"]
    assert store.stat(uri) == Entry(uri, 11, found["labels.csv"].etag)


def test_pages_of_a_mirror_stay_there(hub: HubServer, store: HubStore, repo: str) -> None:
    """Mirrors leave the hub's own address in the links to further pages, which may be out of reach."""
    hub.page, hub.link_address = 2, "https://huggingface.invalid"
    try:
        assert set(by_path(store, f"hf://datasets/{repo}")) == set(FILES)
    finally:
        hub.link_address = ""


def test_an_empty_dataset_and_an_empty_folder(hub: HubServer, store: HubStore) -> None:
    hub.datasets["owner/empty"] = Dataset({"0" * 40: {}}, {"main": "0" * 40})
    assert list(store.list("hf://datasets/owner/empty")) == []
    assert list(store.list("hf://datasets/owner/empty/data")) == []


def test_nothing_can_be_written(store: HubStore, repo: str) -> None:
    uri = f"hf://datasets/{repo}/a.jpg"
    for write in (lambda: store.put(uri, b""), lambda: store.put_if_absent(uri, b""), lambda: store.delete(uri)):
        with pytest.raises(StoreError, match="for inputs only") as error:
            write()
        assert "\n" not in str(error.value)


def test_a_pointer_in_place_of_a_file(hub: HubServer, store: HubStore, repo: str) -> None:
    """A server that sends Git's pointer for a file in LFS gives no bytes, rather than those of the pointer."""
    entry = by_path(store, f"hf://datasets/{repo}")["images/\u00fc ?&=+.jpg"]
    sha = hub.datasets[repo].refs["main"]
    pointer = hub.datasets[repo].commits[sha]["images/\u00fc ?&=+.jpg"].pointer
    reply = Reply(200, {"X-Repo-Commit": sha, "ETag": '"1"'}, pointer)
    with hub.fault("GET .*/resolve/", reply, times=None), pytest.raises(Unreachable, match="300 bytes"):
        store.read(entry.uri, 0, entry.size, entry.etag)


def test_a_listing_holds_a_page(hub: HubServer, repo: str) -> None:
    """60,000 names take about the memory that 20,000 take."""
    hub.commit(repo, {f"images/{number // 1000:04}/{number:07}.jpg": b"1" for number in range(60_000)})
    script = (
        "import re\n"
        "from pathlib import Path\n"
        "from storage.hub.store import HubStore\n"
        "from storage.store import StoreOptions\n"
        f"store = HubStore({hub.endpoint!r}, StoreOptions())\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        f"for number, _ in enumerate(store.list('hf://datasets/{repo}')):\n"
        "    if number == 20_000:\n"
        "        before = peak()\n"
        "print(number, peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == 60_000 + len(FILES) - 1
    assert grown < 4_000, "KiB"


def test_threads_share_a_store(hub: HubServer, store: HubStore, repo: str) -> None:
    uri = f"hf://datasets/{repo}/data/train-00000-of-00001.parquet"
    starts = [random.Random(seed).randrange(290_000) for seed in range(200)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda start: store.read(uri, start, start + 5000), starts))
    assert found == [LARGE[start : start + 5000] for start in starts]


def test_threads_share_a_failure_too(hub: HubServer, store: HubStore, repo: str) -> None:
    """Else each of them would wait for its own attempts, one after another."""
    uri = f"hf://datasets/{repo}/labels.csv"
    with (
        hub.fault("/revision/", Reply(500), times=None) as done,
        ThreadPoolExecutor(8) as pool,
    ):
        failed = [pool.submit(store.read, uri) for _ in range(8)]
        assert {type(one.exception()) for one in failed} == {Unreachable}
        assert len(done) < 8 * ATTEMPTS
    assert store.read(uri) == FILES["labels.csv"]


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("hf://owner/name", "write hf://datasets/owner/name"),
        ("hf://models/owner/name", "write hf://datasets/OWNER/NAME"),
        ("hf://spaces/owner/name", "write hf://datasets/OWNER/NAME"),
        ("hf://buckets/owner/name", "write hf://datasets/OWNER/NAME"),
        ("hf://kernels/owner/name/a", "write hf://datasets/OWNER/NAME"),
        ("hf://dataset/owner/name", "Did you mean 'datasets/'"),
        ("hf://datasets/mnist", "write hf://datasets/OWNER/NAME"),
        ("hf://datasets/", "write hf://datasets/OWNER/NAME"),
        ("hf://mnist", "write hf://datasets/OWNER/NAME"),
        ("hf://", "write hf://datasets/OWNER/NAME"),
        ("hf://datasets/owner/name@", "write hf://datasets/OWNER/NAME"),
        ("hf://datasets/owner/name@/a", "write hf://datasets/OWNER/NAME"),
        ("hf://datasets/ow ner/name", "write hf://datasets/OWNER/NAME"),
        ("hf://datasets/owner/name//a", "write hf://datasets/OWNER/NAME"),
        ("hf://datasets/owner/name@refs/pr/3x", "%2F for a slash"),
        ("hf://datasets/owner/name/../a", "no file of a dataset has such a path"),
        ("hf://datasets/owner/name/a/..", "no file of a dataset has such a path"),
        ("hf://datasets/owner/name/a\0b", "no file of a dataset has such a path"),
        ("hf://datasets/owner/name/" + "x" * 5000, "no file of a dataset has such a path"),
        ("hf://datasets/owner/name/\ud800", "a name is UTF-8"),
    ],
)
def test_names_that_are_no_files_of_a_dataset(store: HubStore, uri: str, says: str) -> None:
    for method in (store.stat, store.read, lambda uri: list(store.list(uri)), lambda uri: list(store.names(uri))):
        with pytest.raises(InvalidUri) as error:
            method(uri)
        assert says in str(error.value)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["", "/", "/a/"])
def test_a_folder_is_not_read(store: HubStore, repo: str, name: str) -> None:
    with pytest.raises(InvalidUri, match=r"names a (folder|dataset), not a file"):
        store.read(f"hf://datasets/{repo}{name}")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a.jpg", "/data/en/a.jpg"),
        ("./a.jpg", "/data/en/a.jpg"),
        ("../images/a #1.jpg", "/data/images/a #1.jpg"),
        ("../../../../etc/passwd", "/etc/passwd"),
        ("/etc/passwd", "/etc/passwd"),
        ("//etc//passwd", "/etc/passwd"),
        ("file:///etc/passwd", "/etc/passwd"),
        ("FILE:///etc/passwd", "/etc/passwd"),
        ("file://a.jpg", "/data/en/a.jpg"),
        ("~/a.jpg", "/data/en/~/a.jpg"),
    ],
)
def test_a_path_in_a_dataset_stays_there(path: str, found: str) -> None:
    """A dataset may be anyone's. Its paths must not name files of the machine that reads it."""
    for root in ("hf://datasets/owner/name", "hf://datasets/owner/name@refs/convert/parquet"):
        assert resolve(path, f"{root}/data/en/list.csv") == root + found
    assert resolve("a.jpg", "hf://datasets/owner/name/list.csv") == "hf://datasets/owner/name/a.jpg"
    assert resolve("s3://bucket/a.jpg", "hf://datasets/owner/name/list.csv") == "s3://bucket/a.jpg"
    assert resolve("hf://datasets/o/n/a.jpg", "/lists/list.csv") == "hf://datasets/o/n/a.jpg"
