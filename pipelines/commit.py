"""What an output holds: its fingerprint, its receipts in flight, its commits, its manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipelines.plan import list_segments
from pipelines.shards import commit_uri, covers
from storage.settings import ConfigError
from storage.store import Store, StoreError, join

SCHEMA_VERSION = 1
_THREADS = 16
_TOP_LABELS = 100


@dataclass
class Ledger:
    """Receipts of shards in flight. Says when a shard is complete; forgets it when it is taken to be committed.

    Holds a few numbers for each part of the shards in work, and of the others only the names of those to come. A
    receipt of a shard that was taken, which a replayed task may send, means nothing.
    """

    pending: set[str]
    parts: dict[str, list[str]] = field(default_factory=dict)
    runs: dict[str, list[list[int]]] = field(default_factory=dict)
    rows_in: dict[str, int] = field(default_factory=dict)

    def add(self, receipt: dict[str, Any]) -> bool:
        """Note a receipt. True when its shard's rows are now all written."""
        shard = receipt["shard"]
        if shard not in self.pending:
            return False
        if receipt["part"]:
            self.parts.setdefault(shard, []).append(receipt["part"])
            self.runs.setdefault(shard, []).append(receipt["rows"])
        if receipt["rows_in"] is not None:
            self.rows_in[shard] = receipt["rows_in"]
        return shard in self.rows_in and covers(self.runs.get(shard, []), self.rows_in[shard])

    def take(self, shard: str) -> tuple[list[str], int]:
        """The parts and the row count of a complete shard, which is forgotten."""
        self.pending.remove(shard)
        self.runs.pop(shard, None)
        return self.parts.pop(shard, []), self.rows_in.pop(shard)


def claim_output(store: Store, output: str, fingerprint: dict[str, Any]) -> str:
    """Write the fingerprint into a new output, or check that the one there is the same. Returns it as text.

    Raises `ConfigError`, naming the fields that differ: an output holds the work of one model and one label set.
    """
    uri = join(output, "fingerprint.json")
    text = json.dumps(fingerprint, ensure_ascii=False, sort_keys=True, indent=1)
    if store.put_if_absent(uri, text.encode()):
        return text
    found = read_json(store, uri)
    differing = sorted(key for key in {*found, *fingerprint} if found.get(key) != fingerprint.get(key))
    if not differing:
        return text
    if not list_segments(store, output):  # a run that ended before it planned anything: nothing is lost
        store.put(uri, text.encode())
        return text
    changes = "; ".join(
        f"{key}: {_short(found.get(key))} there, {_short(fingerprint.get(key))} now" for key in differing
    )
    raise ConfigError(
        f"output: {output} was made with other settings ({changes}): change them back or give a new output"
    )


def read_json(store: Store, uri: str) -> dict[str, Any]:
    """A JSON object of the output. Raises `StoreError` when it is none."""
    try:
        value = json.loads(store.read(uri))
    except ValueError as error:
        raise StoreError(f"{uri} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise StoreError(f"{uri} is not a JSON object")
    return value


def list_committed(store: Store, output: str) -> set[str]:
    """The names of the committed shards."""
    return {
        entry.uri.rpartition("/")[2].removesuffix(".json")
        for entry in store.list(join(output, "commits"))
        if entry.uri.endswith(".json")
    }


def read_commits(store: Store, output: str, shards: list[str]) -> Iterator[dict[str, Any]]:
    """The commit records of these shards, in order, a few fetched ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(shards), 4 * _THREADS):
            group = shards[start : start + 4 * _THREADS]
            yield from pool.map(lambda shard: read_json(store, commit_uri(output, shard)), group)


def finish_output(
    store: Store, output: str, fingerprint: dict[str, Any], shards: list[str], run: dict[str, Any]
) -> dict[str, Any]:
    """Sum up the commits of all planned shards, remove what killed runs left, and put and return `manifest.json`.

    The last step of a run that committed everything. Files that no commit names are leftovers: no later commit can name
    them, because a shard is committed once.
    """
    totals: Counter[str] = Counter(rows_in=0, rows_tagged=0, rows_rejected=0)
    reasons: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    files: list[dict[str, Any]] = []
    planned = set(shards)
    for record in read_commits(store, output, shards):
        for name in totals:
            totals[name] += record[name]
        reasons.update(record["reasons"])
        labels.update(record["labels"])
        files += record["files"]
    named = {join(output, file["path"]) for file in files}
    for uri in list_output_files(store, output):
        if uri not in named and shard_of(uri) in planned:
            store.delete(uri)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "shards": len(shards),
        **totals,
        "reasons": dict(reasons.most_common()),
        "top_labels": dict(labels.most_common(_TOP_LABELS)),
        "run": run,
        "files": files,
    }
    store.put(join(output, "manifest.json"), json.dumps(manifest, ensure_ascii=False, indent=1).encode())
    return manifest


def list_output_files(store: Store, output: str) -> Iterator[str]:
    """The URIs of all data, reject and part files, whoever wrote them."""
    for kind in ("data", "rejects", "parts"):
        for entry in store.list(join(output, kind)):
            yield entry.uri


def shard_of(uri: str) -> str | None:
    """The shard that an output file belongs to, by its name; None when the name is not one of ours."""
    *_, folder, name = uri.rsplit("/", 2)
    shard = name.lstrip(".")[:13] if folder in ("data", "rejects") else folder
    return shard if len(shard) == 13 and shard[6] == "-" and shard.replace("-", "").isdigit() else None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
