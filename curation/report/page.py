"""The report's pages: one file for up to a hundred labels, further files beside it for the rest."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from curation.report.charts import draw_histogram, draw_spark
from curation.report.statistics import KINDS, LabelStatistics, OutputStatistics
from curation.tagged_output import ID, TaggedOutput
from storage.settings import ConfigError

LABELS_A_PAGE = 100
MOST_BYTES = 10 * 2**20
_PICTURES = 9 * 2**20
_SIZES = ((160, 78), (128, 72), (96, 68), (72, 62), (48, 55))
"""Longest side in pixels and JPEG quality, tried in turn until a page's pictures fit."""
_SUSPECTS = 24
_ROW_BYTES, _BARE_ROW_BYTES, _MOST_SPARKS = 1400, 400, 2000
"""What a row of the first page's table takes with its small histogram and without: longer tables have none."""
_FOLDER = Path(__file__).parent


@dataclass
class _Entry:
    """A label on its page: `number` is its place in the order of the report."""

    number: int
    survey: LabelStatistics
    quality: dict[str, Any] | None
    href: str
    histogram: str = ""
    spark: str = ""
    pictures: dict[str, list[tuple[str, str, float]]] = field(default_factory=dict)


def write_report(
    output: TaggedOutput,
    survey: OutputStatistics,
    path: Path,
    dollars_per_hour: float | None = None,
    evaluation: dict[str, Any] | None = None,
) -> list[Path]:
    """Write the report at `path`, and where there are more than a hundred labels `<name>-labels/002.html` and so on.

    Each page stands alone, asks no other host for anything, and has at most 10 MB. `evaluation` is what `sightline
    evaluate --json` printed. Labels stand in the order of how many images were given them. Returns the files.

    Raises `ConfigError` where it cannot be written, or the evaluation is none.
    """
    order = sorted(survey.labels, key=lambda one: (-one.given, one.label))
    qualities = _read_qualities(evaluation)
    folder = path.with_name(f"{path.stem}-labels")
    pages = [order[start : start + LABELS_A_PAGE] for start in range(0, len(order), LABELS_A_PAGE)]
    names = [path.name, *(f"{folder.name}/{number:03d}.html" for number in range(2, len(pages) + 1))]
    entries = [
        _Entry(
            number,
            one,
            qualities.get(one.label),
            f"{'' if number < LABELS_A_PAGE else names[number // LABELS_A_PAGE]}#label-{number + 1}",
        )
        for number, one in enumerate(order)
    ]
    row_bytes = _BARE_ROW_BYTES
    if len(order) <= _MOST_SPARKS:
        row_bytes = _ROW_BYTES
        for entry in entries:
            entry.spark = draw_spark(entry.survey.histogram)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["score"] = _format_score
    environment.filters["share"] = lambda value: "–" if value is None else f"{value:.1%}"
    style, script = (_FOLDER / name for name in ("report.css", "report.js"))
    texts = style.read_text(encoding="utf-8"), script.read_text(encoding="utf-8")
    common = {
        "output": output.uri,
        "style": texts[0],
        "script": texts[1],
        "policy": _make_policy(*texts),
        "version": version("sightline"),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "has_thumbnails": "thumbnail" in output.columns,
    }
    written = []
    try:
        for number, name in enumerate(names):
            shown = entries[number * LABELS_A_PAGE : (number + 1) * LABELS_A_PAGE]
            suspects = (evaluation or {}).get("suspects", [])[:_SUSPECTS] if number == 0 else []
            table = len(order) * row_bytes if number == 0 else 0
            _draw(output, shown, suspects, _PICTURES - table)
            template = environment.get_template("main.html" if number == 0 else "labels.html")
            facts = _list_facts(output, survey, dollars_per_hour, len(order)) if number == 0 else {}
            content = template.render(
                **common,
                **facts,
                entries=shown,
                all=entries,
                suspects=suspects,
                evaluation=evaluation,
                rejects=survey.rejects,
                reasons=output.manifest["reasons"],
                main=f"../{path.name}",
                pages=len(pages),
            )
            target = path if number == 0 else path.parent / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
            written.append(target)
            for entry in shown:  # a page's pictures at a time
                entry.pictures = {}
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from error
    return written


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `sightline evaluate --json` printed. Raises `ConfigError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict) and {"labels", "mean_average_precision", "suspects"} <= value.keys():
            return value
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    raise ConfigError(f"{path} is not what `sightline evaluate --json` prints")


def _read_qualities(evaluation: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    return {one["label"]: one for one in evaluation["labels"]} if evaluation else {}


def _list_facts(
    output: TaggedOutput, survey: OutputStatistics, dollars_per_hour: float | None, labels: int
) -> dict[str, Any]:
    run = output.manifest.get("run", {})
    rate = run.get("images_per_second")
    cost = dollars_per_hour / (rate * 3.6) if dollars_per_hour is not None and rate else None
    return {
        "images": survey.images + output.rejected,
        "tagged": survey.images,
        "rejected": output.rejected,
        "unlabelled": survey.unlabelled,
        "labels": labels,
        "model": output.model,
        "weights": output.weights[:16],
        "run": run,
        "rate": rate,
        "cost": cost,
        "dollars_per_hour": dollars_per_hour,
        "accepted": any(one.accept is not None for one in survey.labels),
    }


def _draw(output: TaggedOutput, entries: list[_Entry], suspects: list[dict[str, Any]], room: int) -> None:
    """Histograms and pictures of a page's labels and suspects, the pictures together in `room` bytes."""
    for entry in entries:
        entry.histogram = draw_histogram(entry.survey)
    uses = Counter[Any](one.place for entry in entries for kind in KINDS for one in entry.survey.examples[kind])
    places = sorted(uses)
    rows = output.take(places, ["key", *(["thumbnail"] if "thumbnail" in output.columns else [])])
    keys = dict(zip(places, rows["key"].to_pylist(), strict=True))
    stored = dict(zip(places, rows["thumbnail"].to_pylist(), strict=True)) if "thumbnail" in rows.column_names else {}
    theirs = _find_pictures(output, suspects) if stored else {}
    pictures = _shrink({**stored, **theirs}, uses + Counter(theirs.keys()), room)
    for entry in entries:
        entry.pictures = {
            kind: [(keys[one.place], pictures.get(one.place, ""), one.score) for one in entry.survey.examples[kind]]
            for kind in KINDS
        }
    for suspect in suspects:
        suspect["picture"] = pictures.get(suspect["id"], "")


def _find_pictures(output: TaggedOutput, suspects: list[dict[str, Any]]) -> dict[Any, bytes]:
    """The thumbnails of images that are known by their id."""
    wanted = pa.array([one["id"] for one in suspects], pa.string())
    places, first = [], 0
    for batch in output.batches([ID], rows=65_536) if suspects else ():
        found = pc.is_in(batch[ID], value_set=wanted).to_numpy(zero_copy_only=False)
        places += (first + np.flatnonzero(found)).tolist()
        first += len(batch)
    rows = output.take(places, [ID, "thumbnail"])
    return dict(zip(rows[ID].to_pylist(), rows["thumbnail"].to_pylist(), strict=True))


def _shrink(stored: dict[Any, bytes], uses: Counter[Any], room: int) -> dict[Any, str]:
    """JPEGs as data URIs, of the largest size at which all of their uses fit; none if they do at no size."""
    made: dict[Any, str] = {}
    for side, quality in _SIZES:
        made = {place: _encode(data, side, quality) for place, data in stored.items() if data}
        if sum(uses[place] * len(text) for place, text in made.items()) <= room:
            return made
    return {}


def _encode(data: bytes, side: int, quality: int) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.thumbnail((side, side))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    except OSError:  # not one of ours
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _make_policy(style: str, script: str) -> str:
    """Nothing from elsewhere, and no code but this page's own, whatever a label or a key is called."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _format_score(value: float) -> str:
    return "under 0.001" if 0 <= value < 0.001 else f"{value:.3f}"
