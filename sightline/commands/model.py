"""`sightline model`: write checkpoints with random weights, convert those of open_clip, and check any."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sightline.exits import err, out, report_errors
from storage.settings import ConfigError

if TYPE_CHECKING:
    from siglip.checkpoint import PinnedModel
    from siglip.encoder import Encoder

app = typer.Typer(no_args_is_help=True, help="Make, convert and check checkpoints.")


class Arch(StrEnum):
    """The architectures that `model init` knows."""

    base = "base"
    tiny = "tiny"


class DTypeChoice(StrEnum):
    """The dtypes of `model.dtype`."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command("init")
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; must be empty or new.")],
    arch: Annotated[
        Arch, typer.Option(help="base is siglip-base-patch16-256; tiny is that of the shipped checkpoint.")
    ],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a checkpoint with random weights in the hub's file layout, for benchmarks and to try how one is loaded."""
    from siglip.checkpoints.architectures import init_checkpoint

    with report_errors():
        try:
            count = init_checkpoint(directory, arch.value, seed)
        except OSError as error:
            raise ConfigError(str(error)) from error
        out.print(f"{directory}: {arch.value}, {count:,} parameters, random weights (seed {seed})", highlight=False)


@app.command("check")
def check(
    source: Annotated[str, typer.Argument(help="What model.source names: a hub id, a directory, an s3:// prefix.")],
    revision: Annotated[str | None, typer.Option(help="The hub's commit, tag or branch.")] = None,
    dtype: Annotated[DTypeChoice, typer.Option(help="What model.dtype names.")] = DTypeChoice.auto,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the cosines of the known images and texts, in float32.")
    ] = False,
) -> None:
    """Load a checkpoint, and say what it is and what its self-test found.

    The self-test runs whenever a checkpoint is loaded: how texts become tokens, where the text's embedding is read,
    whether embeddings of the dtype are those of float32. Cosines of known images and texts are compared for checkpoints
    whose numbers are in siglip/checkpoints/known.json. --json prints the entry to add for another one.
    """
    with report_errors():
        from siglip.checkpoint import pin_model
        from siglip.checkpoints.files import CheckpointError
        from siglip.checkpoints.self_test import TEXTS, draw_images
        from siglip.config import ModelConfig
        from siglip.encoder import Encoder
        from storage.mirror import Mirror
        from storage.store import StoreOptions

        if as_json and dtype is DTypeChoice.bfloat16:
            raise ConfigError("--json prints cosines of float32: leave out --dtype")
        config = ModelConfig(
            source=source, revision=revision, dtype="float32" if as_json else dtype.value, compile=False
        )
        try:
            pinned = pin_model(config, Mirror(StoreOptions.from_environment()))
            err.print(f"loading {escape(source)} ...", highlight=False)
            encoder = Encoder(pinned)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        if as_json:
            cosines = encoder.embed_images(draw_images(encoder.spec)) @ encoder.embed_texts(TEXTS).T
            print(json.dumps({pinned.identity: {"name": source, "cosines": cosines.astype(float).round(4).tolist()}}))
            return
        _print_facts(pinned, encoder)


@app.command("convert")
def convert(
    source: Annotated[str, typer.Argument(help="A directory or a hub id with files of open_clip, or pickled weights.")],
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where to write; must be empty or new.")],
    revision: Annotated[str | None, typer.Option(help="The hub's commit, tag or branch.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|ID",
            help="Where the tokenizer is, if the source has none of SigLIP or SigLIP 2: a directory or a hub id.",
        ),
    ] = None,
) -> None:
    """Convert a checkpoint of open_clip into the layout that Sightline and transformers load.

    For open_clip_config.json with open_clip_model.safetensors or open_clip_pytorch_model.bin, and for the hub's own
    layout with pytorch_model.bin. Pickles are read as tensors only, and no code of a checkpoint is run. The result is
    loaded, with the self-test, before it is in DIRECTORY.
    """
    with report_errors():
        from siglip.checkpoint import pin_model
        from siglip.checkpoints.conversion import convert_checkpoint
        from siglip.checkpoints.files import CheckpointError
        from siglip.config import ModelConfig

        try:
            encoder = convert_checkpoint(
                source,
                directory,
                revision=revision,
                tokenizer=tokenizer,
                say=lambda line: err.print(escape(line), highlight=False),
            )
        except (CheckpointError, OSError) as error:
            raise ConfigError(str(error).removeprefix("model.source: ")) from error
        _print_facts(pin_model(ModelConfig(source=str(directory))), encoder)
        out.print(escape(f"use it with     model.source: {directory}"), highlight=False)


def _print_facts(pinned: PinnedModel, encoder: Encoder) -> None:
    """Print what a loaded checkpoint is."""
    from siglip.checkpoints.self_test import read_known

    numbers = "compared with known ones" if pinned.identity in read_known() else "not known for this checkpoint"
    dtype_name = str(encoder.dtype).removeprefix("torch.")
    facts = {
        "checkpoint": pinned.identity,
        "family": pinned.family,
        "images": encoder.spec.describe(),
        "texts": f"{encoder.text_length} tokens",
        "embeddings": f"{encoder.width} dimensions",
        "computed in": f"{dtype_name} on {encoder.device.type}",
        "self-test": f"passed; cosines of known images and texts: {numbers}",
    }
    for name, value in facts.items():
        out.print(escape(f"{name:12} {value}"), highlight=False)
