"""`sightline sample` and `review`: which images to look at, and a page to say what they are."""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sightline.exits import out, report_errors
from storage.settings import ConfigError


class Where(StrEnum):
    """Who shows the sample to people."""

    review = "review"
    label_studio = "label-studio"


def sample(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the sample goes: a new folder.")],
    per_label: Annotated[int, typer.Option(min=1, help="About this many images for each label.")] = 100,
    to: Annotated[
        Where, typer.Option(help="For `sightline review`, or Label Studio's files beside it.")
    ] = Where.review,
    seed: Annotated[int, typer.Option(help="Of chance: the same draws the same.")] = 0,
) -> None:
    """Choose the images that a person should look at: of all scores, most of them where the threshold will be.

    Each keeps its weight, so that what is measured on the sample is true of the whole output. One pass.
    """
    with report_errors():
        from curation.review.labelstudio import write_tasks
        from curation.sample import check_folder, draw_sample, write_sample
        from curation.tagged_output import open_output

        source = open_output(output)
        if to is Where.review and "thumbnail" not in source.columns:
            raise ConfigError(f"{output} has no thumbnails to look at: tag with `thumbnails: true`")
        check_folder(folder)
        table = write_sample(source, draw_sample(source, per_label, seed), folder, seed)
        if to is Where.label_studio:
            files = write_tasks(table, source.labels, folder)
            names = f"{len(files)} files" if len(files) > 1 else files[0].name
            next_ = f"import {names} into a project with {folder / 'config.xml'}"
        else:
            next_ = f"sightline review {folder}"
        images = len(set(table["id"].to_pylist()))
        said = f"{table.num_rows:,} questions about {images:,} images of {source.rows:,}: {next_}"
        out.print(escape(said), highlight=False)


def review(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `sightline sample` wrote.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 takes a free one.")] = 8010,
) -> None:
    """Show a sample's images on a page of this machine, and keep what a person says: right, wrong or unsure.

    Answers go to DIR/answers.jsonl as they are given. Ctrl-C ends it; the next time it goes on.
    """
    with report_errors():
        import uvicorn

        from curation.review.answers import AnswerFile
        from curation.review.app import make_app
        from curation.sample import read_sample
        from sightline.commands.loopback import listen

        table, about = read_sample(folder)
        answers = AnswerFile(folder, table)
        app = make_app(table, about, answers)
        with listen(port) as socket:
            url = f"http://127.0.0.1:{socket.getsockname()[1]}"
            out.print(
                f"{len(answers.given):,} of {table.num_rows:,} answered; ready: [bold]{url}[/bold]", highlight=False
            )
            config = uvicorn.Config(app, log_level="warning", access_log=False)
            with suppress(KeyboardInterrupt):  # the usual end
                uvicorn.Server(config).run(sockets=[socket])
        answers.close()
        out.print(escape(f"{len(answers.given):,} of {table.num_rows:,} answered: {answers.path}"), highlight=False)
