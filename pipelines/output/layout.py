"""The names of an output's files.

    fingerprint.json               the model, the label set and the settings that made the output
    labels.parquet                 the head of the label set: it scores the embeddings
    plan/000000.parquet            the inputs, packed into shards
    parts/<shard>/<id>.arrow       rows of a shard in progress
    data/<shard>-<id>.parquet      tagged rows of a committed shard
    rejects/<shard>-<id>.parquet   rejected rows of a committed shard
    commits/<shard>.json           the commit record: it makes a shard committed, and names its files
    manifest.json                  totals and files, as of the last run that finished

A shard whose rejected rows were retried has a commit record for each generation: `commits/<shard>.1.json` and so on.
The record of the highest generation is the valid one. It also names the files that earlier generations left valid.
"""

from __future__ import annotations

import re

FINGERPRINT = "fingerprint.json"
LABELS = "labels.parquet"
MANIFEST = "manifest.json"

_SHARD = re.compile(r"(?P<shard>\d{6}-\d{6})(\.(?P<generation>\d+))?")
_FILE = re.compile(rf"\.?{_SHARD.pattern}-[0-9a-f]{{12}}\.parquet(\.[0-9a-f]{{32}}\.tmp)?")
_PART = re.compile(r"\.?[0-9a-f]{32}\.arrow(\.[0-9a-f]{32}\.tmp)?")


def shard_name(shard: str, generation: int = 0) -> str:
    """Return the name of one generation of a shard, as file names, blocks and receipts have it."""
    return shard if generation == 0 else f"{shard}.{generation}"


def commit_path(shard: str, generation: int = 0) -> str:
    """Return the path of a commit record in the output."""
    return f"commits/{shard_name(shard, generation)}.json"


def parse_commit_path(path: str) -> tuple[str, int] | None:
    """Return the shard and generation of a commit record by its path, or None if the path is not a record's."""
    return _parse(_SHARD.fullmatch(path.rpartition("/")[2].removesuffix(".json")))


def owner_of(path: str) -> tuple[str, int] | None:
    """Return the shard and generation that a data, reject or part file was written for, by its path in the output.

    Temporary files of local disks count as well. Returns None if Sightline does not write files with such a name.
    """
    kind, _, rest = path.partition("/")
    folder, _, name = rest.rpartition("/")
    match = None
    if kind in ("data", "rejects") and not folder:
        match = _FILE.fullmatch(name)
    elif kind == "parts" and _PART.fullmatch(name):
        match = _SHARD.fullmatch(folder)
    return _parse(match)


def _parse(match: re.Match[str] | None) -> tuple[str, int] | None:
    return (match["shard"], int(match["generation"] or 0)) if match else None
