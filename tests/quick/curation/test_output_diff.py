"""Diffs of two outputs, and of two label sets in all their settings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from benchmarks.outputs import SyntheticOutput, write_output
from curation.label_sets import check_labels, diff_labels
from curation.output_diff import EXAMPLES, diff_outputs
from curation.tagged_output import TaggedOutput, open_output
from sightline.cli import app
from siglip.families import siglip
from siglip.label_text.fitted import Probe
from siglip.label_text.tokens import LabelReadings, Reading
from siglip.labels import LabelSet
from siglip.scoring import Floats, Scale
from storage.settings import ConfigError
from tests.support.vectors import draw_vectors

PROBE = Probe.of(np.ones(8, np.float32), 0.5, "model").model_dump()


def make(root: Path, names: list[str], seed: int = 1, shards: int = 3, rows: int = 70) -> TaggedOutput:
    labels = LabelSet.model_validate({"names": names, "threshold": 0.2, "top_k": 3})
    texts = np.concatenate([draw_vectors(1, 8, seed * 100 + ord(name)) for name in names])
    write_output(
        str(root),
        SyntheticOutput(labels, texts, shards, lambda shard: draw_vectors(rows + shard, 8, shard), scale=Scale(9, -3)),
    )
    return open_output(str(root))


def test_gained_and_lost_labels_equal_a_slow_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.output_diff._BATCH_ROWS", 16)  # batches that do not end where the files end
    before, after = make(tmp_path / "a", ["a", "b", "c", "d"]), make(tmp_path / "b", ["b", "a", "e"], seed=2)
    found = diff_outputs(before, after)

    def read(output: TaggedOutput) -> list[tuple[str, set[str]]]:
        rows = [row for batch in output.batches(["key", "labels"]) for row in batch.to_pylist()]
        return [(row["key"], set(row["labels"])) for row in rows]

    gained: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    first: dict[str, list[str]] = {}
    changed = 0
    for (key, old), (same, new) in zip(read(before), read(after), strict=True):
        assert key == same
        changed += old != new
        gained.update(new - old)
        lost.update(old - new)
        for name in new - old:
            first.setdefault(name, []).append(key)
    assert (found.images, found.changed) == (213, changed)
    assert changed > 20
    assert {one.label: one.gained for one in found.labels if one.gained} == gained
    assert {one.label: one.lost for one in found.labels if one.lost} == lost
    for one in found.labels:
        assert one.gained_by == first.get(one.label, [])[:EXAMPLES]
        assert one.after - one.before == one.gained - one.lost
    assert diff_outputs(before, before).labels == []


def test_outputs_of_other_images_are_refused(tmp_path: Path) -> None:
    before = make(tmp_path / "a", ["a"])
    with pytest.raises(ConfigError, match="the images are not the same"):
        diff_outputs(before, make(tmp_path / "b", ["a"], shards=2))
    with pytest.raises(ConfigError, match="same images in the same shards"):
        diff_outputs(before, make(tmp_path / "c", ["a"], shards=1, rows=213))


def test_command_compares_outputs_and_refuses_a_file_with_an_output(tmp_path: Path) -> None:
    make(tmp_path / "a", ["a", "b"])
    make(tmp_path / "b", ["a", "b"], seed=2)
    labels = tmp_path / "labels.yaml"
    labels.write_text("[a, b]")
    done = CliRunner().invoke(app, ["labels", "diff", str(tmp_path / "a"), str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    assert "of 213 images changed" in done.stdout
    assert "gained it, such as image 0" in done.stdout
    for pair in ((labels, tmp_path / "a"), (tmp_path / "a", labels)):
        refused = CliRunner().invoke(app, ["labels", "diff", *map(str, pair)])
        assert refused.exit_code == 2
        assert "compare two label sets, or two outputs" in " ".join(refused.stderr.split())


def test_label_set_diff_covers_all_settings(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"names": ["a", "b", "c", "d", "e"]}
    grown = {
        "names": [
            "a",
            {"name": "b", "calibration": {"scale": 2, "bias": 1}},
            {"name": "c", "probe": PROBE},
            {"name": "d", "accept": 0.5},
            "e",
        ],
        "groups": {"one": ["a", "e"]},
    }
    changes = diff_labels(LabelSet.model_validate(plain), LabelSet.model_validate(grown))
    assert [(change.label, change.what, change.scores) for change in changes] == [
        ("a", "group: none became a, e", True),
        ("b", "calibration: added", True),
        ("c", "prompts: 'This is a photo of c.' became none", True),
        ("c", "probe: added", True),
        ("d", "accept: none became 0.5", False),
        ("e", "group: none became a, e", True),
    ]
    (tmp_path / "grown.yaml").write_text(yaml.safe_dump(grown))
    assert diff_labels(LabelSet.model_validate(grown), LabelSet.model_validate(str(tmp_path / "grown.yaml"))) == []


class FakeTextModel:
    """A text model that counts words and embeds a text by its length."""

    text_length = 10

    def count_tokens(self, texts: Any) -> Any:
        return np.asarray([len(text.split()) for text in texts])

    def read_labels(self, labels: LabelSet) -> LabelReadings:
        prompts = [prompt for group in labels.prompts(siglip) for prompt in group]
        return LabelReadings(
            labels, siglip, [Reading(len(text.split()), len(text), 0, text.encode()) for text in prompts]
        )

    def embed_texts(self, texts: Any) -> Floats:
        return np.concatenate([draw_vectors(1, 8, len(text)) for text in texts])


def test_labels_with_a_probe_are_not_checked() -> None:
    labels = LabelSet.model_validate({"names": ["cat", {"name": "!!!", "probe": PROBE}, "a dog"]})
    assert check_labels(labels, siglip, FakeTextModel(), 0.999) == []
