"""The index of an output after a run: `index: true` of a job's configuration, and the line that a build ends with.

The job itself knows nothing of the index, because `pipelines` does not import `curation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipelines.config import JobConfig
from storage.settings import ConfigError
from storage.store import StoreError

if TYPE_CHECKING:
    from curation.index.build import Built


def check_index(job: JobConfig) -> None:
    """Raise `ConfigError` before a run if its output is to have an index and LanceDB is not installed."""
    if job.index:
        from curation.index.table import import_lancedb

        try:
            import_lancedb()
        except ConfigError as error:
            raise ConfigError(f"index: {error}") from None


def index_output(
    job: JobConfig, manifest: dict[str, Any], new_shards: int, tell: Callable[[str], None] = lambda line: None
) -> Built | None:
    """Bring the index up to the output after a run, if the job asks for it. Returns what was done, None for nothing.

    Nothing is done while planned shards are not committed, which `tell` is told; nor if the index has all images. A
    build that failed after an earlier run is made up for. Raises `StoreError` for a build that fails: what the run has
    committed stays.
    """
    if not job.index or not manifest.get("rows_tagged"):
        return None
    if manifest.get("planned_shards") != manifest.get("shards"):
        tell("the index is brought up to the output when all of its shards are committed")
        return None
    from curation.index.build import build_index
    from curation.index.state import list_shards, read_index_state
    from curation.tagged_output import open_output

    try:
        output = open_output(job.output)
        state = read_index_state(output, earlier=True)
        if not new_shards and state is not None and state.list_shards() == list_shards(output):
            return None
        return build_index(output, tell)
    except (ConfigError, StoreError) as error:
        raise StoreError(
            f"the index was not brought up to the output: {error}; all images are committed: run `sightline index "
            f"{job.output}`, or the job again"
        ) from error


def describe_built(built: Built) -> str:
    """Return the line that ends a build: how many images are in the index, and what searches find."""
    parts = [f"{built.rows:,} images in the index, {built.added:,} added"]
    if built.removed:
        parts.append(f"{built.removed:,} replaced or removed")
    if built.trained:
        parts.append(f"trained, because {built.trained}")
    parts.append(
        f"searches find {built.recall_images:.1%} of the ten nearest images of an image, and {built.recall_texts:.1%} "
        "of a text"
    )
    return "; ".join(parts)
