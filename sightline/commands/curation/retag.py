"""`sightline retag`: write an output with other labels, from stored embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sightline.commands.labels import read_labels
from sightline.commands.outputs import open_reported
from sightline.exits import GO_ON, err, out, report_errors
from sightline.progress import RunProgress
from siglip.checkpoints.files import CheckpointError
from siglip.labels import LabelError
from storage.settings import ConfigError


def retag(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.")],
    labels: Annotated[Path, typer.Option("--labels", metavar="FILE", help="The new label set.")],
    target: Annotated[
        str, typer.Option("--output", metavar="URI", help="Folder or s3://, gs:// or az:// prefix of the new output.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="The checkpoint that tagged OUTPUT, if it is not at the source that its config named."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster. By default, Ray is started on this machine.")
    ] = None,
) -> None:
    """Give an output's images other labels, thresholds, templates or bands, from stored embeddings. Reads no image.

    The new output has the same images. It can be verified and read like any other, and `sightline tag` can continue in
    it with the new label set. Run the command again after a kill: it does the shards that are left. The model is loaded
    only when the label set has prompts that OUTPUT does not have.
    """
    with report_errors(GO_ON):
        from curation.retag import retag_output

        wanted = read_labels(labels)
        source = open_reported(output)
        config = source.table.model.model_copy(update={"source": model, "revision": None}) if model else None
        try:
            with RunProgress(err) as progress:
                done = retag_output(source, wanted, target, progress, config, address)
        except (CheckpointError, LabelError) as error:
            raise ConfigError(str(error)) from error
        if source.fingerprint["embedding_dtype"] == "float16":
            err.print("the embeddings are float16: scores differ by up to about 0.001 from those of float32 embeddings")
        total = f"{done.manifest['rows_tagged']:,} images are in {target}"
        if done.shards:
            out.print(escape(f"{done.changed:,} of {done.rows:,} images changed; {total}"), highlight=False)
        else:
            out.print(escape(f"nothing to do: all {total}"), highlight=False)
