"""Ground truth files in all their formats, and the error messages for files that are not ground truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.outputs import SyntheticOutput, write_output
from curation.quality.truth import Truth, read_truth
from curation.tagged_output import TaggedOutput, open_output, read_embeddings
from siglip.labels import LabelSet
from storage.settings import ConfigError
from tests.support.vectors import draw_vectors

NAMES = ["cat", "dog", "bird"]


def key(row: int) -> str:
    return f"{row:04d}" if row not in (7, 70) else "twice"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> TaggedOutput:
    root = tmp_path_factory.mktemp("outputs") / "made"
    labels = LabelSet.model_validate({"names": NAMES, "threshold": 0.001})
    write_output(
        str(root),
        SyntheticOutput(labels, draw_vectors(3, 16, 1), 3, lambda shard: draw_vectors(50 + shard, 16, shard), key=key),
    )
    return open_output(str(root))


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def describe(truth: Truth) -> set[tuple[str, str, bool, float]]:
    answers = zip(truth.image, truth.label, truth.right, truth.weight, strict=True)
    return {(truth.keys[image], NAMES[label], bool(right), float(weight)) for image, label, right, weight in answers}


def test_the_last_answer_about_an_image_and_a_label_counts(output: TaggedOutput, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"key": "0003", "label": "cat", "answer": "wrong"},
        {"key": "0100", "label": "dog", "answer": "wrong", "weight": 2.5},
        {"key": "0003", "label": "cat", "answer": "right", "score": 0.3},
        {"key": "0004", "label": "cat", "answer": "unsure"},
        {"key": "0005", "label": "cat", "answer": "right"},
        {"key": "0005", "label": "cat", "answer": "taken back"},
    ]
    truth = read_truth(write(tmp_path / "truth.jsonl", rows), output)
    assert describe(truth) == {("0003", "cat", True, 1.0), ("0100", "dog", False, 2.5)}
    assert not truth.complete
    whole = list(output.batches(["embedding"]))
    everything = np.concatenate([read_embeddings(batch) for batch in whole])
    assert np.array_equal(truth.embeddings, everything[truth.positions])
    assert np.array_equal(truth.logits(output), output.head.logits(truth.embeddings)[truth.image, truth.label])


def test_formats_and_id_columns_give_the_same_truth(output: TaggedOutput, tmp_path: Path) -> None:
    rows = pa.Table.from_batches(output.batches(["id", "key", "sha256"])).slice(10, 3).to_pylist()
    right_labels = [["cat"], [], ["dog", "bird"]]
    tables = []
    for name in ("id", "key", "sha256"):
        listed: list[dict[str, object]] = [
            {name: row[name], "labels": labels} for row, labels in zip(rows, right_labels, strict=True)
        ]
        tables.append(read_truth(write(tmp_path / f"{name}.jsonl", listed), output))
        pq.write_table(pa.Table.from_pylist(listed), tmp_path / "truth.parquet")
        tables.append(read_truth(tmp_path / "truth.parquet", output))
        lines = [f"{row[name]},{'|'.join(labels)}" for row, labels in zip(rows, right_labels, strict=True)]
        (tmp_path / "truth.csv").write_text(f"{name},labels\n" + "\n".join(lines) + "\n")
        tables.append(read_truth(tmp_path / "truth.csv", output))
    assert len({frozenset(describe(table)) for table in tables}) == 1
    assert all(table.complete and not table.exclusive and len(table.image) == 9 for table in tables)
    assert sum(right for _, _, right, _ in describe(tables[0])) == 3


def test_a_line_separator_inside_a_string_ends_no_line(output: TaggedOutput, tmp_path: Path) -> None:
    line = '\ufeff{"key": "0003", "label": "cat", "answer": "right", "note": "a\u2028b\x85c"}\r\n'
    (tmp_path / "truth.jsonl").write_bytes(line.encode())
    assert describe(read_truth(tmp_path / "truth.jsonl", output)) == {("0003", "cat", True, 1.0)}


def test_a_label_column_without_answers_is_exclusive(output: TaggedOutput, tmp_path: Path) -> None:
    (tmp_path / "truth.csv").write_text("key,label\n0010,cat\n0011,dog\n")
    truth = read_truth(tmp_path / "truth.csv", output)
    assert truth.exclusive
    assert truth.complete
    assert sum(truth.right) == 2
    assert len(truth.right) == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "is neither a file nor the folder of a sample"),
        ("a.txt", "x", "a truth file is .jsonl, .csv, .parquet or"),
        ("a.jsonl", "{\n{}\n", "line 1 is not JSON"),
        ("a.jsonl", "{", "no column that names the images"),
        ("a.jsonl", "[1]\n", "is not a JSON object"),
        ("a.jsonl", '{"name": "x"}\n', "no column that names the images"),
        ("a.jsonl", '{"key": "0001"}\n', "no column `labels` or `label`"),
        ("a.jsonl", '{"key": "0001", "label": "cow", "answer": "right"}\n', "no answer says right or wrong"),
        ("a.jsonl", '{"key": "0001", "label": "cat", "answer": "yes"}\n', "'yes': use one of right, wrong"),
        (
            "a.jsonl",
            '{"key": "0001", "label": "cat", "answer": "unsure"}\n',
            "no answer says right or wrong",
        ),
        ("a.jsonl", '{"key": "none", "label": "cat", "answer": "right"}\n', "no answer says right or wrong"),
        ("a.jsonl", '{"key": "twice", "label": "cat", "answer": "right"}\n', "several images have the key 'twice'"),
        (
            "a.jsonl",
            '{"key": "0001", "labels": []}\n{"key": "0001", "labels": []}\n',
            "several rows for one image: '0001'",
        ),
        ("a.jsonl", '{"key": "0001", "labels": [], "weight": 0}\n', "a weight is 0"),
        ("a.jsonl", '{"key": "0001", "labels": [], "weight": "much"}\n', "a weight is much"),
        ("a.jsonl", '{"key": "0001", "labels": 5}\n', "labels are 5: write a list"),
        ("a.jsonl", '{"label": "cat", "answer": "right", "key": null}\n', "a row has no key"),
        ("a.jsonl", '{"key": "0001", "label": 1.10, "answer": "right"}\n', "label is 1.1, which is not text: write it"),
        ("a.jsonl", '{"key": "0001", "label": true}\n', "label is True, which is not text"),
        ("a.jsonl", '{"key": "0001", "labels": ["cat", false]}\n', "labels is False, which is not text"),
        ("a.jsonl", '{"key": "0001", "labels": ["cat", null]}\n', "labels is None, which is not text"),
        (
            "a.json",
            '[{"data": {"id": "x", "key": "k", "sha256": "s", "label": 1.10, "weight": 1}, "annotations": [{"result":'
            ' [{"from_name": "answer", "value": {"choices": ["right"]}}]}]}]',
            "label is 1.1, which is not text",
        ),
        ("a.csv", "key,labels\n", "no answer says right or wrong"),
        ("a.csv", "key,label,stratum,score\n0001,cat,1,0.5\n", "holds the questions of a sample and no answers"),
        ("a.parquet", "none", "cannot be read"),
    ],
)
def test_files_that_are_not_ground_truth_are_refused(
    output: TaggedOutput, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_truth(tmp_path / name, output)


def test_unknown_images_and_labels_are_counted_and_left_out_or_refused(output: TaggedOutput, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"key": "0003", "label": "cat", "answer": "wrong"},
        {"key": "0003", "label": "cow", "answer": "wrong"},
        {"key": "none", "label": "cat", "answer": "right"},
    ]
    file = write(tmp_path / "truth.jsonl", rows)
    truth = read_truth(file, output)
    assert describe(truth) == {("0003", "cat", False, 1.0)}
    assert any("1 labels are not in the output's label set: 'cow'" in notice for notice in truth.notices)
    assert any("1 images are not in" in notice and "'none'" in notice for notice in truth.notices), truth.notices
    with pytest.raises(ConfigError, match="1 images are not in"):
        read_truth(file, output, strict=True)
    with pytest.raises(ConfigError, match="'cow'"):
        read_truth(write(tmp_path / "labels.jsonl", rows[:2]), output, strict=True)


def test_a_half_written_last_line_is_left_out_with_a_notice(output: TaggedOutput, tmp_path: Path) -> None:
    line = json.dumps({"key": "0003", "label": "cat", "answer": "right"})
    (tmp_path / "truth.jsonl").write_text(f"{line}\n{line[:20]}")
    truth = read_truth(tmp_path / "truth.jsonl", output)
    assert describe(truth) == {("0003", "cat", True, 1.0)}
    assert any("the last line was not written to its end" in notice for notice in truth.notices)


def test_answers_of_no_sample_have_no_design_and_whole_rows_are_a_random_sample(
    output: TaggedOutput, tmp_path: Path
) -> None:
    single = write(tmp_path / "single.jsonl", [{"key": "0003", "label": "cat", "answer": "right"}])
    assert read_truth(single, output).designs == ()
    weighted = write(tmp_path / "weighted.jsonl", [{"key": "0003", "labels": ["cat"], "weight": 3}])
    assert read_truth(weighted, output).designs == ()
    whole = read_truth(write(tmp_path / "whole.jsonl", [{"key": "0003", "labels": ["cat"]}]), output)
    assert [design.images for design in whole.designs] == [output.rows]
    assert any("count as a random sample" in notice for notice in whole.notices)


def test_the_last_file_counts_and_unsure_answers_are_kept_apart(output: TaggedOutput, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"key": "0003", "label": "cat", "answer": "right"}])
    two = write(
        tmp_path / "two.jsonl",
        [{"key": "0003", "label": "cat", "answer": "wrong"}, {"key": "0004", "label": "cat", "answer": "unsure"}],
    )
    truth = read_truth([one, two], output)
    assert describe(truth) == {("0003", "cat", False, 1.0)}
    assert [truth.keys[image] for image in truth.unsure_image] == ["0004"]
    assert describe(read_truth([two, one], output)) == {("0003", "cat", True, 1.0)}


def test_contradictions_of_two_files_are_counted_and_unsure_contradicts_nothing(
    output: TaggedOutput, tmp_path: Path
) -> None:
    one: list[dict[str, object]] = [{"key": f"{row:04d}", "label": "cat", "answer": "right"} for row in (3, 4, 5)]
    two: list[dict[str, object]] = [
        {"key": f"{row:04d}", "label": "cat", "answer": said} for row, said in ((3, "wrong"), (4, "unsure"))
    ]
    truth = read_truth([write(tmp_path / "one.jsonl", one), write(tmp_path / "two.jsonl", two)], output)
    assert describe(truth) == {("0003", "cat", False, 1.0), ("0005", "cat", True, 1.0)}
    assert any(notice.startswith("1 questions have other answers in another file") for notice in truth.notices)
