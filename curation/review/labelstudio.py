"""Label Studio: write a sample as tasks with the model's predictions, and read people's answers from an export."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from curation.tagged_output import ID
from siglip.labels import LabelSet
from storage.hub.names import make_page_url
from storage.schemes import is_remote, scheme_of
from storage.settings import ConfigError

MAX_TASKS, MAX_BYTES = 90_000, 200 * 2**20
"""Limits of one tasks file. Label Studio refuses imports of over 100,000 tasks and, by default, of over 250 MB."""
ANSWERS = ("right", "wrong", "unsure")
CONFIG = """<View>
  <Header value="Is this: $label?"/>
  <Image name="image" value="$image" zoom="true"/>
  <Choices name="answer" toName="image" choice="single-radio" required="true" showInLine="true">
    <Choice value="right" hotkey="r"/>
    <Choice value="wrong" hotkey="w"/>
    <Choice value="unsure" hotkey="u"/>
  </Choices>
</View>
"""
_DATA = (ID, "key", "sha256", "label", "sample", "score", "weight", "stratum")


def write_tasks(questions: Iterator[dict[str, Any]], labels: LabelSet, folder: Path) -> list[Path]:
    """Write `config.xml`, `tasks-000.json`, `tasks-001.json` and so on. A task asks about one label of one image.

    The image is the thumbnail as a data URI. Without a thumbnail it is the source, when that is an http(s) or s3 URL of
    a single image. The prediction is `right` when the score reaches the label's threshold, else `wrong`.

    `questions` are the rows of a sample, with thumbnails (see `curation.sampling.files.read_questions`). Raises
    `ConfigError` for an image that has neither a thumbnail nor a URL.
    """
    thresholds = dict(zip(labels.label_names(), labels.thresholds(), strict=True))
    (folder / "config.xml").write_text(CONFIG, encoding="utf-8")
    written: list[Path] = []
    for texts in _split(_make_task(question, thresholds) for question in questions):
        path = folder / f"tasks-{len(written):03d}.json"
        path.write_text("[\n" + ",\n".join(texts) + "\n]\n", encoding="utf-8")
        written.append(path)
    return written


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read the answers from a Label Studio JSON export: one for each answered task.

    Of several people's annotations of a task, the latest counts. Skipped and empty annotations are left out. Raises
    `ConfigError` when the file is not an export of tasks that `write_tasks` wrote.
    """
    refused = f"{path} is not a JSON export of Label Studio with tasks of `sightline sample`"
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{refused}: {error}") from error
    if not isinstance(tasks, list):
        raise ConfigError(f"{refused}: it is not a list of tasks")
    answers = []
    for number, task in enumerate(tasks, 1):
        try:
            answer = _read_task(task)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError(f"{refused}: its item {number} is not such a task") from error
        if answer is not None:
            answers.append(answer)
    return answers


def _make_task(row: dict[str, Any], thresholds: dict[str, float]) -> str:
    predicted = "right" if row["score"] >= thresholds[row["label"]] else "wrong"
    choice = {
        "from_name": "answer",
        "to_name": "image",
        "type": "choices",
        "value": {"choices": [predicted]},
        "score": row["score"],
    }
    task = {
        "data": {"image": _image(row), **{name: row[name] for name in _DATA}},
        "predictions": [{"model_version": "sightline", "score": row["score"], "result": [choice]}],
    }
    return json.dumps(task, ensure_ascii=False)


def _image(row: dict[str, Any]) -> str:
    if row["thumbnail"] is not None:
        return f"data:image/jpeg;base64,{base64.b64encode(row['thumbnail']).decode()}"
    source = str(row["source"])
    whole = not source.lower().endswith((".tar", ".tar.gz", ".tgz", ".parquet"))
    if whole and scheme_of(source) == "hf":
        return make_page_url(source)  # Label Studio has no such scheme
    if whole and is_remote(source):
        return source
    raise ConfigError(
        f"{row['key']} of {source} has no thumbnail and no URL: tag with `thumbnails: true` to have thumbnails"
    )


def _split(tasks: Iterator[str]) -> Iterator[list[str]]:
    """Split tasks into lists, one for each file, by `MAX_TASKS` and `MAX_BYTES`."""
    texts: list[str] = []
    size = 0
    for text in tasks:
        length = len(text.encode()) + 2
        if texts and (len(texts) >= MAX_TASKS or size + length > MAX_BYTES):
            yield texts
            texts, size = [], 0
        texts.append(text)
        size += length
    if texts:
        yield texts


def _read_task(task: dict[str, Any]) -> dict[str, Any] | None:
    annotations = [one for one in task.get("annotations", []) if not one.get("was_cancelled") and one.get("result")]
    if not annotations:
        return None
    latest = max(annotations, key=lambda one: str(one.get("updated_at") or one.get("created_at") or ""))
    [chosen] = [item["value"]["choices"][0] for item in latest["result"] if item.get("from_name") == "answer"]
    data = task["data"]
    return {**{name: data.get(name) for name in (ID, "key", "sha256", "label", "sample", "weight")}, "answer": chosen}
