"""API keys, and rate limits for each key.

A key is 256 random bits. Its hash is one round of SHA-256, which is enough: no dictionary of such keys exists, and a
slow password hash would only slow down every request. The file of hashes does not give access to the API, so it may be
stored in a Kubernetes Secret next to the configuration.

This module knows no HTTP: `serve.http.middleware.authentication` reads the headers.
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
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from serve.log import log
from storage.settings import ConfigError

KEY_PREFIX = "sl-"
"""The prefix of every key, by which secret scanners and people recognize a key."""
REREAD_SECONDS = 1.0
"""Seconds between two readings of the keys file: a change takes effect after this time at the latest."""
UNREAD_SECONDS = 60.0
"""Seconds for which the last keys stay valid while their file cannot be read. A node needs less to swap a mounted
Secret."""
MAX_BUCKETS = 10_000
"""Number of keys that a rate limiter keeps the state of."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
Clock = Callable[[], float]


class AuthConfig(BaseModel):
    """API keys, and the rate limits of each key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys_file: Path | None = Field(
        None,
        description="Path of a file with lines NAME sha256:HEX, as `sightline key new` prints them. It is read again "
        "when it changes. null is no keys: then the server accepts clients on its own machine only.",
    )
    requests_per_minute: int | None = Field(
        None,
        gt=0,
        description="Requests a minute of each key at each ingress; a burst may use all of them at once. null is no "
        "limit.",
    )
    items_per_minute: int | None = Field(
        None,
        gt=0,
        description="Images and texts a minute of each key at each ingress; prompts of labels in requests count as "
        "texts. A request with more than this counts as this many, and a refused one for what was begun. null is no "
        "limit.",
    )


def new_key(name: str) -> tuple[str, str]:
    """Make a new key for `name`: the key, and its line for the keys file. Raises `ConfigError` for a bad name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"key name {name!r}: use up to 64 letters, digits, '.', '_' and '-'")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, f"{name} sha256:{_hash(key).hex()}"


class KeyRing:
    """The valid API keys of a file, which is read again while the server runs.

    The whole file is read at most once a second, when a key is verified. That notices every kind of change: an edit, a
    rename, a Kubernetes Secret whose symbolic link is swapped, two edits within one tick of the file system's clock. (A
    Secret that is mounted with `subPath` never changes: mount the folder.) A key that is not in the file is invalid. A
    bad line is logged as an error and ignored; the other lines stay valid. While the file cannot be read at all, the
    last keys stay valid for `UNREAD_SECONDS`, and then no key is valid.

    Raises `ConfigError` if the file is bad at the start.
    """

    def __init__(self, path: Path, clock: Clock = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._read_at = clock()
        self._keys = read_keys(path)
        self._problems: list[str] = []
        self._unread_since: float | None = None

    def names(self) -> list[str]:
        """The names of the keys that are valid now."""
        self._refresh()
        return list(self._keys)

    def verify(self, token: str) -> str | None:
        """The name of the key `token`, or None if it is not valid. The time depends only on the token's length."""
        self._refresh()
        digest = _hash(token)
        found = None
        for name, known in self._keys.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _refresh(self) -> None:
        """Read the file if `REREAD_SECONDS` have passed. Each problem of the file is logged once."""
        now = self._clock()
        if now - self._read_at < REREAD_SECONDS:
            return
        self._read_at = now
        try:
            keys, problems = _parse_keys(self._path)
            self._unread_since = None
        except ConfigError as error:
            self._unread_since = now if self._unread_since is None else self._unread_since
            expired = now - self._unread_since >= UNREAD_SECONDS
            effect = "no key is valid any more" if expired else "the last keys stay valid"
            keys, problems = {} if expired else self._keys, [f"{error}; {effect}"]
        if problems and problems != self._problems:
            log.error("%s", "; ".join(problems))
        self._problems = problems
        if keys != self._keys:
            log.info("%s: now %d keys: %s", self._path, len(keys), ", ".join(keys))
        self._keys = keys


def read_keys(path: Path) -> dict[str, bytes]:
    """Read the names and SHA-256 digests of a keys file. Blank lines and lines that start with # are skipped.

    Raises `ConfigError` with one line, which shows nothing of the bad line because it may contain a key.
    """
    keys, problems = _parse_keys(path)
    if problems:
        raise ConfigError(problems[0])
    return keys


def _parse_keys(path: Path) -> tuple[dict[str, bytes], list[str]]:
    """The keys of the valid lines, and a message for each bad line. Raises `ConfigError` if the file cannot be read."""
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
            problems.append(f"{where}: the name {words[0]} is there twice; give the new key another name")
        else:
            keys[words[0]] = bytes.fromhex(digest[1])
    if not keys and not problems:
        problems.append(f"keys_file {path}: has no key; make one with `sightline key new NAME`")
    return keys, problems


@dataclass(frozen=True)
class Quota:
    """The state of a key's rate limit after one check.

    `remaining` is how much of `limit` is left. `reset_s` is the time in seconds until all of it is available again.
    `retry_after_s` is 0 if the check was allowed, else the time in seconds until the same check would be allowed.
    """

    allowed: bool
    limit: int
    remaining: int
    reset_s: float
    retry_after_s: float

    def headers(self, unit: str = "requests") -> dict[str, str]:
        """OpenAI's rate limit headers, and `Retry-After` in whole seconds if the request was refused."""
        fields = {
            f"x-ratelimit-limit-{unit}": str(self.limit),
            f"x-ratelimit-remaining-{unit}": str(self.remaining),
            f"x-ratelimit-reset-{unit}": f"{self.reset_s:.3f}".rstrip("0").rstrip(".") + "s",
        }
        if not self.allowed:
            fields["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return fields


class RateLimiter:
    """A token bucket for each key: a burst of `per_minute`, then one every 60 / `per_minute` seconds.

    Each process counts for itself: with N ingresses a key may send up to N times as much, and the headers have the
    state of the ingress that responded. At most `MAX_BUCKETS` keys have a state. Beyond that the key that was unused
    for longest is forgotten, and starts with a full bucket. Not thread-safe: for one event loop.
    """

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # name -> (tokens, when), oldest first

    def check(self, name: str, cost: int = 1) -> Quota:
        """Take `cost` tokens from the bucket of `name` if it has so many; a refused check takes none.

        A cost over the whole limit is reduced to the limit, because otherwise it could never be allowed.
        """
        limit, rate, now = self.per_minute, self.per_minute / 60, self._clock()
        cost = min(cost, limit)
        tokens, since = self._buckets.get(name, (float(limit), now))
        tokens = min(limit, tokens + (now - since) * rate)
        missing = cost - tokens
        # The tolerance is for clients that wait exactly `retry_after_s`: a rounding error must not refuse them.
        allowed = missing <= 1e-6
        if allowed:
            tokens = max(0.0, tokens - cost)
        self._buckets[name] = (tokens, now)
        self._buckets.move_to_end(name)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return Quota(allowed, limit, int(tokens + 1e-6), (limit - tokens) / rate, 0.0 if allowed else missing / rate)

    def settle(self, name: str, amount: int) -> Quota:
        """Give `amount` tokens back to the bucket of `name`, or take them if it is negative, as far as it has any."""
        quota = self.check(name, 0)
        tokens, now = self._buckets[name]
        tokens = max(0.0, min(float(self.per_minute), tokens + amount))
        self._buckets[name] = (tokens, now)
        reset_s = (self.per_minute - tokens) / (self.per_minute / 60)
        return replace(quota, remaining=int(tokens + 1e-6), reset_s=reset_s)


def _hash(key: str) -> bytes:
    # A token from a header may contain any bytes, also lone surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
