"""Label Studio: a sample as tasks with the model's answers in them, and people's answers out of its export."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation.tagged_output import ID
from siglip.labels import LabelSet
from storage.settings import ConfigError

MOST_TASKS, MOST_BYTES = 90_000, 200 * 2**20
"""Label Studio refuses imports of more than 100,000 tasks, and by default of more than 250 MB."""
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
_DATA = (ID, "key", "sha256", "label", "score", "weight", "stratum")


def write_tasks(sample: pa.Table, labels: LabelSet, folder: Path) -> list[Path]:
    """`config.xml` and `tasks-000.json` and so on beside a sample: a task asks one label of one image.

    The image is the thumbnail, in line; without one it is the source, if that is a URL that a browser or Label Studio's
    S3 storage reads. The prediction is right where the score reaches the label's threshold, with the score.

    Raises `ConfigError` for an image that there is neither of.
    """
    thresholds = dict(zip(labels.label_names(), labels.thresholds(), strict=True))
    (folder / "config.xml").write_text(CONFIG, encoding="utf-8")
    written: list[Path] = []
    for texts in _split(_make_task(row, thresholds) for batch in sample.to_batches(1024) for row in batch.to_pylist()):
        path = folder / f"tasks-{len(written):03d}.json"
        path.write_text("[\n" + ",\n".join(texts) + "\n]\n", encoding="utf-8")
        written.append(path)
    return written


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Answers out of Label Studio's JSON export: one for each task that has one, the latest of several people's.

    Skipped and deleted annotations are none. Raises `ConfigError` when it is no export of such tasks.
    """
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))
        return [answer for task in tasks if (answer := _read_task(task)) is not None]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{path} is no JSON export of Label Studio with tasks of `sightline sample` ({what})"
        ) from error


def _make_task(row: dict[str, Any], thresholds: dict[str, float]) -> str:
    said = "right" if row["score"] >= thresholds[row["label"]] else "wrong"
    choice = {
        "from_name": "answer",
        "to_name": "image",
        "type": "choices",
        "value": {"choices": [said]},
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
    if whole and source.startswith(("http://", "https://", "s3://")):
        return source
    raise ConfigError(
        f"{row['key']} of {source} has no thumbnail, and no URL of its own: tag with `thumbnails: true` to have them"
    )


def _split(tasks: Iterator[str]) -> Iterator[list[str]]:
    """Tasks in lists of which each is a file."""
    texts: list[str] = []
    size = 0
    for text in tasks:
        length = len(text.encode()) + 2
        if texts and (len(texts) >= MOST_TASKS or size + length > MOST_BYTES):
            yield texts
            texts, size = [], 0
        texts.append(text)
        size += length
    if texts:
        yield texts


def _read_task(task: dict[str, Any]) -> dict[str, Any] | None:
    given = [one for one in task.get("annotations", []) if not one.get("was_cancelled") and one.get("result")]
    if not given:
        return None
    latest = max(given, key=lambda one: str(one.get("updated_at") or one.get("created_at") or ""))
    [chosen] = [item["value"]["choices"][0] for item in latest["result"] if item.get("from_name") == "answer"]
    data = task["data"]
    return {**{name: data[name] for name in (ID, "key", "sha256", "label", "weight")}, "answer": chosen}
