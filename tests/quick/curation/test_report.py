"""The report: statistics against a slow reference; pages that stay small and safe with any label or key."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from benchmarks.outputs import SyntheticOutput, write_output
from curation.quality.evaluation import Evaluation, evaluate
from curation.quality.truth import Truth
from curation.report.charts import list_counts
from curation.report.page import MAX_PAGE_BYTES, write_report
from curation.report.statistics import EDGES, EXAMPLES, KINDS, compute_statistics
from curation.sampling.design import Design
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
        self.titles: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") or name == "style" for name, _ in attrs)


def test_no_label_or_key_becomes_code_and_nothing_is_loaded(output: TaggedOutput, tmp_path: Path) -> None:
    [path] = write_report(output, compute_statistics(output), tmp_path / "report.html", 3.6)
    text = path.read_text()
    tags = Tags(text)
    assert tags.tags.count("script") == tags.tags.count("style") == 1
    # A label's name opens the page of `sightline browse` on this machine, when somebody clicks on it.
    assert all(link.startswith(("data:", "#", "http://127.0.0.1:8020/#")) for link in tags.links)
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
    # Long keys take room from the pictures.
    output = make(tmp_path / "made", 1000, thumbnail=noise, shards=1, key=lambda row: f"{row} {'long/' * 200}")
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


def test_the_headline_counts_the_labels_and_bands_that_the_output_has(output: TaggedOutput) -> None:
    statistics = compute_statistics(output)
    rows = output.to_arrow(["labels", "bands"]).to_pylist()
    pairs = Counter(pair for row in rows for pair in zip(row["labels"], row["bands"], strict=True))
    for one in statistics.labels:
        assert (one.accepted, one.review) == (pairs[one.label, "accept"], pairs[one.label, "review"])
    assert statistics.labels[0].accepted > 0
    assert any(one.accepted + one.review < one.predicted for one in statistics.labels)  # top_k keeps some away
    accepted = sum("accept" in row["bands"] for row in rows)
    unlabelled = sum(not row["labels"] for row in rows)
    counts = statistics.accepted, statistics.review, statistics.unlabelled
    assert counts == (accepted, len(rows) - accepted - unlabelled, unlabelled)


def judge(output: TaggedOutput, path: Path, images: int, sample: bool = True) -> Evaluation:
    """Write the evaluation of an output by answers about all labels of its first images, by default as a sample."""
    batch = output.take(np.arange(images), ["id", "key", "embedding"])
    vectors = read_embeddings(batch.combine_chunks().to_batches()[0])
    labels = len(output.labels.names)
    logits = output.head.logits(vectors).astype(np.float64)
    right = logits + np.random.default_rng(0).normal(0, 2, logits.shape) > -1
    image, label = (axis.reshape(-1) for axis in np.indices((images, labels)))
    ids, keys = batch["id"].to_pylist(), batch["key"].to_pylist()
    weight = np.ones(len(image))
    truth = Truth(np.arange(images), ids, keys, vectors, image, label, right.reshape(-1), weight, complete=True)
    designs = (Design("", output.rows, {}),) if sample else ()
    found = evaluate(output, replace(truth, designs=designs), curves=True)
    path.write_text(json.dumps(found.as_dict()))
    return found


def read_page(path: Path) -> str:
    """The visible text of a page, with single spaces."""
    text = re.sub(r"<(style|script)>.*?</\1>", "", path.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def report(output: TaggedOutput, *options: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", output.uri, *map(str, options)])


def test_the_page_tells_what_is_right_with_intervals_and_what_is_not_known(
    output: TaggedOutput, tmp_path: Path
) -> None:
    found = judge(output, tmp_path / "evaluation.json", 300)
    page = tmp_path / "page.html"
    done = report(output, "--to", page, "--evaluation", tmp_path / "evaluation.json")
    assert done.exit_code == 0, done.output
    text, source = read_page(page), page.read_text()
    statistics = compute_statistics(output)
    for band, name in ((found.accepted, "accepted"), (found.review, "review")):
        assert band.images == sum(getattr(one, name) for one in statistics.labels)
        number, _, interval = str(band.precision).partition(" ")
        assert f"{number} {interval} right, from {band.answers} answers" in text
    assert str(found.micro_recall) in text
    assert "–" not in re.sub(r"[0-9]–[0-9]|– Sightline report", "", text)  # no figure is a dash
    # Each label has its curve; both kinds are drawn, with bands.
    assert source.count('class="band precision"') >= 5
    assert 'class="chart trade"' in source
    assert "pointwise 95 % intervals" in text
    assert "logarithmic" in text
    # Confusions have pictures with keys, which are cut in the middle.
    pair = found.confusions[0]
    assert f"{pair.right} is right, {pair.given} is written" in text
    keys = output.take(list(pair.examples), ["key"])["key"].to_pylist()
    tags = Tags(source)
    assert {key for key in keys if key not in tags.titles} == set()
    assert "*" not in re.sub(r"\{\{ 7\*7 \}\}", "", text)


def test_figures_that_are_not_independent_or_not_known_say_so(output: TaggedOutput, tmp_path: Path) -> None:
    judge(output, tmp_path / "evaluation.json", 3)
    told = json.loads((tmp_path / "evaluation.json").read_text())
    page = tmp_path / "page.html"
    assert report(output, "--to", page, "--evaluation", tmp_path / "evaluation.json").exit_code == 0
    assert "the share that is right is not known from" in read_page(page)
    assert "not known" in read_page(page)
    assert "chose the threshold" not in read_page(page)
    assert "Audited not known" in read_page(page)
    # A label whose answers chose its threshold has a star, unless all images of its band were looked at.
    figure = {"value": 0.9, "low": 0.8, "high": 0.95}
    label = next(one for one in told["labels"] if one["label"] == EVIL)
    label |= {"independent": False, "accepted": {"images": 50, "answers": 20, "precision": figure}}
    told["accepted"] = {"images": 50, "answers": 20, "precision": figure}
    for answers, star in ((20, " *"), (50, "")):
        label["accepted"]["answers"] = told["accepted"]["answers"] = answers
        (tmp_path / "evaluation.json").write_text(json.dumps(told))
        assert report(output, "--to", page, "--evaluation", tmp_path / "evaluation.json").exit_code == 0
        assert f"0.90{star} (0.80 to 0.95) right, from {answers} answers" in read_page(page)
        # The note stands under the cards only if one of them has a star.
        assert ("The same answers chose the thresholds of some of these labels" in read_page(page)) == bool(star)


def test_answers_that_are_no_sample_have_no_curve_and_no_interval(output: TaggedOutput, tmp_path: Path) -> None:
    judge(output, tmp_path / "evaluation.json", 300, sample=False)
    page = tmp_path / "page.html"
    assert report(output, "--to", page, "--evaluation", tmp_path / "evaluation.json").exit_code == 0
    assert "They are no sample, so that nothing is known of the others" in read_page(page)
    assert "No precision-recall curve: the answers are no sample" in read_page(page)
    assert 'class="band precision' not in page.read_text()


def test_an_evaluation_of_another_output_is_refused(output: TaggedOutput, tmp_path: Path) -> None:
    other = make(tmp_path / "other", 6)
    file, page = tmp_path / "evaluation.json", tmp_path / "page.html"
    judge(other, file, 50)
    refused = report(output, "--to", page, "--evaluation", file)
    assert refused.exit_code == 2
    said = " ".join(refused.stderr.split())
    assert f"is about {other.uri}, and not about {output.uri}" in said
    # The same place, and other labels.
    file.write_text(json.dumps({**json.loads(file.read_text()), "output": output.uri}))
    assert "with other labels or images: run `sightline evaluate` again" in " ".join(
        report(output, "--to", page, "--evaluation", file).stderr.split()
    )
    file.write_text("{}")
    refused = report(output, "--to", page, "--evaluation", file)
    assert refused.exit_code == 2
    assert "is not what `sightline evaluate --json` prints" in " ".join(refused.stderr.split())
    assert not page.exists()


def test_command_writes_the_report_or_exits_with_2(output: TaggedOutput, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = report(output, "--to", page)
    assert done.exit_code == 0, done.output
    assert "how many are right is not known: no evaluation was given" in read_page(page)
    page.unlink()
    nowhere = CliRunner().invoke(app, ["report", str(tmp_path), "--to", str(page)])
    assert nowhere.exit_code == 2
    assert not page.exists()


@pytest.mark.parametrize(
    ("most", "ticks"),
    [
        (1, [1]),
        (2, [2]),
        (12, [1, 12]),
        (39, [1, 39]),
        (41, [1, 10, 41]),
        (30_000_000, [1, 100, 10_000, 1_000_000, 30_000_000]),
    ],
)
def test_the_axis_of_a_histogram_has_few_numbers_that_do_not_overlap(most: int, ticks: list[int]) -> None:
    assert list_counts(most) == ticks
