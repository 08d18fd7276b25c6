"""The line about what is no input, of `sightline tag` and `sightline plan`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.markup import escape

from sightline.exits import out

_SUFFIXES, _NAME_CHARS = 5, 40
"""How many suffixes of skipped files are told, and about how many characters of a name."""


def print_skipped(skipped: Counter[str], examples: Mapping[str, Sequence[str]]) -> None:
    """Print the files and tar members that are no inputs, by kind, each with the end of one name."""
    if not skipped:
        return
    # A folder of photos has dozens of other suffixes. What says more than a suffix is always shown.
    ranked = skipped.most_common()
    suffixes = [kind for kind, _ in ranked if kind.startswith(".")]
    shown = [pair for pair in ranked if pair[0] not in suffixes[_SUFFIXES:]]
    kinds = [
        f"{count:,} {kind}" + (f" ({shorten_name(examples[kind][0])})" if examples.get(kind) else "")
        for kind, count in shown
    ]
    if len(shown) < len(ranked):
        rest = skipped.total() - sum(count for _, count in shown)
        kinds.append(f"{rest:,} files with {len(ranked) - len(shown)} other suffixes")
    heif = any(f".{suffix} files" in skipped for suffix in ("heic", "heif"))
    advice = "; install sightline[heic] to read HEIC" if heif else ""
    out.print(escape(f"skipped {skipped.total():,}: {', '.join(kinds)}{advice}"), highlight=False)


def shorten_name(name: str) -> str:
    """Return the last folders and the name of a path, about 40 characters of it."""
    if len(name) <= _NAME_CHARS:
        return name
    end = name[-_NAME_CHARS:]
    _, slash, whole = end.partition("/")
    return f".../{whole}" if slash and whole else f"...{end}"
