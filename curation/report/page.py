"""The report: one HTML file for up to a hundred labels, and more files beside it for the other labels."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from curation.report.charts import draw_histogram, draw_sparkline
from curation.report.pictures import encode_pictures, read_keys, read_thumbnails
from curation.report.statistics import KINDS, LabelStatistics, OutputStatistics
from curation.tagged_output import TaggedOutput
from storage.settings import ConfigError

LABELS_PER_PAGE = 100
MAX_PAGE_BYTES = 10 * 2**20
_MAX_PICTURE_BYTES = 9 * 2**20
"""Of `MAX_PAGE_BYTES`, the bytes for pictures together with the table of labels. The rest is for texts and charts."""
_SUSPECTS = 24
_ROW_BYTES, _BARE_ROW_BYTES, _MAX_SPARKLINES = 1400, 400, 2000
"""Bytes of a row of the first page's table with and without its small histogram. Longer tables have no histograms."""
_FOLDER = Path(__file__).parent


@dataclass
class _LabelSection:
    """A label's section of a page. `number` counts from 0 in the order of the report; `quality` is its evaluation."""

    number: int
    statistics: LabelStatistics
    quality: dict[str, Any] | None
    href: str
    histogram: str = ""
    sparkline: str = ""
    pictures: dict[str, list[tuple[str, str, float]]] = field(default_factory=dict)


def write_report(
    output: TaggedOutput,
    statistics: OutputStatistics,
    path: Path,
    dollars_per_hour: float | None = None,
    evaluation: dict[str, Any] | None = None,
) -> list[Path]:
    """Write the report to `path`, and labels after the first hundred to `<name>-labels/002.html` and so on.

    Each page is self-contained, loads nothing from the network and has at most `MAX_PAGE_BYTES`. Labels are sorted by
    the number of images that reach their threshold, largest first. `evaluation` is what `sightline evaluate --json`
    printed. `dollars_per_hour` is the price of the cluster; with it the page shows the cost of 1,000 images.

    Returns the written files. Raises `ConfigError` when a file cannot be written.
    """
    sections = _make_sections(statistics, path, evaluation)
    row_bytes = _ROW_BYTES if len(sections) <= _MAX_SPARKLINES else _BARE_ROW_BYTES
    if row_bytes == _ROW_BYTES:
        for section in sections:
            section.sparkline = draw_sparkline(section.statistics.histogram)
    pages = -(-len(sections) // LABELS_PER_PAGE)
    environment = _make_environment()
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    common = {
        "output": output.uri,
        "style": style,
        "script": script,
        "policy": _make_policy(style, script),
        "version": version("sightline"),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "has_thumbnails": "thumbnail" in output.columns,
        "all": sections,
        "evaluation": evaluation,
        "rejects": statistics.rejects,
        "reasons": output.manifest["reasons"],
        "main": f"../{path.name}",
        "pages": pages,
    }
    written = []
    try:
        for page in range(pages):
            shown = sections[page * LABELS_PER_PAGE : (page + 1) * LABELS_PER_PAGE]
            if page == 0:
                target, template = path, environment.get_template("main.html")
                facts = _collect_facts(output, statistics, dollars_per_hour)
                suspects = (evaluation or {}).get("suspects", [])[:_SUSPECTS]
                table_bytes = len(sections) * row_bytes
            else:
                target, template = path.parent / _name_page(path, page), environment.get_template("labels.html")
                facts, suspects, table_bytes = {}, [], 0
            _add_charts_and_pictures(output, shown, suspects, _MAX_PICTURE_BYTES - table_bytes)
            content = template.render(**common, **facts, sections=shown, suspects=suspects)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
            written.append(target)
            for section in shown:  # memory holds the pictures of one page
                section.pictures = {}
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from error
    return written


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read what `sightline evaluate --json` printed. Raises `ConfigError` when the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict) and {"labels", "mean_average_precision", "suspects"} <= value.keys():
            return value
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    raise ConfigError(f"{path} is not what `sightline evaluate --json` prints")


def _make_sections(statistics: OutputStatistics, path: Path, evaluation: dict[str, Any] | None) -> list[_LabelSection]:
    qualities = {quality["label"]: quality for quality in evaluation["labels"]} if evaluation else {}
    sections = []
    for number, label in enumerate(sorted(statistics.labels, key=lambda label: (-label.predicted, label.label))):
        page = number // LABELS_PER_PAGE
        href = f"{_name_page(path, page) if page else ''}#label-{number + 1}"
        sections.append(_LabelSection(number, label, qualities.get(label.label), href))
    return sections


def _name_page(path: Path, page: int) -> str:
    """The path of a page after the first, relative to the first page's folder. `page` counts from 0."""
    return f"{path.stem}-labels/{page + 1:03d}.html"


def _make_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["score"] = _format_score
    environment.filters["share"] = lambda value: "–" if value is None else f"{value:.1%}"
    return environment


def _collect_facts(
    output: TaggedOutput, statistics: OutputStatistics, dollars_per_hour: float | None
) -> dict[str, Any]:
    """The first page's totals."""
    run = output.manifest.get("run", {})
    rate = run.get("images_per_second")
    cost = dollars_per_hour / (rate * 3.6) if dollars_per_hour is not None and rate else None
    return {
        "images": statistics.images + output.rejected,
        "tagged": statistics.images,
        "rejected": output.rejected,
        "unlabelled": statistics.unlabelled,
        "labels": len(statistics.labels),
        "model": output.model,
        "weights": output.weights[:16],
        "run": run,
        "rate": rate,
        "cost": cost,
        "dollars_per_hour": dollars_per_hour,
        "accepted": any(label.accept is not None for label in statistics.labels),
    }


def _add_charts_and_pictures(
    output: TaggedOutput, sections: list[_LabelSection], suspects: list[dict[str, Any]], max_bytes: int
) -> None:
    """Add the charts of a page's labels, and the pictures of its labels and suspects, together in `max_bytes`."""
    for section in sections:
        section.histogram = draw_histogram(section.statistics)
    uses = Counter[Any](
        example.position for section in sections for kind in KINDS for example in section.statistics.examples[kind]
    )
    keys, thumbnails = read_keys(output, uses)
    by_id = read_thumbnails(output, [suspect["id"] for suspect in suspects]) if thumbnails else {}
    pictures = encode_pictures({**thumbnails, **by_id}, uses + Counter(by_id.keys()), max_bytes)
    for section in sections:
        section.pictures = {
            kind: [
                (keys[example.position], pictures.get(example.position, ""), example.score)
                for example in section.statistics.examples[kind]
            ]
            for kind in KINDS
        }
    for suspect in suspects:
        suspect["picture"] = pictures.get(suspect["id"], "")


def _make_policy(style: str, script: str) -> str:
    """A Content-Security-Policy that allows this page's own style and script only, whatever a label or key contains."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _format_score(value: float) -> str:
    return "under 0.001" if 0 <= value < 0.001 else f"{value:.3f}"
