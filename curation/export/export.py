"""Export: hand the rows of a finished output on to another tool, in that tool's format."""

from __future__ import annotations

import os
from importlib import import_module
from os import PathLike

from curation.export.destination import check_destination, find_partial, open_new
from curation.export.exported import Exported
from curation.export.images import Images
from curation.export.job import Job, Progress, Target
from curation.export.selection import Selection
from curation.tagged_output import ID, INPUT_ID, TaggedOutput
from storage.settings import ConfigError
from storage.store import StoreOptions

TARGETS = ("fiftyone", "hf", "imagefolder", "webdataset", "lancedb", "qdrant", "coco", "xmp")
"""The names of the targets, each a module in `curation.export.targets`."""


def export_output(
    output: TaggedOutput,
    target: str,
    destination: str | PathLike[str],
    *,
    where: str | None = None,
    keep: str | PathLike[str] | None = None,
    images: str | PathLike[str] | None = None,
    thumbnails: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the tagged images of an output for another tool. Returns what was written and what was left out.

    `target` is one of `TARGETS`. `destination` is a new or an empty folder (coco: a new file; qdrant: also the URL of a
    collection on a server). `where` is a condition in SQL: see `curation.where.Where`. `keep` is a file that lists keys
    or ids: see `curation.export.selection`. `images` is a folder that holds the image files by key; others are read
    where they were tagged, or with `thumbnails` written as their thumbnails: see `curation.export.images`.

    Memory is bounded by a batch of rows, except for what the module of the target says. Raises `ConfigError`, in one
    line, and `StoreError` if the output, an image or a server cannot be read now; then there is no destination.
    """
    destination = os.fspath(destination)
    if target not in TARGETS:
        raise ConfigError(f"--to {target}: the targets are {', '.join(TARGETS)}")
    module = import_module(f"curation.export.targets.{target}")
    kind: Target = module.TARGET
    if kind.images == "none" and (images is not None or thumbnails):
        raise ConfigError(f"--to {target} takes no images: leave out --images and --thumbnails")
    if thumbnails and "thumbnail" not in output.columns:
        raise ConfigError(f"{output.uri} has no thumbnails: tag with `thumbnails: true`, or leave out --thumbnails")
    remote = kind.remote(destination)
    path = None if remote else check_destination(destination, folder=kind.folder)
    reader = None
    if kind.images == "needed" or images is not None or thumbnails:
        reader = Images(None if images is None else os.fspath(images), thumbnails, StoreOptions.from_environment())
    try:
        notices = kind.prepare(output, destination, reader is not None)
        if path is not None:
            notices += [f"{one} was left behind by an export that was killed: remove it" for one in find_partial(path)]
        if ID in output.columns:
            if INPUT_ID in output.columns:
                raise ConfigError(
                    f"{output.uri} has columns id and input_id of its input, and an export needs both names: tag into "
                    "a new output with another name for one, as in input.parquet.columns: {id: original_id}"
                )
            notices.append("the output's own column id is called input_id: id identifies the row in the output")
        job = Job(output, Selection(output, where, keep), reader, progress)
        if path is None:
            kind.write(job, destination)
            _check(job)
        else:
            with open_new(path, folder=kind.folder) as temporary:
                kind.write(job, str(temporary))
                _check(job)
    finally:
        if reader is not None:
            reader.close()
    return Exported(
        destination if path is None else str(path),
        job.exported,
        job.selection.without_keep,
        job.selection.without_where,
        job.without_file,
        output.rejected,
        tuple(job.missing),
        (*notices, *job.selection.notices, *job.notices, *(reader.describe() if reader is not None else ())),
    )


def _check(job: Job) -> None:
    """Raise `ConfigError` if nothing was exported, so that there is no destination."""
    if job.exported:
        return
    if job.without_file:
        raise ConfigError(
            f"none of {job.without_file:,} images has a file, such as {job.missing[0]}: name a folder with --images, "
            "or give --thumbnails"
        )
    raise ConfigError("no image is left: --where or --keep leaves out all of them")
