"""`InputCase`: one odd input, and what a job must do with it. It is planned, read and decoded; no Ray and no model."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config import JobConfig
from pipelines.inputs.rows import Row, Skipped
from siglip.config import ImageSpec
from siglip.images.decode import ImageRejected, decode_image
from storage.settings import ConfigError
from storage.store import StoreError
from tests.support.input_folder import OPTIONS, extend_plan, read_planned
from tests.support.stores.hub_server import HubServer, Reply
from tests.support.web_server import Respond, serve, url_of

_SPEC = ImageSpec(size=32)
_REPO = "owner/name"


@dataclass(frozen=True)
class InputCase:
    """An input, what a job must do with it, and its line in `docs/inputs.md`.

    `kind` and `rule` are the text of the line, in Markdown; its outcome is derived from what is expected. `build`
    writes the input into an empty folder, which is the job's only input unless `settings` names others (`{folder}` in a
    value is the folder). Expected are the number of `tagged` images, the `rejected` ones by reason, what is `skipped`
    by the phrase of the summary, or the text that the refusal must contain (`refused`). For a label file, `labels` are
    the names in it; None is not compared. `web` are the responses of a server on loopback, which the job may fetch
    from; `{web}` in a file of the folder is its URL. `hub` are the files of a dataset on a stand-in for the hub, whose
    URI is `{hub}` in a value of the settings; `hub_answer` is what the hub answers to all requests instead.
    """

    kind: str
    rule: str
    build: Callable[[Path], object]
    tagged: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    refused: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    web: Mapping[str, Respond] = field(default_factory=dict)
    hub: Mapping[str, bytes] = field(default_factory=dict)
    hub_answer: Reply | None = None

    def outcome(self) -> str:
        """Return the text of the table's second column."""
        if self.refused is not None:
            return "refused"
        if self.labels is not None:
            return "labels " + ", ".join(f"`{label}`" for label in self.labels)
        reasons = ", ".join(f"`{reason}`" for reason in self.rejected)
        parts = ["tagged"] if self.tagged else []
        parts += [f"rejected: {reasons}"] if reasons else []
        parts += ["skipped"] if self.skipped else []
        return "; ".join(parts) or "nothing"


@dataclass(frozen=True)
class Seen:
    """What planning, reading and decoding made of a case: the fields of `InputCase`, the rows and the pixels."""

    tagged: int
    rejected: dict[str, int]
    skipped: dict[str, int]
    refused: str | None
    rows: list[Row]
    pixels: list[np.ndarray]
    labels: tuple[str, ...] = ()


def read_case(case: InputCase, folder: Path) -> Seen:
    """Build a case's input in `folder`, plan it, read it and decode its images."""
    case.build(folder)
    with (
        tempfile.TemporaryDirectory() as output,
        serve(dict(case.web)) if case.web else nullcontext() as web,
        _serve_hub(case) if case.hub else nullcontext(),
    ):
        settings = {"input": "{folder}", "output": output, "labels": ["a"], **case.settings}
        if web is not None:
            for file in folder.iterdir():
                file.write_bytes(file.read_bytes().replace(b"{web}", url_of(web, "").encode()))
            allowed = {"enabled": True, "ports": [80, web.port], "allowed_networks": ["127.0.0.0/8"]}
            settings["fetch"] = {**allowed, **case.settings.get("fetch", {})}
        try:
            return _read(JobConfig(**_fill(settings, str(folder))))
        except (ConfigError, StoreError, ValueError) as error:
            return Seen(0, {}, {}, str(error), [], [])


@contextmanager
def _serve_hub(case: InputCase) -> Iterator[None]:
    """Run a hub with the case's dataset, for this process."""
    server = HubServer()
    server.commit(_REPO, case.hub)
    try:
        with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
            server.use(patch)
            if case.hub_answer is not None:
                stack.enter_context(server.fault("", case.hub_answer, times=None))
            yield
    finally:
        server.stop()


def _read(config: JobConfig) -> Seen:
    skipped = Skipped()
    report, columns = extend_plan(config, OPTIONS)
    rows = read_planned(config, OPTIONS, columns, skipped)
    pixels: list[np.ndarray] = []
    rejected: Counter[str] = Counter()
    for row in rows:
        try:
            if row.rejected is not None or row.data is None:
                raise row.rejected or ImageRejected("missing")
            pixels.append(decode_image(row.data, _SPEC, config.limits, config.decode).pixels)
        except ImageRejected as error:
            rejected[error.reason] += 1
    counts = report.skipped.counts + skipped.counts
    names = tuple(config.labels.label_names())
    return Seen(len(pixels), dict(rejected), dict(counts), None, rows, pixels, names)


def _fill(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return value.replace("{folder}", folder).replace("{hub}", f"hf://datasets/{_REPO}")
    if isinstance(value, Mapping):
        return {key: _fill(item, folder) for key, item in value.items()}
    return [_fill(item, folder) for item in value] if isinstance(value, (list, tuple)) else value
