"""The Python API against a job's output: the same numbers, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sightline
from tests.support.images import encode, make_rgb

LABELS = {"names": ["red circle", "blue square", "green star"], "templates": ["a photo of a {label}"], "top_k": None}


@pytest.mark.usefixtures("local_ray")
def test_a_job_and_the_encoder_give_the_same_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "input").mkdir()
    for number in range(20):
        name, format = f"{number}.{('jpg', 'png')[number % 2]}", ("JPEG", "PNG")[number % 2]
        size = (60 + 70 * number, 900 - 40 * number)
        (tmp_path / "input" / name).write_bytes(encode(make_rgb(*size, seed=number), format))
    keys = {"output": str(tmp_path / "output"), "labels": LABELS, "actors": {"num_cpus": 1}, "ray": {"readers": 2}}
    outcome = sightline.tag(input=str(tmp_path / "input"), quiet=True, **keys)
    assert (outcome.new_shards, outcome.manifest["rows_tagged"], outcome.rejected_fraction) == (1, 20, 0)
    assert capfd.readouterr().err == "", "quiet"
    assert sightline.verify(tmp_path / "output").ok
    table = sightline.open_output(str(tmp_path / "output")).to_arrow(["source", "labels", "scores", "embedding"])
    paths = table["source"].to_pylist()
    encoder = sightline.Encoder.load("tiny")
    assert np.array_equal(encoder.images(paths), np.stack(table["embedding"].to_pylist()).astype(np.float32))
    labels = sightline.LabelSet.model_validate(LABELS)
    scores = encoder.scores(paths, labels)
    for row, names, written in zip(scores, table["labels"].to_pylist(), table["scores"].to_pylist(), strict=True):
        assert dict(zip(names, np.float32(written), strict=True)) == dict(zip(labels.label_names(), row, strict=True))
    again = sightline.tag(input=str(tmp_path / "input"), quiet=True, **keys)
    assert again.new_shards == 0
