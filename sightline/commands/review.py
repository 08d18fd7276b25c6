"""`sightline sample` and `review`: choose the images that a person should check, and show them on a page."""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sightline.commands.outputs import open_reported
from sightline.exits import out, report_errors
from storage.settings import ConfigError


class ReviewTool(StrEnum):
    """The tool that shows the sample to people."""

    review = "review"
    label_studio = "label-studio"


def sample(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the sample.")],
    per_label: Annotated[int, typer.Option(min=1, help="About how many images to draw for each label.")] = 100,
    to: Annotated[
        ReviewTool, typer.Option(help="The tool that shows the sample. label-studio also writes its tasks files.")
    ] = ReviewTool.review,
    seed: Annotated[int, typer.Option(help="Random seed: the same seed draws the same sample.")] = 0,
) -> None:
    """Draw the images that a person should check: from all score ranges, most of them near the threshold.

    Each image has a weight, so that metrics of the sample estimate those of the whole output. Reads the embeddings in
    one pass.
    """
    with report_errors():
        from curation.review.labelstudio import write_tasks
        from curation.sampling.files import check_folder, read_questions, read_sample, write_sample
        from curation.sampling.sample import draw_sample

        source = open_reported(output)
        if to is ReviewTool.review and "thumbnail" not in source.columns:
            raise ConfigError(f"{output} has no thumbnails to show: tag with `thumbnails: true`")
        check_folder(folder)
        write_sample(source, draw_sample(source, per_label, seed), folder, seed)
        table, _ = read_sample(folder)
        if to is ReviewTool.label_studio:
            files = write_tasks(read_questions(folder), source.labels, folder)
            names = f"{len(files)} files" if len(files) > 1 else files[0].name
            next_step = f"import {names} into a project with {folder / 'config.xml'}"
        else:
            next_step = f"sightline review {folder}"
        images = len(set(table["id"].to_pylist()))
        message = f"{table.num_rows:,} questions about {images:,} images of {source.rows:,}. Next: {next_step}"
        out.print(escape(message), highlight=False)


def review(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `sightline sample` wrote.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes any free port.")] = 8010,
) -> None:
    """Show a sample on a local web page, and save a person's answers: right, wrong or unsure.

    Each answer is saved to DIR/answers.jsonl at once. Ctrl-C stops the command; run it again to continue.
    """
    with report_errors():
        import uvicorn

        from curation.review.answers import AnswerFile
        from curation.review.app import make_app
        from curation.sampling.files import Thumbnails, read_sample
        from sightline.commands.loopback import listen

        table, metadata = read_sample(folder)
        answers = AnswerFile(folder, table)
        app = make_app(table, metadata, Thumbnails(folder), answers)
        with listen(port) as socket:
            url = f"http://127.0.0.1:{socket.getsockname()[1]}"
            out.print(
                f"{len(answers.current):,} of {table.num_rows:,} answered; ready: [bold]{url}[/bold]", highlight=False
            )
            config = uvicorn.Config(app, log_level="warning", access_log=False)
            with suppress(KeyboardInterrupt):  # Ctrl-C is the usual way to stop
                uvicorn.Server(config).run(sockets=[socket])
        answers.close()
        out.print(escape(f"{len(answers.current):,} of {table.num_rows:,} answered: {answers.path}"), highlight=False)
