"""Datasets of which the hub converted only a part to Parquet: a run says so, since the rest is in no row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipelines.inputs.rows import Input
from storage.schemes import scheme_of
from storage.store import show


def note_partial(inputs: Iterable[Input], notes: list[str]) -> Iterator[Input]:
    """Yield all inputs. After the last one, add a note if there are some of splits that are not whole."""
    first, count, last = "", 0, ""
    for one in inputs:
        if scheme_of(one.uri) == "hf" and one.uri != last and _is_partial(one.uri):
            first, count = first or one.uri, count + 1
            last = one.uri
        yield one
    if count:
        notes.append(
            f"{count:,} files, such as {show(first)}, are of splits of which the hub converted only the first "
            "gigabytes to Parquet (partial-...): all images are only in the dataset's own files, at revision main"
        )


def _is_partial(uri: str) -> bool:
    from storage.hub.names import is_partial

    return is_partial(uri)
