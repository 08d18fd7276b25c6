"""Linear probes: trained from answers, and kept only where they beat the label's prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from benchmarks.outputs import SyntheticOutput, write_output
from curation.quality.probe import make_label_set, train_probes
from curation.quality.truth import Truth
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from siglip.heads import build_head
from siglip.labels import LabelSet
from siglip.scoring import Scale
from tests.support.vectors import draw_vectors

WIDTH, LABELS = 16, 3


@pytest.fixture
def output(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    root = str(tmp_path_factory.mktemp("probe") / "made")
    labels = LabelSet.model_validate({"names": [f"label {row}" for row in range(LABELS)], "threshold": 0.2})
    texts = np.eye(WIDTH, dtype=np.float32)[:LABELS]
    write_output(
        root, SyntheticOutput(labels, texts, 2, lambda shard: draw_vectors(400, WIDTH, shard), scale=Scale(20, -7))
    )
    return open_output(root)


@pytest.mark.slow
def test_a_probe_is_kept_only_where_it_beats_the_prompts(output: TaggedOutput) -> None:
    """Label 0 is right along another direction than its prompt's, label 1 along its own; label 2 has no answers."""
    vectors = np.concatenate([read_embeddings(batch) for batch in output.batches(["embedding"])])
    random = np.random.default_rng(1)
    other = vectors[:, 9] * 20 + random.normal(0, 1, len(vectors)) > 5
    own = output.head.logits(vectors)[:, 1] + random.normal(0, 1, len(vectors)) > 0
    image = np.concatenate([np.arange(len(vectors))] * 2)
    label = np.repeat([0, 1], len(vectors))
    names = [str(row) for row in range(len(vectors))]
    right = np.concatenate([other, own])
    truth = Truth(np.arange(len(vectors)), names, names, vectors, image, label, right, np.ones(len(right)))
    [learned, known] = train_probes(output, truth)
    assert (learned.label, known.label) == ("label 0", "label 1")
    assert learned.probe is not None
    assert learned.after > 0.9 > 0.5 > learned.before
    assert known.probe is None
    assert known.reason == "no better than the label as it is"
    assert abs(known.after - known.before) < 0.03
    labels = make_label_set(output.labels, [learned, known])
    head = build_head(labels, output.head.vectors, output.table.scale, output.weights)
    fresh = draw_vectors(400, WIDTH, 99)
    assert average_precision_score(fresh[:, 9] * 20 > 5, head.scores(fresh)[:, 0]) > 0.9
    few = replace(truth, image=image[:15], label=label[:15], right=right[:15], weight=truth.weight[:15])
    [short] = train_probes(output, few)
    assert short.probe is None
    assert "fewer than 10 answers are right" in short.reason
