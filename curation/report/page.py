"""The report: one HTML file for up to a hundred labels, and more files beside it for the other labels."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from curation.browse.address import make_address
from curation.report.charts import draw_histogram, draw_sparkline
from curation.report.curves import count_known, draw_thresholds, draw_trade
from curation.report.figures import STAR, all_judge_fairly, describe_band, judges_fairly, show_estimate
from curation.report.pictures import encode_pictures, find_positions, read_images
from curation.report.statistics import KINDS, LabelStatistics, OutputStatistics
from curation.report.steps import Step
from curation.tagged_output import TaggedOutput
from siglip.checkpoints.files import shorten_identity
from storage.settings import ConfigError

LABELS_PER_PAGE = 100
MAX_PAGE_BYTES = 10 * 2**20
_SUSPECTS_OF_A_KIND = 8
_MAX_SPARKLINES = 2000
"""Longer tables of labels have no small histograms."""
_KEY_LENGTH = 30
"""A picture's key is cut in the middle to this many characters. Its title has the whole key."""
_IMAGE_BYTES = 200
"""Bytes of a picture's HTML beside its data."""
_FOLDER = Path(__file__).parent


@dataclass
class _LabelSection:
    """A label's section of a page. `number` counts from 0 in the order of the report; `quality` is its evaluation."""

    number: int
    statistics: LabelStatistics
    quality: dict[str, Any] | None
    audit: str
    href: str
    histogram: str = ""
    thresholds: str = ""
    trade: str = ""
    sparkline: str = ""


@dataclass(frozen=True)
class Findings:
    """What a report shows beside an output's own statistics.

    `evaluation` is what `sightline evaluate --json` printed, `steps` what was done for the output, and `audits` the
    sentence of each audited label by its name.
    """

    evaluation: dict[str, Any] | None = None
    steps: Sequence[Step] = ()
    audits: dict[str, str] = field(default_factory=dict)


def write_report(
    output: TaggedOutput,
    statistics: OutputStatistics,
    path: Path,
    dollars_per_hour: float | None = None,
    findings: Findings = Findings(),
) -> list[Path]:
    """Write the report to `path`, and labels after the first hundred to `<name>-labels/002.html` and so on.

    Each page is self-contained, loads nothing from the network and has at most `MAX_PAGE_BYTES`, unless its texts alone
    have more. Labels are sorted by the number of images that reach their threshold, largest first. `dollars_per_hour`
    is the price of the cluster; with it the page shows the cost of 1,000 images.

    Returns the written files. Raises `ConfigError` when a file cannot be written.
    """
    evaluation = findings.evaluation
    sections = _make_sections(statistics, path, findings)
    if len(sections) <= _MAX_SPARKLINES:
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
        "star": STAR,
        "independent": evaluation is None or all_judge_fairly(evaluation),
        "bands_fair": evaluation is None or all_judge_fairly(evaluation, "accepted", "review"),
        "top_k": output.labels.top_k,
        "rejects": statistics.rejects,
        "reasons": output.manifest["reasons"],
        "main": f"../{path.name}",
        "pages": pages,
        "kinds": KINDS,
    }
    written = []
    try:
        for page in range(pages):
            shown = sections[page * LABELS_PER_PAGE : (page + 1) * LABELS_PER_PAGE]
            if page == 0:
                target, template = path, environment.get_template("main.html")
                facts = _collect_facts(output, statistics, dollars_per_hour, findings)
            else:
                target, template = path.parent / _name_page(path, page), environment.get_template("labels.html")
                facts = {"suspects": [], "confusions": []}
            _draw_charts(shown)
            uses = _count_uses(shown, facts)
            keys, thumbnails = read_images(output, uses)
            values = {**common, **facts, "sections": shown, "keys": keys}
            bare = template.render(values, pictures={})  # what is left of the page's bytes is for pictures
            room = MAX_PAGE_BYTES - len(bare.encode()) - _IMAGE_BYTES * uses.total()
            content = template.render(values, pictures=encode_pictures(thumbnails, uses, room))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
            written.append(target)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from error
    return written


def _make_sections(statistics: OutputStatistics, path: Path, findings: Findings) -> list[_LabelSection]:
    qualities = {one["label"]: one for one in findings.evaluation["labels"]} if findings.evaluation else {}
    sections = []
    for number, label in enumerate(sorted(statistics.labels, key=lambda label: (-label.predicted, label.label))):
        page = number // LABELS_PER_PAGE
        href = f"{_name_page(path, page) if page else ''}#label-{number + 1}"
        quality = qualities.get(label.label)
        audit = findings.audits.get(label.label, "").removeprefix(f"{label.label}: ")
        sections.append(_LabelSection(number, label, quality, audit, href))
    return sections


def _name_page(path: Path, page: int) -> str:
    """The path of a page after the first, relative to the first page's folder. `page` counts from 0."""
    return f"{path.stem}-labels/{page + 1:03d}.html"


def _make_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["score"] = lambda value: "under 0.001" if 0 <= value < 0.001 else f"{value:.3f}"
    environment.filters["share"] = lambda value: f"{value:.1%}"
    environment.filters["estimate"] = show_estimate
    environment.filters["middle"] = _cut_middle
    environment.filters["known"] = count_known
    environment.filters["fair"] = judges_fairly
    environment.filters["browse"] = lambda label: make_address(label=label)
    return environment


def _collect_facts(
    output: TaggedOutput, statistics: OutputStatistics, dollars_per_hour: float | None, findings: Findings
) -> dict[str, Any]:
    """What only the first page shows: totals, steps, confusions and suspects."""
    run = output.manifest.get("run", {})
    rate = run.get("images_per_second")
    cost = dollars_per_hour / (rate * 3.6) if dollars_per_hour is not None and rate else None
    suspects = _choose_suspects(output, findings.evaluation)
    return {
        "images": statistics.images + output.rejected,
        "tagged": statistics.images,
        "rejected": output.rejected,
        "unlabelled": statistics.unlabelled,
        "labels": len(statistics.labels),
        "model": output.model,
        "weights": shorten_identity(output.weights),
        "run": run,
        "rate": rate,
        "cost": cost,
        "dollars_per_hour": dollars_per_hour,
        "bands": _describe_bands(statistics, findings.evaluation),
        "steps": findings.steps,
        "audits": findings.audits,
        "suspects": suspects,
        "confusions": (findings.evaluation or {}).get("confusions", []),
    }


def _describe_bands(statistics: OutputStatistics, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The headline: the bands with their numbers of labels and images, and how many of the labels are right."""
    answered = {one["label"] for one in evaluation["labels"]} if evaluation else set()
    described = []
    for name, images in (("accepted", statistics.accepted), ("review", statistics.review)):
        of_labels = [(one.label, getattr(one, name)) for one in statistics.labels]
        written = sum(count for _, count in of_labels)
        having = [label for label, count in of_labels if count]
        right = describe_band(
            evaluation and evaluation[name],
            written,
            sum(label in answered for label in having),
            len(having),
            evaluation is None or all_judge_fairly(evaluation, name),
        )
        described.append({"name": name, "written": written, "images": images, "right": right})
    return described


def _choose_suspects(output: TaggedOutput, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The first suspects of each kind, each with its position in the output, or None if it is not there."""
    chosen: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for suspect in (evaluation or {}).get("suspects", []):
        counts[suspect["kind"]] += 1
        if counts[suspect["kind"]] <= _SUSPECTS_OF_A_KIND:
            chosen.append(suspect)
    positions = find_positions(output, [suspect["id"] for suspect in chosen])
    return [{**suspect, "position": positions.get(suspect["id"])} for suspect in chosen]


def _draw_charts(sections: Sequence[_LabelSection]) -> None:
    for section in sections:
        section.histogram = draw_histogram(section.statistics)
        if section.quality:
            section.thresholds = draw_thresholds(section.statistics, section.quality["curve"])
            section.trade = draw_trade(section.statistics, section.quality["curve"])


def _count_uses(sections: Sequence[_LabelSection], facts: dict[str, Any]) -> Counter[int]:
    """How often a page shows each image, by its position."""
    uses = Counter(
        example.position for section in sections for kind in KINDS for example in section.statistics.examples[kind]
    )
    uses.update(position for pair in facts["confusions"] for position in pair["examples"])
    uses.update(suspect["position"] for suspect in facts["suspects"] if suspect["position"] is not None)
    return uses


def _cut_middle(text: str, length: int = _KEY_LENGTH) -> str:
    """The text with at most `length` characters: the beginning and the end, which tell keys apart, with … between."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def _make_policy(style: str, script: str) -> str:
    """A Content-Security-Policy that allows this page's own style and script only, whatever a label or key contains."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
