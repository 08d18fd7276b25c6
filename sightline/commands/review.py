"""`sightline sample` and `review`: choose the images that a person should check, and show them on a page."""

from __future__ import annotations

from contextlib import closing, suppress
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
    name: Annotated[
        str | None,
        typer.Option(
            help="Whose answers these are, if several people answer: letters, digits, - and _.", metavar="NAME"
        ),
    ] = None,
    settle: Annotated[bool, typer.Option("--settle", help="Ask only what people disagree about.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes any free port.")] = 8010,
) -> None:
    """Show a sample on a local web page, and save a person's answers: right, wrong or unsure.

    Each answer is saved at once, to DIR/answers.jsonl, or to DIR/answers-NAME.jsonl with --name. Ctrl-C stops the
    command; run it again to continue. --settle saves to DIR/answers-settled.jsonl what people have agreed on.
    """
    with report_errors():
        import uvicorn

        from curation.review.agreement import read_reviews
        from curation.review.answers import NOBODY, SETTLED, AnswerFile
        from curation.review.app import make_app
        from curation.review.originals import Originals
        from curation.sampling.files import Thumbnails, read_sample
        from sightline.commands.loopback import listen
        from storage.store import StoreOptions

        if settle and name is not None:
            raise ConfigError("--settle and --name: settled answers are nobody's: leave one of the two out")
        if name in (NOBODY, SETTLED):
            raise ConfigError(f"--name {name!r}: choose another name")
        table, metadata = read_sample(folder)
        reviews = read_reviews(folder)
        disputed = reviews.disagreements() if settle else None
        if settle and len(reviews.people) < 2:
            raise ConfigError(f"--settle: fewer than two people have answered in {folder}: use --name for each person")
        for line in reviews.describe():
            out.print(escape(line), highlight=False)
        if disputed == {}:
            return
        person = SETTLED if settle else name or NOBODY
        about = list(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))
        asked = [row for row, one in enumerate(about) if disputed is None or one in disputed]

        def describe_progress(answers: AnswerFile) -> str:
            return f"{sum(row in answers.current for row in asked):,} of {len(asked):,} answered"

        with (
            closing(AnswerFile(folder, table, person)) as answers,
            closing(Originals(table, StoreOptions.from_environment())) as originals,
        ):
            if answers.dropped:
                out.print(escape(f"{answers.path}: an unfinished last line was removed"), highlight=False)
            app = make_app(table, metadata, Thumbnails(folder), originals, answers, person, disputed)
            with listen(port) as socket:
                url = f"http://127.0.0.1:{socket.getsockname()[1]}"
                out.print(f"{describe_progress(answers)}; ready: [bold]{url}[/bold]", highlight=False)
                config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
                with suppress(KeyboardInterrupt):  # Ctrl-C is the usual way to stop
                    uvicorn.Server(config).run(sockets=[socket])
        out.print(escape(f"{describe_progress(answers)}: {answers.path}"), highlight=False)
        for line in read_reviews(folder).describe():
            out.print(escape(line), highlight=False)
