"""Runs Prometheus' promtool on series that are written by hand or scraped from an exporter."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import require
from tests.k8s.support.schemas import ROOT

RULES = ROOT / "k8s/alerts.yaml"
_SAMPLE = re.compile(r"^(\w+(?:\{.*\})?) (\S+)", re.MULTILINE)
_SELECTOR = re.compile(r"\b(ray_sightline_\w+)\{([^}]*)\}")


def run_promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run promtool, and return the ended process."""
    require("promtool", None if shutil.which("promtool") else "apt-get install prometheus")
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=120)


def evaluate(folder: Path, series: Mapping[str, str], queries: Iterable[Mapping[str, Any]]) -> None:
    """Run `promql_expr_test`s of promtool on the alert rules and on series with one sample per minute."""
    test: dict[str, Any] = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": list(queries),
            }
        ],
    }
    path = folder / "promtool-test.yaml"
    path.write_text(yaml.safe_dump(test))
    done = run_promtool("test", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def read_dashboard() -> list[str]:
    """Return the queries of the Grafana dashboard, with values for its variables."""
    dashboard = json.loads((ROOT / "serve/grafana/dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert queries
    return [re.sub(r"\$__rate_interval", "5m", query).replace("$application", "sightline") for query in queries]


def make_series(scrapes: Sequence[str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """Return series with one sample for each scrape of an exporter's text."""
    found: dict[str, list[str]] = {}
    for number, text in enumerate(scrapes):
        for name, value in _SAMPLE.findall(text):
            if name.startswith(prefixes):
                values = found.setdefault(name, [])
                values[number:] = ["_"] * (number - len(values)) + [value]
    return {name: " ".join([*values, *["_"] * (len(scrapes) - len(values))]) for name, values in found.items()}


def check_queries(folder: Path, scrapes: Sequence[str], absent: str = "") -> None:
    """Check that the dashboard's queries have results on the scraped metrics, and that the alerts' labels exist.

    `absent` is a metric without any sample, whose panel is empty.
    """
    series = make_series(scrapes, ("ray_sightline_", "ray_serve_"))
    end = f"{len(scrapes) - 1}m"
    one = [{"labels": "{}", "value": 1}]
    queries = [query for query in read_dashboard() if not absent or absent not in query]
    evaluate(
        folder,
        series,
        [{"expr": f"count({query}) > bool 0", "eval_time": end, "exp_samples": one} for query in queries],
    )
    labels: dict[str, set[str]] = {}
    for name in series:
        metric, _, rest = name.partition("{")
        labels.setdefault(metric, set()).update(re.findall(r'(\w+)="', rest))
    for metric, matchers in _SELECTOR.findall(RULES.read_text().replace("\n", " ")):
        wanted = set(re.findall(r"(\w+)\s*[=!]", matchers))
        assert wanted <= labels.get(metric, set()), f"{metric} has no {wanted - labels.get(metric, set())}"
