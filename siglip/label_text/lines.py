"""Lines of a text file of labels, and signs that they are more than labels."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORDNET = re.compile(r"n\d{8}($|[\s:,]+\S)")
_KNOWLEDGE = re.compile(r"/[mg]/\w+")
_NUMBERED = re.compile(r"[(\[<]?\d+\s*[])>:.,;=|\s]\s*\S")
_NUMBER_AFTER = re.compile(r".*\S\s*[:,;=|]\s*-?\d+$")
_COUNTED = re.compile(r"(?P<words>.*[^\d\s_(\[-])[\s_(\[-]+(?P<number>\d+)[)\]]?|(?P<index>\d+)[-_](?P<rest>.+)")
_BULLET = re.compile(r"[-*+•·‣▪–—]\s*\S")
_KEY = re.compile(
    r"(names?|labels?|class(es)?|templates?|threshold|top_k|groups?|nc|id|display_name|path|train|val)\s*:",
    re.IGNORECASE,
)
_ITEM = re.compile(r"[-*+•·‣▪–—]\s")
_COMMENT = re.compile(r"(//|/\*|<!--|;\s|%\s|--\s)")
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»", "„": "“"}
_HEADINGS = {
    *("label", "labels", "name", "names", "class", "classes", "category", "categories", "tag", "tags"),
    *("class name", "class names", "label name", "label names", "category name", "display name"),
}
_NUMBER_HEADINGS = {"id", "ids", "index", "idx", "class id", "label id", "category id", "number", "no", "#", ""}


def find_doubt(lines: Sequence[str]) -> str:
    """Why the lines of a text file may be more than labels: a clause about them. Empty if nothing speaks for that.

    Lines are without spaces at their ends, and none is empty. A doubt is raised when it holds for all lines, or for a
    line that hardly is a label. It cannot find everything: a list with an index in some of its lines passes.
    """
    if not lines:
        return ""
    return _find_odd_line(lines) or _find_pattern(lines)


def _find_odd_line(lines: Sequence[str]) -> str:
    """A sign of another format in single lines."""
    fields = [re.sub(r"[_\s]+", " ", field).strip().lower() for field in re.split(r"[,;|]", lines[0])]
    if len(lines) > 1 and all(field in _HEADINGS | _NUMBER_HEADINGS for field in fields) and _HEADINGS & {*fields}:
        return f"its first line {lines[0][:40]!r} looks like the heading of a column"
    for line in lines:
        if line in ("---", "...") or line.startswith("%YAML"):
            return f"the line {line[:40]!r} begins or ends a YAML document"
        if re.match(r"item\s*\{", line) or line in ("{", "}", "[", "]"):
            return f"the line {line[:40]!r} looks like a label map of TensorFlow or like JSON"
        if _KEY.match(line):
            return f"the line {line[:40]!r} looks like a key and its value, as in YAML"
        if _ITEM.match(line):
            return f"the line {line[:40]!r} begins with a dash or another bullet, as in a list"
        if _COMMENT.match(line):
            return f"the line {line[:40]!r} looks like a comment, and comments begin with `# ` here"
        if re.search(r"\s#+(\s|$)", line):
            return f"the line {line[:40]!r} looks like a label and a comment, and comments have lines of their own here"
        if len(line) > 1 and _QUOTES.get(line[0]) == line.rstrip(",;")[-1:] and len(line.rstrip(",;")) > 1:
            return f"the line {line[:40]!r} is in quotes"
    return ""


def _find_pattern(lines: Sequence[str]) -> str:
    """A sign of another format that all lines have."""
    if all(_NUMBERED.match(line) for line in lines) and not all(re.fullmatch(r"[\d\W_]+", line) for line in lines):
        return "its lines begin with numbers"
    if lines[0][0] in "{[":
        return "it begins like JSON"
    if all(_WORDNET.match(line) for line in lines):
        return "its lines begin with WordNet's numbers"
    if all(_KNOWLEDGE.match(line) for line in lines):
        return "its lines begin with identifiers of Open Images"
    for ends, what in ((",", "a comma"), (";", "a semicolon"), (":", "a colon")):
        if all(line.endswith(ends) for line in lines[:-1]) and len(lines) > 1:
            return f"its lines end with {what}"
    if all(_NUMBER_AFTER.match(line) for line in lines) and not all(re.fullmatch(r"[\d\W_]+", line) for line in lines):
        return "its lines end with numbers"
    if _are_counted(lines):
        return "its lines contain numbers that count them"
    for mark, what in ((",", "commas"), (";", "semicolons"), ("|", "vertical bars")):
        if all(mark in line for line in lines):
            return f"its only line contains {what}" if len(lines) == 1 else f"all its lines contain {what}"
    if all(_BULLET.match(line) for line in lines):
        return "its lines begin with a dash or another bullet, as in a list"
    return ""


def _are_counted(lines: Sequence[str]) -> bool:
    """Whether the lines are `cat 0`, `dog 1` or `0-cat`, `1-dog`: other words, and numbers from 0 or 1.

    `floor 1`, `floor 2` are labels.
    """
    found = [match for line in lines if (match := _COUNTED.fullmatch(line))]
    words = {match["words"] or match["rest"] for match in found}
    numbers = [int(match["number"] or match["index"]) for match in found]
    return len(words) == len(lines) > 1 and numbers in ([*range(len(lines))], [*range(1, len(lines) + 1)])
