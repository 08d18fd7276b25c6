"""The store of the inputs goes away in the middle of a run: the run ends soon, and the next one does the rest."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from sightline.demo.dataset import encode_image
from sightline.demo.shapes import LABELS
from tests.support.jobs import Place
from tests.support.stores.fault_proxy import Reset, fault_proxy
from tests.support.stores.radosgw import Radosgw

SHARDS = 40


@pytest.mark.s3
def test_a_run_does_not_try_every_shard_of_a_store_that_is_away(
    s3: Radosgw, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    with fault_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        place = Place(f"s3://{s3.new_bucket()}", tmp_path)
        rng = random.Random(0)
        for number in range(SHARDS):
            place.put(f"{number:02}.jpg", encode_image(rng, rng.choice(LABELS)))
        output = str(tmp_path / "output")
        proxy.add(Reset(), "/input/", times=None, skip=8, method="GET|HEAD")
        first = place.tag(rows_per_shard=1, output=output)
        assert first.returncode == 1, first.stdout + first.stderr
        told = re.search(r"unreachable \d+: (\d+) shards were not tried, because", " ".join(first.stderr.split()))
        assert told is not None, first.stderr
        assert int(told[1]) >= SHARDS / 2
        proxy.clear()
        second = place.tag(rows_per_shard=1, output=output)
    assert second.returncode == 0, second.stdout + second.stderr
    place.output = output
    assert place.verify().rows_tagged == SHARDS
