"""The report: statistics against a slow reference; pages that stay small and safe with any label or key."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks.outputs import SyntheticOutput, write_output
from curation.report.page import MAX_PAGE_BYTES, write_report
from curation.report.statistics import EDGES, EXAMPLES, KINDS, compute_statistics
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from sightline.cli import app
from siglip.labels import LabelSet
from siglip.scoring import Scale
from tests.support.vectors import draw_vectors

WIDTH = 16
EVIL = "<script>alert(1)</script>\"'&{{ 7*7 }}"


def noise(row: int) -> bytes:
    """A thumbnail of noise, which does not compress: the worst case for the size of a page."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(row).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make(root: Path, labels: int, **more: Any) -> TaggedOutput:
    names: list[dict[str, Any]] = [{"name": f"label {row}", "threshold": 0.05} for row in range(labels)]
    names[0] = {"name": EVIL, "threshold": 0.1, "accept": 0.6}
    made: dict[str, Any] = {
        "labels": LabelSet.model_validate({"names": names, "top_k": 3}),
        "texts": draw_vectors(labels, WIDTH, 77),
        "shards": 3,
        "embed": lambda shard: draw_vectors(200 + shard, WIDTH, shard),
        "scale": Scale(20, -8),
        "reject": lambda shard: ["truncated", EVIL][: 2 * shard],
        "key": lambda row: f"{EVIL} {row}",
        **more,
    }
    write_output(str(root), SyntheticOutput(**made))
    return open_output(str(root))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    return make(tmp_path_factory.mktemp("report") / "made", 7)


def test_statistics_equal_a_slow_reference(output: TaggedOutput) -> None:
    scores = np.concatenate([output.head.scores(read_embeddings(b)) for b in output.batches(["embedding"])])
    statistics = compute_statistics(output)
    assert statistics.images == len(scores) == 603
    assert statistics.unlabelled == (scores < np.asarray(output.labels.thresholds(), np.float32)).all(axis=1).sum()
    logits = np.log(scores.astype(np.float64) / (1 - scores))
    for row, one in enumerate(statistics.labels):
        mine = scores[:, row]
        predicted = mine >= np.float32(one.threshold)
        assert one.predicted == predicted.sum()
        assert one.accepted == (0 if one.accept is None else (mine >= np.float32(one.accept)).sum())
        assert one.histogram.sum() == 603
        counted = np.histogram(logits[:, row], [-np.inf, *EDGES, np.inf])[0]
        assert np.abs(one.histogram - counted).sum() <= 2  # a score on an edge may be counted on either side
        orders: dict[str, Any] = {
            "highest": np.argsort(-mine, kind="stable"),
            "just above": [i for i in np.argsort(mine, kind="stable") if predicted[i]],
            "just below": [i for i in np.argsort(-mine, kind="stable") if not predicted[i]],
        }
        for kind in KINDS:
            assert [e.position for e in one.examples[kind]] == [int(i) for i in orders[kind][:EXAMPLES]]
            assert all(e.score == pytest.approx(float(mine[e.position])) for e in one.examples[kind])
    assert {reason: len(rows) for reason, rows in statistics.rejects.items()} == {"truncated": 2, EVIL: 2}


class Tags(HTMLParser):
    """Collects the tags, ids and links of a page. Asserts that no attribute holds code or style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") or name == "style" for name, _ in attrs)


def test_no_label_or_key_becomes_code_and_nothing_is_loaded(output: TaggedOutput, tmp_path: Path) -> None:
    [path] = write_report(output, compute_statistics(output), tmp_path / "report.html", 3.6)
    text = path.read_text()
    tags = Tags(text)
    assert tags.tags.count("script") == tags.tags.count("style") == 1
    assert all(link.startswith(("data:", "#")) for link in tags.links)
    assert "{{" not in text.replace("{{ 7*7 }}", "")
    assert "49" not in re.findall(r"&#39;&amp;(\d+)", text)
    policy = text.split('Content-Security-Policy" content="')[1].split('"')[0]
    for tag in ("style", "script"):
        inside = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[-1]
        assert base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode() in policy.replace("&#39;", "'")
    assert "no thumbnails" in text
    # At 100 images a second and 3.60 dollars an hour, 1,000 images cost a cent.
    assert "$0.0100" in text
    assert "limited by model" in text


@pytest.mark.slow
def test_a_thousand_labels_make_ten_pages_of_at_most_ten_mebibytes(tmp_path: Path) -> None:
    output = make(tmp_path / "made", 1000, thumbnail=noise, shards=1)
    written = write_report(output, compute_statistics(output), tmp_path / "out" / "report.html")
    assert [path.name for path in written[:3]] == ["report.html", "002.html", "003.html"]
    assert len(written) == 10
    assert all(path.stat().st_size <= MAX_PAGE_BYTES for path in written)
    texts = [path.read_text() for path in written]
    assert all(text.count('<section class="label"') == 100 for text in texts)
    assert all("data:image/jpeg" in text for text in texts)
    pages = {
        path.relative_to(tmp_path / "out").as_posix(): Tags(text).ids for path, text in zip(written, texts, strict=True)
    }
    listed = [link for link in Tags(texts[0]).links if "#label-" in link]
    assert len(listed) == 1000
    for link in listed:
        file, _, name = link.partition("#")
        assert name in pages[file or "report.html"]
    for text in texts[1:]:
        assert "../report.html#labels" in Tags(text).links


def test_command_writes_the_report_or_exits_with_2(output: TaggedOutput, tmp_path: Path) -> None:
    evaluation = {
        "answers": 3,
        "images": 3,
        "top": {"1": {"value": 0.5, "low": 0.4, "high": 0.6}},
        "labels": [],
        "mean_average_precision": {"value": None, "low": None, "high": None},
        "mean_f1": {"value": 0.25, "low": 0.2, "high": 0.3},
        "micro_precision": {"value": 0.25, "low": 0.2, "high": 0.3},
        "micro_recall": {"value": 0.25, "low": 0.2, "high": 0.3},
        "confusions": [{"right": EVIL, "given": "label 1", "images": 3.0, "cosine": 0.5}],
        "suspects": [{"id": "000000-000000/1", "key": EVIL, "label": EVIL, "answer": "wrong", "score": 0.9}],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    page = tmp_path / "page.html"
    arguments = ["report", output.uri, "--to", str(page), "--evaluation", str(tmp_path / "evaluation.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert '<h2 id="evaluation">' in text
    assert "Confused labels" in text
    assert Tags(text).tags.count("script") == 1
    page.unlink()
    (tmp_path / "evaluation.json").write_text("{}")
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "is not what `sightline evaluate --json` prints" in " ".join(refused.stderr.split())
    assert not page.exists()
    nowhere = CliRunner().invoke(app, ["report", str(tmp_path), "--to", str(page)])
    assert nowhere.exit_code == 2
    assert not page.exists()
