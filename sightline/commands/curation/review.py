"""`sightline review`: show the images that a person should check on a page, and save the answers."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sightline.exits import out, report_errors
from storage.settings import ConfigError


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
            with listen(port) as listener:
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                out.print(f"{describe_progress(answers)}; ready: [bold]{url}[/bold]", highlight=False)
                config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)

                class Server(uvicorn.Server):
                    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                        originals.stop()  # else requests for pictures would keep the server
                        await super().shutdown(sockets)

                with suppress(KeyboardInterrupt):  # Ctrl-C is the usual way to stop
                    Server(config).run(sockets=[listener])
        out.print(escape(f"{describe_progress(answers)}: {answers.path}"), highlight=False)
        for line in read_reviews(folder).describe():
            out.print(escape(line), highlight=False)
        if originals.busy:  # Python would wait for the threads that read, and so for a store that does not answer
            sys.stdout.flush()
            os._exit(0)
