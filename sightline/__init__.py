"""Image tagging and embedding with SigLIP on Ray: the Python API.

    import sightline

    encoder = sightline.Encoder.load("google/siglip-base-patch16-256")
    scores = encoder.scores(["cat.jpg", "dog.jpg"], ["cat", "dog"])  # probabilities, float32 (2, 2)

Importing this package loads neither torch, Ray nor pyarrow: a name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sightline.imports import install_finder

install_finder()

if TYPE_CHECKING:
    from pipelines.config import JobConfig, load_config
    from sightline.api import tag, verify
    from sightline.encoder import Encoder
    from sightline.output import TaggedOutput, open_output
    from siglip.images.decode import ImageRejected
    from siglip.labels import LabelSet
    from storage.settings import ConfigError

    __version__: str

_MODULES = {
    "ConfigError": "storage.settings",
    "Encoder": "sightline.encoder",
    "ImageRejected": "siglip.images.decode",
    "JobConfig": "pipelines.config",
    "LabelSet": "siglip.labels",
    "TaggedOutput": "sightline.output",
    "load_config": "pipelines.config",
    "open_output": "sightline.output",
    "tag": "sightline.api",
    "verify": "sightline.api",
}
"""Where each public name is defined."""

__all__ = [
    "ConfigError",
    "Encoder",
    "ImageRejected",
    "JobConfig",
    "LabelSet",
    "TaggedOutput",
    "__version__",
    "load_config",
    "open_output",
    "tag",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "__version__":
        from importlib.metadata import version

        return version("sightline")
    if name not in _MODULES:
        raise AttributeError(f"module 'sightline' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, also those that are not yet imported."""
    return list(__all__)
