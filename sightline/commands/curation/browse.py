"""`sightline browse`: a page to search, filter and select the images of an output."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from curation.browse.address import PORT, make_address
from sightline.commands.outputs import open_reported
from sightline.exits import err, out, report_errors
from storage.settings import ConfigError


def browse(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.")],
    text: Annotated[
        str | None, typer.Option(help="Start with this in the search box, where `-cat` and ` + ` have a meaning.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Start with the images that have this label.")] = None,
    answers: Annotated[
        Path, typer.Option(metavar="FILE", help="The file that answers about selected images are appended to.")
    ] = Path("browse-answers.jsonl"),
    sample: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder that `sightline sample` wrote: the page has its review, too."),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Whose answers to --sample these are.")] = None,
    copy_to: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the copy of OUTPUT while the command runs. By default the folder for temporary files.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The checkpoint that tagged OUTPUT, if it is not at the source that its config named."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes any free port.")] = PORT,
) -> None:
    """Look through OUTPUT on a local web page: search, filter by labels and scores, select, export.

    The page shows what is there while OUTPUT is copied to this machine, and takes up what later runs commit. Ctrl-C
    stops the command and removes the copy.
    """
    with report_errors():
        from curation.browse.app import make_app
        from curation.browse.follow import Follower
        from curation.browse.query import Embedder
        from curation.review.session import open_review
        from sightline.commands.loopback import leave, listen, serve

        opened = open_reported(output)
        if label is not None and label not in opened.labels.label_names():
            raise ConfigError(f"--label {label!r}: {opened.uri} has no such label: search for it with --text")
        config = opened.table.model.model_copy(update={"source": model, "revision": None}) if model else None
        if copy_to is not None and not copy_to.is_dir():
            raise ConfigError(f"--copy-to {copy_to}: it is no folder")
        if answers.is_dir() or not answers.absolute().parent.is_dir():
            raise ConfigError(f"--answers {answers}: name a file in a folder that there is")
        if name is not None and sample is None:
            raise ConfigError("--name is a person who answers a sample's questions: give --sample, or leave it out")
        with ExitStack() as stack:
            listener = stack.enter_context(listen(port))
            review = None if sample is None else stack.enter_context(open_review(sample, name))
            folder = stack.enter_context(_make_folder(copy_to))
            follower = stack.enter_context(closing(Follower(opened, folder, tell=_print_line)))
            embedder = Embedder(config)
            embedder.load_in_background(follower.start(), _print_line)
            url = make_address(text, label, listener.getsockname()[1])
            out.print(f"ready: [bold]{escape(url)}[/bold]", highlight=False)
            app = make_app(follower, embedder, answers, None if review is None else review.app)
            serve(app, listener, (lambda: None) if review is None else review.originals.stop)
        if review is not None:
            leave(review.originals)


@contextmanager
def _make_folder(parent: Path | None) -> Iterator[Path]:
    """Make a folder for the copy, which is removed at the end. Raises `ConfigError` if that is not possible."""
    try:
        made = tempfile.TemporaryDirectory(prefix="sightline-browse-", dir=parent)
    except OSError as error:
        where = parent or tempfile.gettempdir()
        raise ConfigError(f"{where} cannot be written to: {error.strerror}: name a folder with --copy-to") from error
    with made as name:
        yield Path(name)


def _print_line(line: str) -> None:
    err.print(escape(line), highlight=False)
