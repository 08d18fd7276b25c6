"""The command line `sightline ...`: parses arguments, calls the packages that do the work, prints, and sets exit codes.

Commands with more to print than a line are in `sightline/commands/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from sightline.commands import labels, model
from sightline.commands.curation.browse import browse
from sightline.commands.curation.dedup import dedup
from sightline.commands.curation.export import export
from sightline.commands.curation.index import index
from sightline.commands.curation.probe import probe
from sightline.commands.curation.quality import calibrate, evaluate
from sightline.commands.curation.report import report
from sightline.commands.curation.retag import retag
from sightline.commands.curation.review import review
from sightline.commands.curation.sample import audit, sample
from sightline.commands.curation.search import search
from sightline.commands.demo import demo
from sightline.commands.plan import plan
from sightline.commands.tag import SCHEMA_HELP, describe_keys, tag
from sightline.commands.upkeep import compact, publish, status, upgrade, verify
from sightline.exits import err, out, report_errors
from storage.key_table import list_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tag and embed images with SigLIP on Ray.",
)
key_app = typer.Typer(no_args_is_help=True, help="Make API keys for the endpoint.")
app.add_typer(model.app, name="model")
app.add_typer(key_app, name="key")
app.add_typer(labels.app, name="labels")


app.command(epilog=SCHEMA_HELP)(tag)
app.command()(plan)
app.command()(status)
app.command()(verify)
app.command()(compact)
app.command()(publish)
app.command()(upgrade)


class ServeCommand(TyperCommand):
    """`sightline serve`, whose help has every key of an endpoint's configuration.

    The keys are read when the help is shown: importing their models takes a third of a second, in every command.
    """

    def format_help(self, *arguments: Any, **named: Any) -> None:
        """Write the help. Takes what typer passes: instances of its own private copies of click's classes."""
        from serve.config import EndpointConfig

        self.epilog = describe_keys(list_settings(EndpointConfig, EndpointConfig()))
        super().format_help(*arguments, **named)


@app.command(cls=ServeCommand)
def serve(
    config: Annotated[
        Path, typer.Argument(help="The endpoint's YAML file, such as configs/endpoint.yaml.", show_default=False)
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen on. Without API keys it must be a loopback address.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Serve the endpoint on this machine: the API, and a page to try it.

    Prints the URL when the model is loaded and warm. Ctrl-C finishes the requests under way, and stops.

    Every key of CONFIG is optional.
    """
    from sightline.commands.serving import prepare_endpoint, run_endpoint

    def print_ready(url: str, metrics: str) -> None:
        out.print(f"ready: [bold]{escape(url)}[/bold] (API: {escape(url)}/docs, metrics: {metrics})", highlight=False)

    with report_errors():
        endpoint = prepare_endpoint(config, host, port)
        err.print(f"loading {escape(endpoint.model_name())} ...", highlight=False)
        run_endpoint(endpoint, host, port, print_ready)


for command in (demo, search, browse, index, dedup, export):
    app.command()(command)
for quality_command in (sample, review, calibrate, probe, retag, audit, evaluate, report):
    app.command()(quality_command)


@key_app.command("new")
def key_new(
    name: Annotated[str, typer.Argument(help="The name of the client that uses the key, for logs and metrics.")],
) -> None:
    """Make an API key. Prints a line for auth.keys_file to stdout, and the key itself to stderr, only this once.

    sightline key new alice >> keys.txt
    """
    from serve.admission.auth import new_key

    with report_errors():
        key, line = new_key(name)
        print(line)
        err.print(f"the key of {name}, which is stored nowhere: {key}", highlight=False)
