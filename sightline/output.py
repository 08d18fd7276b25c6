"""The Python API's view of a finished output: what the command line does with it, as methods."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import curation.tagged_output
from siglip.checkpoints.files import CheckpointError
from siglip.labels import LabelError
from storage.settings import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from curation.dedup.result import Deduplicated
    from curation.export.exported import Exported
    from curation.index.build import Built
    from curation.search.search import Results


class TaggedOutput(curation.tagged_output.TaggedOutput):
    """A finished output, read-only. `sightline.open_output` makes it.

    What a later run writes is not seen: open the output again to see it.
    """

    def to_pandas(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read all tagged rows into a data frame, with the columns and in the order of `to_arrow`, which see."""
        return self.to_arrow(columns).to_pandas()

    def search(
        self,
        text: str | Sequence[str] = (),
        *,
        without: str | Sequence[str] = (),
        image: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
        like: str | Sequence[str] = (),
        where: str | None = None,
        label: str | Sequence[str] = (),
        top: int = 20,
        cutoff: Literal["auto", "none"] = "auto",
        fold: bool = False,
        index: bool = False,
    ) -> Results:
        """Search for images, as `sightline search` does, which explains the parameters; `without` is its `--not`.

        Returns the results: `table` has a row for each one, best first. Raises `ConfigError`, in one line, for a query
        that is not possible, and `storage.store.StoreError` when the output cannot be read.
        """
        from curation.index.search import search_index
        from curation.search.query import Query
        from curation.search.search import search_output

        images = [Path(one) for one in _list(image)]
        query = Query(_list(text), _list(without), images, _list(like), where, _list(label), top, cutoff, fold)
        try:
            return search_index(self, query) if index else search_output(self, query)
        except (CheckpointError, LabelError) as error:
            raise ConfigError(str(error)) from error

    def index(self) -> Built:
        """Make or update the output's index, as `sightline index` does, which explains it.

        `search(index=True)` uses it. Returns what was done. Raises `ConfigError`, in one line, and
        `storage.store.StoreError`.
        """
        from curation.index.build import build_index

        return build_index(self)

    def dedup(
        self,
        to: str | PathLike[str],
        *,
        against: str | PathLike[str] | None = None,
        prefer: str = "largest",
        copy: float = 0.85,
        similar: float = 0.95,
    ) -> Deduplicated:
        """Find the copies among the images, as `sightline dedup` does, which explains the parameters.

        Returns the counts. The groups are in the folder `to`, in `groups.parquet`, and the ids of the images to keep in
        `keep.txt`. Raises `ConfigError`, in one line, and `storage.store.StoreError`.
        """
        from curation.dedup.result import dedup_output

        other = None if against is None else open_output(against)
        return dedup_output(self, Path(to), other, prefer=prefer, copy=copy, similar=similar)

    def export(
        self,
        target: Literal["fiftyone", "hf", "imagefolder", "webdataset", "lancedb", "qdrant", "coco", "xmp"],
        destination: str | PathLike[str],
        *,
        where: str | None = None,
        keep: str | PathLike[str] | None = None,
        images: str | PathLike[str] | None = None,
        thumbnails: bool = False,
    ) -> Exported:
        """Write the images for another tool, as `sightline export --to` does, which explains the parameters.

        Returns what was written and left out. Images without a file are left out and no error is raised: see
        `without_file` of what is returned. Raises `ConfigError`, in one line, for an export that is not possible, and
        `storage.store.StoreError` when the output, an image or a server cannot be read; then there is no destination.
        """
        from curation.export.export import export_output

        return export_output(self, target, destination, where=where, keep=keep, images=images, thumbnails=thumbnails)


def open_output(uri: str | PathLike[str]) -> TaggedOutput:
    """Open the finished output at a folder or an s3://, gs:// or az:// prefix.

    Raises `ConfigError` when there is no output, when planned shards are not committed, and when its metadata files are
    damaged; `storage.store.Unreachable` when the store does not answer.
    """
    opened = curation.tagged_output.open_output(str(uri))
    return TaggedOutput(opened.output, opened.ledger, opened.manifest, opened.fingerprint, opened.table)


def _list(one_or_more: Any) -> list[Any]:
    return [one_or_more] if isinstance(one_or_more, (str, PathLike)) else list(one_or_more)
