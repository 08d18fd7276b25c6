"""`sightline model convert`: a checkpoint of open_clip, or one with pickled weights, in the layout that is loaded.

No code of a checkpoint is run. A pickle is read with torch's `weights_only`, which builds tensors and plain containers
and refuses everything else. What was written is loaded, so the self-test runs on it, before it gets its name.
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from siglip.checkpoint import pin_model
from siglip.checkpoints.files import (
    ADAPTER,
    CONFIG,
    FILES,
    IMAGES,
    OPEN_CLIP,
    TOKENIZER,
    TOKENIZER_EXTRAS,
    CheckpointError,
    fetch_hub,
    list_hub,
    read_json,
    write_json,
)
from siglip.checkpoints.layouts import OPEN_CLIP_WEIGHTS, PICKLES, WEIGHTS, read_config
from siglip.checkpoints.open_clip import (
    Text,
    Weights,
    make_config,
    make_spec,
    read_settings,
    rename_weights,
)
from siglip.checkpoints.self_test import TEXTS, draw_images
from siglip.checkpoints.settings import describe_spec, describe_tokenizer
from siglip.config import ModelConfig
from siglip.encoder import Encoder
from siglip.families import siglip, siglip2
from siglip.families.text_rules import find_rule
from siglip.families.tokenizer import Tokenizer, load_tokenizer
from siglip.weights import find_prefix

_VOCABULARIES = {
    32000: "google/siglip-base-patch16-224",
    250000: "google/siglip-base-patch16-256-multilingual",
    256000: "google/siglip2-base-patch16-224",
}
"""By the number of tokens, a checkpoint of Google's with the vocabulary that timm's repositories have for it.

open_clip made its tokenizers from the same files as Google (`SigLipTokenizer.VOCAB_FILES`), and keeps them as T5's."""
_SAMPLES = (*TEXTS, "golden retriever", "naïve café", "красная площадь", "東京タワー")
_CLEANING = {"canonicalize": "canonicalize", "lower": "lowercase"}
"""What open_clip calls the text rules."""


@dataclass(frozen=True)
class _Source:
    """Where a checkpoint comes from.

    `name` is what the user gave. `directory` has its settings, and is named by the commit if it is from the hub.
    `files` are the names of its files, of which weights are not downloaded yet.
    """

    name: str
    directory: Path
    files: frozenset[str]
    on_hub: bool

    def get(self, name: str) -> Path:
        """One of `files`, downloaded if it is on the hub."""
        if self.on_hub:
            return fetch_hub(self.name, self.directory.name, (name,)) / name
        return self.directory / name

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {what}")


def convert_checkpoint(
    source: str,
    directory: Path,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    say: Callable[[str], None],
) -> Encoder:
    """Convert a checkpoint into `directory`, which must be empty or new. Returns the loaded result, in float32.

    `source` is a directory or a hub id, and so is `tokenizer`, which is for a source whose own tokenizer is none of a
    known family. `say` gets a line for each thing that was read or chosen. Raises `CheckpointError`, and
    `FileExistsError` for a directory that is not empty; then nothing is written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is not empty: give a new directory")
    found = _locate(source, revision)
    directory.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory.absolute().parent, prefix=".converting-") as scratch:
        part = Path(scratch) / "checkpoint"
        part.mkdir()
        if (found.directory / OPEN_CLIP).exists():
            rule: str | None = _convert_open_clip(found, part, tokenizer, say)
        else:
            _convert_pickle(found, part, tokenizer, say)
            rule = None
        encoder = _verify(part, directory)
        pinned = pin_model(ModelConfig(source=str(part)))
        tokens, rows = load_tokenizer(pinned, part).size, pinned.architecture.text_config.vocab_size
        if tokens != rows:
            say(
                f"tokenizer: it has {tokens} tokens, and the text tower {rows}: is it the one that it was trained with?"
            )
        own = find_rule(pinned.family)
        if rule is not None and rule != own:
            say(
                f"texts: open_clip prepares them by {rule!r}, and Sightline's rule for this tokenizer is {own!r}"
                + (f": set model.text_rule: {_CLEANING[rule]} for open_clip's numbers" if rule in _CLEANING else "")
            )
        if directory.exists():
            directory.rmdir()
        part.rename(directory)
    return encoder


def _locate(source: str, revision: str | None) -> _Source:
    path = Path(source).expanduser()
    if path.is_dir():
        return _Source(source, path, frozenset(file.name for file in path.iterdir()), on_hub=False)
    if "://" in source or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(f"{source} is not a directory or a hub id")
    directory = fetch_hub(source, revision, (*FILES, OPEN_CLIP, ADAPTER))
    return _Source(source, directory, list_hub(source, directory.name), on_hub=True)


def _convert_open_clip(found: _Source, part: Path, tokenizer: str | None, say: Callable[[str], None]) -> str:
    """Write a checkpoint of open_clip. Returns the name of the rule by which open_clip prepares its texts."""
    settings = read_settings(read_json(found.directory / OPEN_CLIP, found.name), found.name)
    text = settings.model_cfg.text_cfg
    where = _take_tokenizer(found, part, tokenizer, text)
    _compare_tokens(found, part, text, where)
    say(f"tokenizer: from {where}")
    file = next((name for name in (*OPEN_CLIP_WEIGHTS, WEIGHTS[0]) if name in found.files), None)
    if file is None:
        raise found.refuse(f"it has none of the weights {', '.join(OPEN_CLIP_WEIGHTS)}")
    weights = rename_weights(_read_weights(found, [file], say), settings, found.name)
    write_json(part / CONFIG, make_config(settings, weights))
    write_json(part / IMAGES, describe_spec(make_spec(settings)))
    save_file(weights, part / WEIGHTS[0], metadata={"format": "pt"})
    return str(text.tokenizer_kwargs.get("clean", "whitespace"))


def _convert_pickle(found: _Source, part: Path, tokenizer: str | None, say: Callable[[str], None]) -> None:
    """Write a checkpoint that has the hub's layout, except that its weights are pickles."""
    read_config(found.directory, found.name)
    if found.files & set(WEIGHTS):
        raise found.refuse("it has the layout that is loaded, so there is nothing to convert: use it as model.source")
    names = [PICKLES[0]]
    if PICKLES[1] in found.files:
        shards = read_json(found.get(PICKLES[1]), found.name).get("weight_map")
        names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
    missing = [name for name in names if name not in found.files]
    if missing or not names:
        raise found.refuse(f"it has no {missing[0] if missing else 'weight_map'}, nor weights of open_clip")
    for name in FILES:
        if (found.directory / name).exists():
            shutil.copyfile(found.directory / name, part / name)
    if tokenizer:
        text = json.loads((part / CONFIG).read_text(encoding="utf-8")).get("text_config", {})
        say(f"tokenizer: from {_take_files(found, part, tokenizer, text.get('max_position_embeddings', 64))}")
    weights = _read_weights(found, names, say)
    save_file(weights, part / WEIGHTS[0], metadata={"format": "pt"})


def _read_weights(found: _Source, names: list[str], say: Callable[[str], None]) -> Weights:
    """Read tensors by name, without a prefix that all have, and without position ids."""
    weights: Weights = {}
    for path in map(found.get, names):
        if path.suffix == ".safetensors":
            try:
                loaded = load_file(path)
            except (SafetensorError, OSError) as error:
                raise found.refuse(f"{path.name} cannot be read: {(str(error).splitlines() or [''])[0]}") from error
        else:
            try:
                with warnings.catch_warnings(action="ignore"):  # torch's, about pickles that it did not write
                    loaded = torch.load(path, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
                raise found.refuse(
                    f"{path.name} is not a plain file of tensors, and other pickles are not read, because they can "
                    f"contain code ({(str(error).splitlines() or [''])[0][:80]})"
                ) from error
            # A training run saves its state around the weights.
            nested = loaded.get("state_dict") if isinstance(loaded, dict) else None
            loaded = nested if isinstance(nested, dict) else loaded
            if not isinstance(loaded, dict) or not all(isinstance(one, torch.Tensor) for one in loaded.values()):
                raise found.refuse(f"{path.name} has other things than tensors by name")
        how = "safetensors" if path.suffix == ".safetensors" else "a pickle, of which only tensors were read"
        say(f"weights: {len(loaded)} tensors from {path.name} ({how})")
        if twice := sorted(weights.keys() & loaded.keys()):
            raise found.refuse(f"{path.name} has {twice[0]}, which another file has, too")
        weights.update(loaded)
    prefix = find_prefix(list(weights))
    if prefix:
        say(f"weights: without the prefix {prefix!r}")
    return {name.removeprefix(prefix): one for name, one in weights.items() if not name.endswith(".position_ids")}


def _take_tokenizer(found: _Source, part: Path, given: str | None, text: Text) -> str:
    """Write the tokenizer of a checkpoint of open_clip. Returns where it is from.

    It is the one that was given; that of the source, if it is of a known family; that of a checkpoint of Google's
    with the same vocabulary, if the source's is one of timm's.
    """
    length = text.context_length
    if given is not None:
        return _take_files(found, part, given, length)
    if _take(found.directory, part, length):
        return found.name
    name = text.hf_tokenizer_name
    known = name.startswith("timm/ViT-") and "SigLIP" in name and _VOCABULARIES.get(text.vocab_size)
    if not known:
        raise found.refuse(
            f"its tokenizer is {name or 'not named'}, which is not that of a known family: name a directory or a hub "
            f"id that has {siglip.FILES[0]}, or Gemma's {siglip2.FILES[0]}, with --tokenizer"
        )
    return _take_files(found, part, known, length)


def _take_files(found: _Source, part: Path, name: str, length: int) -> str:
    path = Path(name).expanduser()
    if not path.is_dir():
        try:
            path = _locate(name, None).directory
        except CheckpointError as error:
            raise found.refuse(f"its tokenizer: {error}: name a directory that has it with --tokenizer") from error
    if not _take(path, part, length):
        raise found.refuse(f"{name} has no tokenizer of a known family: name another one with --tokenizer")
    return name


def _take(directory: Path, part: Path, length: int) -> bool:
    """Copy the tokenizer of a directory, if it is of a known family, with settings for texts of `length` tokens."""
    settings = read_json(directory / TOKENIZER, str(directory)) if (directory / TOKENIZER).exists() else {}
    here = {path.name for path in directory.iterdir()}
    if siglip.FILES[0] in here:  # also where it is named T5's: open_clip reads the same file with another class
        shutil.copyfile(directory / siglip.FILES[0], part / siglip.FILES[0])
        write_json(part / TOKENIZER, describe_tokenizer(length))
        return True
    if not siglip2.recognizes(settings, here):
        return False
    for name in (*siglip2.FILES, *TOKENIZER_EXTRAS):
        if name in here:
            shutil.copyfile(directory / name, part / name)
    # Without the names, transformers makes an attention mask, which changes the scores.
    write_json(part / TOKENIZER, {**settings, "model_max_length": length, "model_input_names": ["input_ids"]})
    return True


def _compare_tokens(found: _Source, part: Path, text: Text, where: str) -> None:
    """Compare the tokenizer that was taken with the source's own, as its library alone reads it.

    Raises `CheckpointError` when they differ. A source that has no `tokenizer.json` cannot be compared.
    """
    own = found.directory / siglip2.FILES[0]
    if not own.exists():
        return
    import tokenizers

    plain = tokenizers.Tokenizer.from_file(str(own))
    plain.no_padding()
    plain.no_truncation()
    family = siglip if (part / siglip.FILES[0]).exists() else siglip2
    ids, counts = Tokenizer(part, family, text.context_length).encode(_SAMPLES)
    for sample, row, count in zip(_SAMPLES, ids.tolist(), counts.tolist(), strict=True):
        expected = plain.encode(family.canonicalize(sample)).ids
        if count <= text.context_length and row[:count] != expected:
            raise found.refuse(
                f"{sample!r} has other tokens with the tokenizer of {where} than with its own {own.name}: name the "
                "right one with --tokenizer"
            )


def _verify(part: Path, directory: Path) -> Encoder:
    """Load what was written, with the self-test, and embed images and texts. Raises `CheckpointError`."""
    try:
        encoder = Encoder(pin_model(ModelConfig(source=str(part), dtype="float32", compile=False, device="cpu")))
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(part), str(directory))) from error
    for vectors in (encoder.embed_images(draw_images(encoder.spec)), encoder.embed_texts(TEXTS)):
        if not np.isfinite(vectors).all():
            raise CheckpointError(f"{directory}: the converted checkpoint's embeddings are not finite")
    return encoder
