"""`sightline review`: show the images that a person should check on a page, and save the answers."""

from __future__ import annotations

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
        from curation.review.agreement import read_reviews
        from curation.review.session import find_disputed, open_review
        from curation.sampling.files import read_sample
        from sightline.commands.loopback import leave, listen, serve

        if settle and name is not None:
            raise ConfigError("--settle and --name: settled answers are nobody's: leave one of the two out")
        read_sample(folder)  # its message comes first
        disputed = find_disputed(folder) if settle else None
        for line in read_reviews(folder).describe():
            out.print(escape(line), highlight=False)
        if disputed == {}:
            return
        with open_review(folder, name, disputed) as review:
            answers, originals = review.answers, review.originals
            if answers.dropped:
                out.print(escape(f"{answers.path}: an unfinished last line was removed"), highlight=False)
            with listen(port) as listener:
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                out.print(f"{review.describe_progress()}; ready: [bold]{url}[/bold]", highlight=False)
                serve(review.app, listener, originals.stop)  # else requests for pictures would keep the server
        out.print(escape(f"{review.describe_progress()}: {answers.path}"), highlight=False)
        for line in read_reviews(folder).describe():
            out.print(escape(line), highlight=False)
        leave(originals)
