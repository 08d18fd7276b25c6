"""A new output in a store without conditional writes is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.output.fingerprint import claim_output
from pipelines.output.output import FINGERPRINT, Output
from storage.settings import ConfigError
from storage.store import StoreOptions
from tests.support.jobs import make_image, run_sightline
from tests.support.stores.google_server import GoogleServer


@pytest.fixture
def heedless(google: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of a server that speaks S3's protocol and knows nothing of If-None-Match."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_ENDPOINT_URL", google.endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return f"s3://{google.new_bucket()}"


def test_a_store_that_ignores_the_condition_is_refused(heedless: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(make_image())
    labels = tmp_path / "labels.yaml"
    labels.write_text("[red circle, blue star]")
    job = tmp_path / "job.yaml"
    job.write_text(f"input: {tmp_path}/images\noutput: {heedless}/tags\nlabels: {labels}\nmodel: {{source: tiny}}\n")
    done = run_sightline("tag", str(job))
    assert done.returncode == 2, done.stderr
    assert "ignores the condition of a write (If-None-Match)" in done.stderr
    assert "Traceback" not in done.stderr
    output = Output(f"{heedless}/tags", StoreOptions.from_environment())
    assert list(output.store.list(f"{heedless}/tags")) == [], "nothing is left there"


def test_a_store_with_conditional_writes_is_taken_and_left_clean(
    google: GoogleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in google.env.items():
        monkeypatch.setenv(name, value)
    output = Output(f"gs://{google.new_bucket()}/tags", StoreOptions())
    for _ in range(2):
        claim_output(output, {"model": "a"})
        assert [entry.uri for entry in output.store.list(output.uri)] == [f"{output.uri}/{FINGERPRINT}"]
    with pytest.raises(ConfigError):
        claim_output(output, {"model": "b"})
