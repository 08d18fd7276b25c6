"""The Python API against a job's output, and the README's snippet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import sightline
from tests.support.images import encode, make_rgb

SHARE: dict[str, Any] = {"actors": {"num_cpus": 1}, "ray": {"readers": 2}}
"""What a job takes of `local_ray`."""
LABELS: dict[str, Any] = {
    "names": ["red circle", "blue square", "green star"],
    "templates": ["a photo of a {label}"],
    "top_k": None,
}


SNIPPET = """\
import sightline

encoder = sightline.Encoder.load("google/siglip-base-patch16-256")
scores = encoder.scores(["cat.jpg", "dog.jpg"], ["cat", "dog"])  # probabilities, float32 (2, 2)
embeddings = encoder.images(["cat.jpg", "dog.jpg"])  # unit vectors, float32 (2, 768)

sightline.tag("job.yaml")  # the same as `sightline tag job.yaml`
table = sightline.open_output("tags").to_arrow(["source", "labels", "scores", "embedding"])
"""
"""The README's snippet of the Python API."""


@pytest.mark.usefixtures("local_ray")
def test_the_readmes_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert SNIPPET in readme
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        Path(f"{name}.jpg").write_bytes(encode(make_rgb(seed=len(name)), "JPEG"))
    Path("job.yaml").write_text(yaml.safe_dump({"input": ".", "output": "tags", "labels": ["cat", "dog"], **SHARE}))
    names: dict[str, Any] = {}
    exec(SNIPPET.replace("google/siglip-base-patch16-256", "tiny"), names)
    assert (names["scores"].shape, names["embeddings"].shape) == ((2, 2), (2, names["encoder"].width))
    assert {Path(path).name for path in names["table"]["source"].to_pylist()} == {"cat.jpg", "dog.jpg"}


@pytest.mark.usefixtures("local_ray")
def test_a_job_and_the_encoder_give_the_same_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "input").mkdir()
    for number in range(20):
        name, format = f"{number}.{('jpg', 'png')[number % 2]}", ("JPEG", "PNG")[number % 2]
        size = (60 + 70 * number, 900 - 40 * number)
        (tmp_path / "input" / name).write_bytes(encode(make_rgb(*size, seed=number), format))
    keys: dict[str, Any] = {"output": str(tmp_path / "output"), "labels": LABELS, **SHARE}
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
        expected = dict(zip(labels.label_names(), row.tolist(), strict=True))
        assert dict(zip(names, written, strict=True)) == expected
    again = sightline.tag(input=str(tmp_path / "input"), quiet=True, **keys)
    assert again.new_shards == 0
