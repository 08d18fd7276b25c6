"""`sightline model`: write checkpoints with random weights, convert those of open_clip, check any, compare two."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.markup import escape

from sightline.commands.labels import read_labels
from sightline.exits import err, out, report_errors
from storage.settings import ConfigError, describe_error

if TYPE_CHECKING:
    from siglip.checkpoint import PinnedModel
    from siglip.checkpoints.comparison import ComparedModel
    from siglip.config import ModelConfig
    from siglip.encoder import Encoder
    from siglip.labels import LabelSet

app = typer.Typer(no_args_is_help=True, help="Make, convert, check and compare checkpoints.")


class Arch(StrEnum):
    """The architectures that `model init` knows."""

    base = "base"
    tiny = "tiny"


class DTypeChoice(StrEnum):
    """The dtypes of `model.dtype`."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


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
    source: Annotated[
        str, typer.Argument(help="What model.source names: a hub id, a directory, an s3://, gs:// or az:// prefix.")
    ],
    revision: Annotated[str | None, typer.Option(help="The hub's commit, tag or branch.")] = None,
    dtype: Annotated[DTypeChoice, typer.Option(help="What model.dtype names.")] = DTypeChoice.auto,
    image_size: Annotated[int | None, typer.Option(metavar="PIXELS", help="model.image_size.")] = None,
    patches: Annotated[int | None, typer.Option(metavar="N", help="model.patches.")] = None,
    text_rule: Annotated[str, typer.Option(metavar="RULE", help="model.text_rule.")] = "auto",
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

        if as_json and dtype in (DTypeChoice.bfloat16, DTypeChoice.int8):
            raise ConfigError("--json prints cosines of float32: leave out --dtype")
        settings = {
            "source": source,
            "revision": revision,
            "dtype": "float32" if as_json else dtype.value,
            "image_size": image_size,
            "patches": patches,
            "text_rule": text_rule,
            "compile": False,
        }
        try:
            config = ModelConfig.model_validate(settings)
        except ValidationError as error:
            raise ConfigError(f"model: {describe_error(error, ModelConfig)}") from None
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


@app.command("compare")
def compare(
    first: Annotated[str, typer.Argument(metavar="MODEL", help="SOURCE, or SOURCE@DTYPE: see --dtype of model check.")],
    second: Annotated[str, typer.Argument(metavar="MODEL", help="The other one, such as tiny@int8.")],
    images: Annotated[Path, typer.Option("--images", metavar="DIR", help="A folder with images, also in its folders.")],
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="FILE", help="A label set: how often do the labels differ?")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile both models, as a long job does. It takes a minute or two.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Embed the same images with two models, and say how near their embeddings, labels and scores are, and how fast.

    Two dtypes of one checkpoint are compared by cosine. Embeddings of two checkpoints are not: those of one mean
    nothing to the other. Images that cannot be decoded are counted and named. No bound is applied (model.min_cosine).
    """
    with report_errors():
        from siglip.checkpoints.comparison import compare_models

        paths, skipped = _list_images(images)
        label_set = None if labels is None else read_labels(labels)
        found = _load_both((first, second), label_set, compile)
        err.print(f"embedding {len(paths):,} images with each ...", highlight=False)
        comparison = compare_models(found, paths, label_set)
        for name, reason, detail in comparison.rejected:
            err.print(escape(f"not compared: {name}: {reason}{f': {detail}' if detail else ''}"), highlight=False)
        if not comparison.images:
            raise ConfigError(f"--images: none of the {len(paths):,} images in {images} can be decoded")
        figures = {**comparison.as_dict(), "skipped": skipped}
        if as_json:
            print(json.dumps(figures))
            return
        _print_comparison(figures)


def _list_images(folder: Path) -> tuple[list[Path], int]:
    """The images in a folder and its folders, by the suffix of their names, and how many other files there are."""
    from siglip.images.decode import readable_suffixes

    if not folder.is_dir():
        raise ConfigError(f"--images: {folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    suffixes = readable_suffixes()
    found = [path for path in files if path.suffix.lower().removeprefix(".") in suffixes]
    if not found:
        raise ConfigError(f"--images: {folder} has no image ({len(files):,} other files)")
    return found, len(files) - len(found)


def _load_both(names: tuple[str, str], labels: LabelSet | None, compile: bool) -> tuple[ComparedModel, ComparedModel]:
    from siglip.checkpoint import pin_model
    from siglip.checkpoints.comparison import ComparedModel
    from siglip.checkpoints.files import CheckpointError
    from siglip.labels import LabelError
    from storage.mirror import Mirror
    from storage.store import StoreOptions

    mirror = Mirror(StoreOptions.from_environment())
    try:
        configs = [_read_model(name, compile) for name in names]
        pinned = [pin_model(config, mirror) for config in configs]
        found = []
        for name, model in zip(names, pinned, strict=True):
            err.print(f"loading {escape(name)} ...", highlight=False)
            found.append(ComparedModel.load(name, model, labels))
    except (CheckpointError, LabelError) as error:
        raise ConfigError(str(error)) from error
    return found[0], found[1]


def _read_model(name: str, compile: bool) -> ModelConfig:
    """The settings of SOURCE or SOURCE@DTYPE. A source that is a folder may have an @ in its name."""
    from siglip.config import ModelConfig

    source, at, dtype = name.rpartition("@")
    if not at or Path(name).exists():
        source, dtype = name, DTypeChoice.auto
    elif dtype not in [*DTypeChoice]:
        raise ConfigError(f"{name}: {dtype!r} is not a dtype: use SOURCE@DTYPE with {', '.join(DTypeChoice)}")
    return ModelConfig.model_validate({"source": source, "dtype": str(dtype), "compile": compile, "min_cosine": -1})


def _print_comparison(figures: dict[str, Any]) -> None:
    """Print what was found, one line for each kind of figure."""
    count = figures["images"]
    skipped = f", {figures['skipped']:,} other files" if figures["skipped"] else ""
    lines = {"images": f"{count:,} compared, {len(figures['rejected']):,} cannot be decoded{skipped}"}
    cosines = figures["cosines"]
    if cosines:
        told = ", ".join(f"{cosines[f'p{percent}']:.5f} at {percent} %" for percent in (1, 5, 50))
        lines["cosines"] = f"{cosines['min']:.5f} at least, {told}, {cosines['mean']:.5f} on average"
    else:
        lines["cosines"] = "none: these are two checkpoints, and embeddings of one mean nothing to the other"
    labels = figures["labels"]
    if labels:
        lines["labels"] = (
            f"the best one agrees for {labels['best_label_agrees']:,} of {count:,} images; "
            f"{labels['relabelled']:,} images get other labels from the label set"
        )
        lines["scores"] = (
            f"differ by {labels['mean_score_difference']:.4f} on average, by {labels['largest_score_difference']:.4f} "
            "at most"
        )
    else:
        lines["labels"] = "not compared: give --labels"
    models = figures["models"]
    for model in models:
        how = "compiled" if model["compiled"] else "not compiled"
        lines[model["name"]] = f"{model['images_per_second']:,.1f} images/s, {model['dtype']}, {how}"
    if not models[0]["compiled"] and "int8" in [model["dtype"] for model in models]:
        lines["speed"] = "int8 is faster than bfloat16 only if it is compiled: see --compile"
    width = max(map(len, lines))
    for name, value in lines.items():
        out.print(escape(f"{name:{width}}  {value}"), highlight=False, soft_wrap=True)


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
