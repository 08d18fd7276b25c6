"""API keys and how often each may ask.

A key is 256 random bits, so one round of SHA-256 is the right way to store it: there is no dictionary of such keys to
try, and a slow hash made for passwords would only slow down every request. The file of hashes opens no door by itself,
and may lie in a Kubernetes Secret beside the config.

It does not know HTTP: who sends which header, and what a refusal looks like, is the app's business.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from serve.log import log
from storage.settings import ConfigError

KEY_PREFIX = "sl-"
"""What a key starts with, so that a secret scanner, or a person, knows one when it sees it."""
REREAD_SECONDS = 1.0
"""How long a change of the keys file may go unseen."""
UNREAD_SECONDS = 60.0
"""How long keys are trusted when their file cannot be read: longer than a node takes to swap a mounted Secret."""
MAX_BUCKETS = 10_000
"""Names whose use is remembered at once."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
Clock = Callable[[], float]


class AuthConfig(BaseModel):
    """Who may ask, and how often."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys_file: Path | None = Field(
        None,
        description="Lines of NAME sha256:HEX, as `sightline key new` prints them; read again when it changes. null "
        "lets everybody in, and then the server listens on loopback only.",
    )
    requests_per_minute: int | None = Field(
        None,
        gt=0,
        description="For each key and each ingress replica; all of them may come at once. null for no limit.",
    )
    items_per_minute: int | None = Field(
        None,
        gt=0,
        description="Images and texts, likewise; new prompts of labels are texts. A request with more counts as all.",
    )


def new_key(name: str) -> tuple[str, str]:
    """A new key for `name`, and the line for the keys file that lets it in. Raises `ConfigError` for a bad name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"key name {name!r}: use up to 64 letters, digits, '.', '_' and '-'")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, f"{name} sha256:{_hash(key).hex()}"


class KeyRing:
    """The keys that are let in, read from a file, and read again while the server runs.

    The file is read whole when it is asked for and a second has passed, because that sees every kind of change: an
    edit, a rename, a Kubernetes Secret whose symbolic link is swapped, two edits within one tick of the file system's
    clock. (A Secret mounted with `subPath` never changes; mount the folder.) Whoever is not in the file is not let in:
    a line that is not a key's is logged as an error and counts for nothing, and the others count. While the file cannot
    be read at all, the keys before it stay for a minute, and then nobody is let in.

    Raises `ConfigError` when the file is bad from the start.
    """

    def __init__(self, path: Path, clock: Clock = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._read_at = clock()
        self._keys = read_keys(path)
        self._problems: list[str] = []
        self._unread_since: float | None = None

    def names(self) -> list[str]:
        """The names of the keys that are let in now."""
        self._refresh()
        return list(self._keys)

    def verify(self, token: str) -> str | None:
        """The name of the key that `token` is, or None. Takes as long for every token of a length."""
        self._refresh()
        digest = _hash(token)
        found = None
        for name, known in self._keys.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _refresh(self) -> None:
        """Take over the file's keys if a second has passed. What is wrong with it is logged once."""
        now = self._clock()
        if now - self._read_at < REREAD_SECONDS:
            return
        self._read_at = now
        try:
            keys, problems = _parse_keys(self._path)
            self._unread_since = None
        except ConfigError as error:
            self._unread_since = now if self._unread_since is None else self._unread_since
            lost = now - self._unread_since >= UNREAD_SECONDS
            keys, problems = {} if lost else self._keys, [f"{error}; {'nobody is let in' if lost else 'keys stay'}"]
        if problems and problems != self._problems:
            log.error("%s", "; ".join(problems))
        self._problems = problems
        if keys != self._keys:
            log.info("%s: now %d keys: %s", self._path, len(keys), ", ".join(keys))
        self._keys = keys


def read_keys(path: Path) -> dict[str, bytes]:
    """A keys file's names and SHA-256 digests. Blank lines and lines that start with # are skipped.

    Raises `ConfigError`, one line, which shows nothing of the line that is wrong: it may be a key.
    """
    keys, problems = _parse_keys(path)
    if problems:
        raise ConfigError(problems[0])
    return keys


def _parse_keys(path: Path) -> tuple[dict[str, bytes], list[str]]:
    """The keys of the lines that are good, and what is wrong with the others. Raises `ConfigError` for no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"keys_file {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    keys: dict[str, bytes] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"keys_file {path}, line {number}"
        digest = _DIGEST.fullmatch(words[-1])
        if words[-1].startswith(KEY_PREFIX):
            problems.append(f"{where}: this is a key itself; the file holds hashes, as `sightline key new` prints")
        elif len(words) != 2 or not digest or not _NAME.fullmatch(words[0]):
            problems.append(f"{where}: expected NAME sha256:HEX, as `sightline key new NAME` prints it")
        elif words[0] in keys:
            problems.append(f"{where}: the name {words[0]} is there twice; give the new key a name of its own")
        else:
            keys[words[0]] = bytes.fromhex(digest[1])
    if not keys and not problems:
        problems.append(f"keys_file {path}: holds no key; make one with `sightline key new NAME`")
    return keys, problems


@dataclass(frozen=True)
class Quota:
    """What a key has left after one check. Seconds are from now.

    `reset_s` is when all of `limit` is there again; `retry_after_s` is 0 when the request was allowed, else when it
    would be.
    """

    allowed: bool
    limit: int
    remaining: int
    reset_s: float
    retry_after_s: float

    def headers(self, unit: str = "requests") -> dict[str, str]:
        """OpenAI's names for the quota, and HTTP's `Retry-After` in whole seconds when the request was refused."""
        fields = {
            f"x-ratelimit-limit-{unit}": str(self.limit),
            f"x-ratelimit-remaining-{unit}": str(self.remaining),
            f"x-ratelimit-reset-{unit}": f"{self.reset_s:.3f}".rstrip("0").rstrip(".") + "s",
        }
        if not self.allowed:
            fields["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return fields


class RateLimiter:
    """A token bucket for each name: `per_minute` requests at once, and then one every 60 / `per_minute` seconds.

    It counts in its own process: with N ingress replicas a key may ask up to N times as often, and what a client reads
    in the headers is the state of the replica that answered. Memory is bounded: beyond `MAX_BUCKETS` names, the one
    that was quiet for longest is forgotten, and starts full. Not thread-safe: for one event loop.
    """

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # name -> (tokens, when), oldest first

    def check(self, name: str, cost: int = 1) -> Quota:
        """Take `cost` tokens from the bucket of `name` if they are there; a refusal takes none.

        A cost over the whole limit is charged as all of it, or it could never be paid.
        """
        limit, rate, now = self.per_minute, self.per_minute / 60, self._clock()
        cost = min(cost, limit)
        tokens, since = self._buckets.get(name, (float(limit), now))
        tokens = min(limit, tokens + (now - since) * rate)
        missing = cost - tokens
        # A client that waits for exactly as long as it was told must not fail by the last bit of a float.
        allowed = missing <= 1e-6
        if allowed:
            tokens = max(0.0, tokens - cost)
        self._buckets[name] = (tokens, now)
        self._buckets.move_to_end(name)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return Quota(allowed, limit, int(tokens + 1e-6), (limit - tokens) / rate, 0.0 if allowed else missing / rate)


def _hash(key: str) -> bytes:
    # A token from a header may hold any bytes, lone surrogates included.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
