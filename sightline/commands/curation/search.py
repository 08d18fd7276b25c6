"""`sightline search`: find images in an output by texts, images and conditions."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from sightline.commands.outputs import open_reported
from sightline.exits import err, out, report_errors
from siglip.checkpoints.files import CheckpointError
from siglip.labels import LabelError
from storage.settings import ConfigError

if TYPE_CHECKING:
    from curation.search.search import Results


class CutoffChoice(StrEnum):
    """Whether results end where the images are no longer relevant."""

    auto = "auto"
    none = "none"


def search(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A finished output of `sightline tag`.")],
    text: Annotated[list[str] | None, typer.Option(help="What the images show. Several: all of them.")] = None,
    not_: Annotated[
        list[str] | None, typer.Option("--not", metavar="TEXT", help="What the images must not show.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image file that the images are like.")] = None,
    like: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="The key or id of an image in OUTPUT that they are like.")
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="A condition on the columns of OUTPUT, such as `width >= 1024`.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="A label that OUTPUT has given the images.")] = None,
    top: Annotated[int, typer.Option(help="The most results.")] = 20,
    cutoff: Annotated[
        CutoffChoice, typer.Option(help="auto: end where images are no longer relevant, which may be at once.")
    ] = CutoffChoice.auto,
    fold: Annotated[bool, typer.Option("--fold", help="Show one of several near-duplicates.")] = False,
    index: Annotated[bool, typer.Option("--index", help="Use the index that `sightline index OUTPUT` made.")] = False,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR", help="Write the results: .csv, .jsonl, .parquet, .txt (ids), or thumbnails to a folder."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The checkpoint that tagged OUTPUT, if it is not at the source that its config named."),
    ] = None,
) -> None:
    """Search OUTPUT for images: by texts, by images, by conditions, or by all of these together.

    Every image is compared, so the results are exact. A text's score is the one that a label of this name would have.
    Results end where the images are no longer relevant to the texts: the cut-off is estimated for each query from the
    scores of all images. Nothing is found where nothing is relevant; `--cutoff none` shows the nearest images anyhow.

    With `--index` few images are compared, and a few of the nearest may be missed. A query that the index cannot answer
    is exact, which is said: several texts, texts with images, --where. With --not, who is left out is an estimate.
    """
    with report_errors():
        from curation.index.search import search_index
        from curation.search.files import check_target, write_results
        from curation.search.query import Query
        from curation.search.search import search_output

        query = Query(
            text or (),
            not_ or (),
            image or (),
            like or (),
            where,
            label or (),
            top,
            "auto" if cutoff == "auto" else "none",
            fold,
        )
        opened = open_reported(output)
        if to is not None:
            check_target(opened, to)
        config = opened.table.model.model_copy(update={"source": model, "revision": None}) if model else None
        query.check(opened)  # its message comes before the line about the work
        try:
            err.print(f"searching {count_images(opened.rows)} ...", highlight=False)
            results = search_index(opened, query, config) if index else search_output(opened, query, config)
        except (CheckpointError, LabelError) as error:
            raise ConfigError(str(error)) from error
        for note in results.notes:
            err.print(escape(note), highlight=False)
        if to is not None:
            write_results(results, opened, to)
        else:
            _print_table(results)
        out.print(escape(describe_results(results, query.fold)), highlight=False)


def _print_table(results: Results) -> None:
    if not results.table.num_rows:
        return
    table = Table(box=None, pad_edge=False)
    columns = [name for name in ("score", "similarity", "copies") if _is_told(results, name)]
    for name in columns:
        table.add_column(name, justify="right")
    for name in ("key", "labels", "source"):
        table.add_column(name, overflow="fold")
    for row in results.table.to_pylist():
        numbers = [f"{row[name]:.3g}" if name != "copies" else f"{row[name]:,}" for name in columns]
        table.add_row(*numbers, escape(row["key"]), escape(", ".join(row["labels"])), escape(row["source"]))
    out.print(table, highlight=False)


def _is_told(results: Results, name: str) -> bool:
    column = results.table[name]
    return any(column.to_pylist()) if name == "copies" else column.null_count == 0


def count_images(count: int) -> str:
    """Return a number of images in words."""
    return f"{count:,} image{'' if count == 1 else 's'}"


def describe_results(results: Results, fold: bool = False) -> str:
    """Return the line that ends a search: how many images were searched, are relevant, and are shown."""
    shown = results.table.num_rows
    parts = [f"{count_images(results.searched)} searched"]
    if results.searched < results.rows:
        parts[0] += f" of {results.rows:,}"
    if results.left_out:
        parts.append(f"{'about ' if results.estimated else ''}{results.left_out:,} left out by --not")
    folded = sum(results.table["copies"].to_pylist())
    if not results.searched:
        return f"no image of {results.rows:,} satisfies the conditions"
    if results.relevant is None:
        parts.append(f"the nearest {shown:,} are shown")
    elif (
        not results.relevant
        and results.best is not None
        and results.cutoff is not None
        and results.best > results.cutoff
    ):
        parts.append("all relevant images are left out" if results.left_out else "no other image is relevant")
    elif not results.relevant:
        best = (
            "" if results.best is None else f": the best score is {results.best:.3g}, the cut-off {results.cutoff:.3g}"
        )
        parts.append(f"nothing here is relevant{best} (--cutoff none shows the nearest)")
    else:
        about = "about " if results.estimated else ""
        parts.append(f"{about}{results.relevant:,} are relevant, with scores over {results.cutoff:.3g}")
        if shown < results.relevant:
            parts.append(f"the first {shown:,} are shown")
    if fold and folded:
        parts.append(f"{folded:,} near-duplicates of them are folded")
    if results.relevant is None and results.table["score"].null_count:
        parts.append("images have no scores, so that no cut-off applies")
    return "; ".join(parts)
