"""`docs/inputs.md`, composed from the cases. `python -m tests.support.input_cases.page` writes it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from tests.support.input_cases import hub, images, labels, lists, parquet, places, tars, web

SECTIONS: tuple[ModuleType, ...] = (images, tars, parquet, lists, web, places, hub, labels)
"""The modules with the cases. Each has `TITLE`, `TEXT` and `CASES`."""

PAGE = Path(__file__).parents[3] / "docs" / "inputs.md"

_INTRODUCTION = """# Inputs, and what a run does with each

A row that cannot be tagged is in `rejects/` with a reason. A file that is no input is skipped, and the summary counts
it. A configuration that does not fit the input is refused before any work, with exit code 2.

`tests/quick/pipelines/test_input_cases.py` builds each of these inputs, plans, reads and decodes it, and compares this
page.
"""


def write_page() -> str:
    """Return the text of the page."""
    parts = [_INTRODUCTION]
    for section in SECTIONS:
        lines = [f"## {section.TITLE}", "", section.TEXT.rstrip(), "", "| input | outcome | rule |", "|---|---|---|"]
        for case in section.CASES:
            cells = (text.replace("|", "\\|") for text in (case.kind, case.outcome(), case.rule))
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
