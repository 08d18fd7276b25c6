"""API keys and rate limits: which keys are valid, how keys are rotated, and the rate limit headers."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from serve.admission.auth import (
    MAX_BUCKETS,
    REREAD_SECONDS,
    UNREAD_SECONDS,
    AuthConfig,
    KeyRing,
    RateLimiter,
    new_key,
    read_keys,
)
from sightline.cli import app
from storage.settings import ConfigError

LOGGER = "ray.serve.sightline"
"""A logger below Ray Serve's, whose handlers write to the replica's log file; other loggers have no handler there."""


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def write_keys(path: Path, *names: str) -> dict[str, str]:
    """A keys file with a new key for each name. Returns name -> key."""
    made = {name: new_key(name) for name in names}
    path.write_text("# who\n\n" + "\n".join(line for _, line in made.values()) + "\n")
    return {name: key for name, (key, _) in made.items()}


def test_verify_returns_the_name_of_each_key(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys", "alice", "nightly-job", "b.o_b")
    ring = KeyRing(tmp_path / "keys")
    assert ring.names() == ["alice", "nightly-job", "b.o_b"]
    for name, key in keys.items():
        assert ring.verify(key) == name
    for wrong in ("", "sl-", keys["alice"][:-1], keys["alice"] + "x", keys["alice"].lower(), "\udcff", "é" * 1000):
        assert ring.verify(wrong) is None
    # The hash in the file is not a valid key: read access to the file gives no access to the endpoint.
    assert ring.verify((tmp_path / "keys").read_text().split("sha256:")[1].split()[0]) is None


def test_a_key_has_256_random_bits() -> None:
    keys = {new_key("a")[0] for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == len("sl-") + 43 for key in keys)  # 256 bits in base64


def test_the_hash_is_plain_sha256(tmp_path: Path) -> None:
    """`printf %s KEY | sha256sum` makes the hash of a key that another tool made."""
    key = "a key that was made elsewhere"
    (tmp_path / "keys").write_text(f"legacy sha256:{hashlib.sha256(key.encode()).hexdigest()}")
    assert KeyRing(tmp_path / "keys").verify(key) == "legacy"


def test_keys_rotate_without_restart(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    old = write_keys(path, "old")
    ring = KeyRing(path, clock)
    assert ring.verify(old["old"]) == "old"
    status = path.stat()
    new = write_keys(path, "new")
    # A changed file is read again although its size and modification time are unchanged.
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    clock.now += REREAD_SECONDS
    assert (ring.verify(old["old"]), ring.verify(new["new"])) == (None, "new")
    replaced = write_keys(tmp_path / "written", "replaced")
    (tmp_path / "written").replace(path)
    clock.now += REREAD_SECONDS
    assert (ring.verify(new["new"]), ring.verify(replaced["replaced"])) == (None, "replaced")


def test_a_swapped_kubernetes_secret_is_read_again(tmp_path: Path) -> None:
    """The kubelet writes a new folder, and renames a symbolic link to it over the old one."""
    clock = Clock()
    for day in ("one", "two"):
        (tmp_path / f"..{day}").mkdir()
    first, second = write_keys(tmp_path / "..one/keys", "first"), write_keys(tmp_path / "..two/keys", "second")
    (tmp_path / "..data").symlink_to("..one")
    (tmp_path / "keys").symlink_to("..data/keys")
    ring = KeyRing(tmp_path / "keys", clock)
    assert ring.verify(first["first"]) == "first"
    (tmp_path / "..data_tmp").symlink_to("..two")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    clock.now += REREAD_SECONDS
    assert (ring.verify(first["first"]), ring.verify(second["second"])) == (None, "second")


BROKEN = {
    "empty": ("", "has no key"),
    "only comments": ("# nobody\n", "has no key"),
    "no hash": ("alice\n", "line 1: expected NAME sha256:HEX"),
    "a short hash": ("alice sha256:abcd\n", "line 1: expected NAME sha256:HEX"),
    "another hash": ("alice md5:" + "0" * 32, "line 1: expected NAME sha256:HEX"),
    "a key itself": ("\nalice sl-c2VjcmV0LXNlY3JldA\n", "line 2: this is a key itself"),
    "a key alone": ("sl-c2VjcmV0LXNlY3JldA\n", "line 1: this is a key itself"),
    "a bad name": ("a/b sha256:" + "0" * 64, "line 1: expected NAME sha256:HEX"),
    "a name twice": (f"a sha256:{'0' * 64}\na sha256:{'1' * 64}", "line 2: the name a is there twice"),
}


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN)
def test_a_bad_line_is_an_error_and_no_key(
    text: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        KeyRing(path)
    assert "\n" not in str(caught.value)
    keys = write_keys(path, "alice")
    ring = KeyRing(path, clock)
    path.write_text(text)
    with caplog.at_level(logging.INFO, LOGGER):
        for _ in range(3):
            clock.now += REREAD_SECONDS
            assert ring.verify(keys["alice"]) is None
        errors = [record for record in caplog.records if record.levelname == "ERROR"]
        assert len(errors) == 1, "the error must be logged once, not with every request"
        assert words in errors[0].getMessage()
        assert "c2VjcmV0" not in caplog.text
        keys = write_keys(path, "bob")
        clock.now += REREAD_SECONDS
        assert ring.verify(keys["bob"]) == "bob"
    assert caplog.records[-1].getMessage().endswith("now 1 keys: bob")


def test_a_removed_key_is_invalid_although_another_line_is_bad(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    keys = write_keys(path, "alice", "bob")
    ring = KeyRing(path, clock)
    bobs = next(line for line in path.read_text().splitlines() if line.startswith("bob "))
    path.write_text(f"{bobs}\ncarol sha256:oops\n")
    clock.now += REREAD_SECONDS
    assert ring.verify(keys["alice"]) is None
    assert ring.verify(keys["bob"]) == "bob", "a bad line must not invalidate the other keys"


def test_keys_of_a_missing_file_stay_valid_for_a_minute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        KeyRing(tmp_path / "keys")
    clock, keys = Clock(), write_keys(tmp_path / "keys", "alice")
    ring = KeyRing(tmp_path / "keys", clock)
    (tmp_path / "keys").unlink()
    clock.now += REREAD_SECONDS
    assert ring.verify(keys["alice"]) == "alice"
    assert "the last keys stay valid" in caplog.text
    (tmp_path / "keys").write_bytes(b"\xff\xfe\x00")
    clock.now += REREAD_SECONDS
    assert ring.verify(keys["alice"]) == "alice"
    clock.now += UNREAD_SECONDS
    assert ring.verify(keys["alice"]) is None
    assert "no key is valid any more" in caplog.text
    keys = write_keys(tmp_path / "keys", "alice")
    clock.now += REREAD_SECONDS
    assert ring.verify(keys["alice"]) == "alice"


def test_the_file_is_read_at_most_once_a_second(tmp_path: Path) -> None:
    clock, keys = Clock(), write_keys(tmp_path / "keys", "alice")
    ring = KeyRing(tmp_path / "keys", clock)
    write_keys(tmp_path / "keys", "bob")
    clock.now += REREAD_SECONDS / 2
    assert ring.verify(keys["alice"]) == "alice"


def test_the_command_line_prints_a_new_key_and_its_line_of_the_keys_file(tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["key", "new", "alice"])
    assert result.exit_code == 0
    (tmp_path / "keys").write_text(result.stdout)  # sightline key new alice >> keys
    assert list(read_keys(tmp_path / "keys")) == ["alice"]
    key = next(word for word in result.stderr.split() if word.startswith("sl-"))
    assert KeyRing(tmp_path / "keys").verify(key) == "alice"
    assert key not in result.stdout
    wrong = runner.invoke(app, ["key", "new", "no spaces"])
    assert (wrong.exit_code, "key name 'no spaces'" in wrong.stderr) == (2, True)


def test_invalid_and_unknown_keys_of_the_config_are_refused() -> None:
    for fields in ({"requests_per_minute": 0}, {"requests_per_second": 1}, {"keys": "x"}):
        with pytest.raises(ValidationError):
            AuthConfig.model_validate(fields)


def test_requests_empty_a_bucket_and_time_fills_it() -> None:
    clock = Clock()
    limiter = RateLimiter(60, clock)
    for used in range(1, 61):
        quota = limiter.check("alice")
        assert (quota.allowed, quota.remaining, quota.retry_after_s) == (True, 60 - used, 0.0)
        assert quota.reset_s == pytest.approx(used)
    refused = limiter.check("alice")
    assert (refused.allowed, refused.remaining) == (False, 0)
    assert refused.retry_after_s == pytest.approx(1.0)
    assert limiter.check("bob").allowed  # each key has its own bucket
    clock.now += 0.5
    assert not limiter.check("alice").allowed  # a refused request takes nothing from the bucket
    clock.now += 0.5
    assert limiter.check("alice").allowed
    clock.now += 3600
    assert limiter.check("alice").remaining == 59  # a bucket holds at most the requests of one minute


def test_the_headers_of_a_quota_have_limit_remaining_requests_and_reset_time() -> None:
    clock = Clock()
    limiter = RateLimiter(2, clock)
    assert limiter.check("alice").headers() == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "30s",
    }
    limiter.check("alice")
    clock.now += 0.25
    assert limiter.check("alice").headers() == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "59.75s",
        "retry-after": "30",
    }


def test_a_cost_over_the_limit_is_reduced_to_the_limit() -> None:
    clock = Clock()
    limiter = RateLimiter(10, clock)
    assert limiter.check("alice", cost=64).remaining == 0
    refused = limiter.check("alice", cost=64)
    assert not refused.allowed
    assert refused.retry_after_s == pytest.approx(60.0)


def test_the_number_of_buckets_is_limited() -> None:
    clock = Clock()
    limiter = RateLimiter(1, clock)
    for n in range(MAX_BUCKETS):
        clock.now += 1e-6
        limiter.check(f"name {n}")
    assert not limiter.check("name 0").allowed  # the bucket of "name 1" is now the least recently used one
    limiter.check("one more")
    assert not limiter.check("name 0").allowed
    assert limiter.check("name 1").allowed  # its bucket was dropped, and a new one is full
    assert len(limiter._buckets) == MAX_BUCKETS


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.integers(1, 6000),
    st.lists(st.tuples(st.floats(0, 30, allow_nan=False), st.integers(1, 200)), min_size=1, max_size=60),
)
def test_no_sequence_of_requests_exceeds_the_rate(per_minute: int, requests: list[tuple[float, int]]) -> None:
    clock = Clock()
    limiter = RateLimiter(per_minute, clock)
    start, spent = clock.now, 0
    for wait, cost in requests:
        clock.now += wait
        quota = limiter.check("alice", cost)
        assert 0 <= quota.remaining <= per_minute
        spent += min(cost, per_minute) if quota.allowed else 0
        assert spent <= per_minute + (clock.now - start) * per_minute / 60 + 1e-3
        if not quota.allowed:  # waiting for `retry_after_s` must be enough
            clock.now += quota.retry_after_s
            assert limiter.check("alice", cost).allowed
            spent += min(cost, per_minute)


def test_a_rate_limiter_gives_back_what_was_not_used_and_takes_no_more_than_there_is() -> None:
    rates = RateLimiter(60, clock=lambda: 0.0)
    assert rates.check("a", 50).remaining == 10
    assert (rates.settle("a", 20).remaining, rates.settle("a", 20).reset_s) == (30, 10.0)
    assert rates.settle("a", 1000).remaining == 60
    assert (rates.settle("a", -50).remaining, rates.settle("a", -50).remaining) == (10, 0)
    assert not rates.check("a", 1).allowed
