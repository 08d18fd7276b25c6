"""Where a checkpoint's files are: a directory, a prefix of an object store, or the hub; and what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from siglip.config import ModelConfig
from siglip.families import FAMILIES
from storage.store import Unreachable, show

TINY = Path(__file__).parent / "tiny"
"""The checkpoint that ships with Sightline: see its README."""
CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
IMAGES, PROCESSOR = "preprocessor_config.json", "processor_config.json"
SETTINGS = (CONFIG, IMAGES, PROCESSOR, TOKENIZER)
OPEN_CLIP, ADAPTER = "open_clip_config.json", "adapter_config.json"
"""Files that say that a repository is something else. They are no part of a checkpoint's identity."""
_FAMILY_FILES = {name for family in FAMILIES.values() for name in family.FILES}
TOKENIZER_EXTRAS = ("special_tokens_map.json", "added_tokens.json")
FILES = frozenset((*SETTINGS, *TOKENIZER_EXTRAS, *_FAMILY_FILES))
"""The files of a checkpoint that are read, besides the weights. Pickles and code are never read."""


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message is one line that says what to change."""


def shorten_identity(identity: str) -> str:
    """The identity of a model for messages: its kind and twelve digits, such as `378px sha256:5ba436afdd6d`."""
    kind, colon, digits = identity.partition(":")
    return f"{kind}{colon}{digits[:12]}"


class PrefixMirror(Protocol):
    """The interface for downloading a checkpoint from an object store. `storage.mirror.Mirror` implements it."""

    def identify(self, prefix: str, wanted: Callable[[str], bool]) -> str:
        """A string that changes when one of the wanted files changes."""

    def fetch(self, prefix: str, wanted: Callable[[str], bool], now: Callable[[str], bool]) -> tuple[Path, str]:
        """Download the wanted files that are needed `now`. Returns their folder, and the wanted files' identity."""


def locate(config: ModelConfig, mirror: PrefixMirror | None, now: Collection[str] | None) -> tuple[Path, str]:
    """The directory of a checkpoint's files, and its identity. Only the files `now` are downloaded; None is all."""
    source = config.source
    if source.startswith("hf://"):
        raise CheckpointError(
            f"model.source: {source}: write a checkpoint of the hub as its id, OWNER/NAME, and model.revision"
        )
    if "://" in source:
        if mirror is None:
            raise CheckpointError(f"model.source: {source}: a checkpoint in an object store needs a mirror")
        try:
            directory, etags = mirror.fetch(source, _is_wanted, lambda name: now is None or name in now)
        except Exception as error:
            if isinstance(error, Unreachable):  # not for the user to correct
                raise
            raise CheckpointError(f"model.source: {error}") from error
        return directory, f"etags:{etags}"
    try:
        path = TINY if source == "tiny" else Path(source).expanduser()
        found = path.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder that is closed, ~ of a stranger
        raise CheckpointError(f"model.source: {show(source)}: {getattr(error, 'strerror', None) or error}") from error
    if found:
        return path, f"sha256:{_hash_files(path, _versions(path, source))}"
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        every = (*FILES, "*.safetensors", "*.safetensors.index.json")
        directory = fetch_hub(source, config.revision, every if now is None else (*now, OPEN_CLIP, ADAPTER))
        return directory, f"commit:{directory.name}"
    raise CheckpointError(f"model.source: {source} is not a directory, an s3://, gs:// or az:// prefix, or a hub id")


def name_source(directory: Path) -> str:
    """The `model.source` that names a directory. Its path as it is may name another: `tiny` is what ships."""
    path = str(directory)
    if path.startswith("~"):  # pathlib takes ./~ for ~ as well
        return str(directory.absolute())
    return "./tiny" if path == "tiny" else path


def _is_wanted(name: str) -> bool:
    return name in FILES or name.endswith((".safetensors", ".safetensors.index.json"))


def _versions(directory: Path, source: str) -> tuple[tuple[str, int, int], ...]:
    paths = sorted(path for path in directory.iterdir() if _is_wanted(path.name))
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"model.source: {source}: {path.name} is a folder or a link to nothing: remove it")
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


@cache
def _hash_files(directory: Path, versions: tuple[tuple[str, int, int], ...]) -> str:
    """SHA-256 of a checkpoint's files. Cached, so each process reads the gigabytes once for each version."""
    digest = hashlib.sha256()
    for name, size, _ in versions:
        digest.update(f"{name} {size}\n".encode())
        with (directory / name).open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"model.source: {source} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"model.source: {source}: cannot read {path.name}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"model.source: {source}: {path.name} is not a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def fetch_hub(source: str, revision: str | None, patterns: Collection[str]) -> Path:
    """Download the files of a repository of the hub that match. Returns their folder, whose name is the commit.

    Raises `CheckpointError` when the hub cannot be reached and the files are not here from before.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(source):
        return Path(snapshot_download(source, revision=revision, allow_patterns=[*patterns]))


def list_hub(source: str, revision: str) -> frozenset[str]:
    """The names of all files of a repository of the hub. Raises `CheckpointError` when the hub cannot be reached."""
    from huggingface_hub import list_repo_files

    with _hub_errors(source):
        return frozenset(list_repo_files(source, revision=revision))


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client raises a dozen unrelated types: offline, missing, gated, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"model.source: {source} is not a directory here and could not be fetched from the hub ({reason})"
        ) from error
