"""`sightline model`: write checkpoints with random weights, convert those of open_clip, check any, compare two."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sightline.commands.labels import read_labels
from sightline.commands.skipped import print_skipped
from sightline.exits import err, out, report_errors
from storage.settings import ConfigError

if TYPE_CHECKING:
    from pipelines.inputs.rows import Skipped
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
    from siglip.checkpoints.files import name_source

    with report_errors():
        try:
            count = init_checkpoint(directory, arch.value, seed)
        except OSError as error:
            raise ConfigError(str(error)) from error
        written = escape(name_source(directory))
        out.print(f"{written}: {arch.value}, {count:,} parameters, random weights (seed {seed})", highlight=False)


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
    min_cosine: Annotated[
        float | None, typer.Option(metavar="COSINE", help="model.min_cosine, for --dtype int8.")
    ] = None,
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
        from siglip.config import check_model
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
            **({} if min_cosine is None else {"min_cosine": min_cosine}),
        }
        config = check_model(settings)
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
        from siglip.checkpoints.files import CheckpointError, name_source
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
        written = name_source(directory)
        _print_facts(pin_model(ModelConfig(source=written)), encoder)
        out.print(escape(f"use it with     model.source: {written}"), highlight=False)


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
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in a job, before torch is loaded
        from siglip.checkpoints.comparison import compare_models
        from siglip.checkpoints.files import CheckpointError

        paths, skipped = _list_images(images)
        label_set = None if labels is None else read_labels(labels)
        found = _load_both((first, second), label_set, compile)
        err.print(f"embedding {len(paths):,} images with each ...", highlight=False)
        try:
            comparison = compare_models(found, paths, label_set)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        for name, reason, detail in comparison.rejected:
            err.print(escape(f"not compared: {name}: {reason}{f': {detail}' if detail else ''}"), highlight=False)
        if not comparison.images:
            raise ConfigError(f"--images: none of the {len(paths):,} images in {images} can be decoded")
        figures = {
            **comparison.as_dict(),
            "skipped": skipped.counts.total(),
            "skipped_kinds": dict(skipped.counts.most_common()),
        }
        if as_json:
            print(json.dumps(figures, allow_nan=False))
            return
        _print_comparison(figures)
        print_skipped(skipped.counts, skipped.examples)


def _list_images(folder: Path) -> tuple[list[Path], Skipped]:
    """The images in a folder and its folders that a job would read as loose images, and what else there is.

    Links are followed as in a job, and what a job skips is skipped: hidden files, links to nothing. Raises
    `ConfigError`, also for a folder in it that cannot be read: fewer images than there are would be compared.
    """
    from pipelines.inputs import images
    from pipelines.inputs.rows import Skipped
    from storage.hidden_names import is_hidden
    from storage.links import LinkedFolders
    from storage.local import LocalStore
    from storage.store import LinkNotFollowed, StoreError, show

    root, found, skipped = os.path.abspath(folder), list[Path](), Skipped()

    def note(path: str, error: StoreError) -> None:
        if is_hidden(os.path.relpath(path, root)):
            skipped.add(path, "hidden files")
        elif isinstance(error, LinkNotFollowed):
            skipped.add(path, "links in a circle or to a folder that is read anyway")
        else:
            raise ConfigError(f"--images: {error}")

    try:
        if not folder.is_dir():
            raise ConfigError(f"--images: {show(str(folder))} is not a folder")
        for entry in LocalStore().list(root, note, LinkedFolders([root])):
            name = os.path.relpath(entry.uri, root)
            if is_hidden(name):
                skipped.add(entry.uri, "hidden files")
            elif entry.size < 0:
                skipped.add(entry.uri, "broken links and special files")
            elif images.recognizes(name.lower().rpartition("/")[2]):
                found.append(folder / name)
            else:
                skipped.add_suffix(entry.uri)
    except OSError as error:
        raise ConfigError(f"--images: {show(str(folder))}: {error.strerror or error}") from error
    except StoreError as error:
        raise ConfigError(f"--images: {error}") from error
    if not found:
        raise ConfigError(f"--images: {show(str(folder))} has no image ({skipped.counts.total():,} other files)")
    return sorted(found), skipped


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
    if not at or os.path.exists(name):
        source, dtype = name, DTypeChoice.auto
    elif dtype not in [*DTypeChoice]:
        raise ConfigError(f"{name}: {dtype!r} is not a dtype: use SOURCE@DTYPE with {', '.join(DTypeChoice)}")
    return ModelConfig.model_validate({"source": source, "dtype": str(dtype), "compile": compile, "min_cosine": -1})


def _print_comparison(figures: dict[str, Any]) -> None:
    """Print what was found, one line for each kind of figure."""
    from siglip.scoring import format_cosine
    from storage.store import show

    count = figures["images"]
    skipped = f", {figures['skipped']:,} other files" if figures["skipped"] else ""
    lines = [("images", f"{count:,} compared, {len(figures['rejected']):,} cannot be decoded{skipped}")]
    cosines = figures["cosines"]
    if cosines:
        told = ", ".join(f"{format_cosine(cosines[f'p{percent}'])} at {percent} %" for percent in (1, 5, 50))
        lowest, mean = format_cosine(cosines["min"]), format_cosine(cosines["mean"])
        lines.append(("cosines", f"{lowest} at least, {told}, {mean} on average"))
    else:
        lines.append(("cosines", "none: these are two checkpoints, and embeddings of one mean nothing to the other"))
    labels = figures["labels"]
    if labels:
        agreeing, relabelled = labels["best_label_agrees"], labels["relabelled"]
        told = f"the best one agrees for {agreeing:,} of {count:,} images"
        lines.append(("labels", f"{told}; {relabelled:,} images get other labels from the label set"))
        mean, most = labels["mean_score_difference"], labels["largest_score_difference"]
        lines.append(("scores", f"differ by {mean:.4f} on average, by {most:.4f} at most"))
    else:
        lines.append(("labels", "not compared: give --labels"))
    models = figures["models"]
    for model in models:  # a list of lines, because both models may have one name, and it may be "labels"
        how = "compiled" if model["compiled"] else "not compiled"
        lines.append((show(model["name"]), f"{model['images_per_second']:,.1f} images/s, {model['dtype']}, {how}"))
    if count < (batch := max(model["batch_size"] for model in models)):
        lines.append(("speed", f"says little: these are fewer images than a batch, which has {batch}"))
    if not models[0]["compiled"] and "int8" in [model["dtype"] for model in models]:
        lines.append(("speed", "int8 is faster than bfloat16 only if it is compiled: see --compile"))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        out.print(escape(f"{name:{width}}  {value}"), highlight=False, soft_wrap=True)


def _print_facts(pinned: PinnedModel, encoder: Encoder) -> None:
    """Print what a loaded checkpoint is."""
    from siglip.checkpoints.self_test import read_known
    from siglip.scoring import format_cosine

    numbers = "compared with known ones" if pinned.identity in read_known() else "not known for this checkpoint"
    lowest = encoder.min_cosine
    near = "" if lowest is None else f"; images have a cosine of {format_cosine(lowest)} at least with float32"
    dtype_name = str(encoder.dtype).removeprefix("torch.")
    facts = {
        "checkpoint": pinned.identity,
        "family": pinned.family,
        "images": encoder.spec.describe(),
        "texts": f"{encoder.text_length} tokens",
        "embeddings": f"{encoder.width} dimensions",
        "computed in": f"{dtype_name} on {encoder.device.type}",
        "self-test": f"passed{near}; cosines of known images and texts: {numbers}",
    }
    for name, value in facts.items():
        out.print(escape(f"{name:12} {value}"), highlight=False)
