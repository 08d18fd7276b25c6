"""The Python API's functions: the batch job and its verification, as the command line runs them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import date
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import JobConfig, absolute, load_config
from storage.settings import ConfigError, check_settings, override_keys
from storage.store import Forbidden, InvalidUri, NotFound, StoreError, StoreOptions

if TYPE_CHECKING:
    from pipelines.job import Outcome
    from pipelines.limit import Limit
    from pipelines.output.output import Output
    from pipelines.preview import Preview
    from pipelines.progress import Progress
    from pipelines.upkeep.merging import Compaction
    from pipelines.upkeep.status import Status
    from pipelines.upkeep.verify import Report

CONFIG_NAME = Path("config")
"""The name of a configuration that does not come from a file, in error messages."""


def tag(
    config: JobConfig | str | PathLike[str] | None = None,
    *,
    retry_rejects: Collection[str] | None = None,
    limit: Limit | None = None,
    quiet: bool = False,
    **keys: Any,
) -> Outcome:
    """Run a batch job, as `sightline tag` does: tag every image under the input that is not yet in the output.

    `config` is a job's configuration or the path of its YAML file. `keys` replace keys of the file, or are the whole
    configuration when there is none: `tag(input="photos", output="tagged", labels=["cat", "dog"])`. A key of a section
    is written as `model={"source": "tiny"}`, which replaces the whole section, or `**{"model.source": "tiny"}`. A
    `JobConfig` takes no keys. `retry_rejects` also takes up rejected rows: those with one of these reasons, or all of
    them when it is empty. With a `limit`, a part of the work is done. Progress goes to stderr, unless `quiet`.

    Ray is started for the run, or joined if `ray.address` or RAY_ADDRESS names a cluster. A Ray that this process has
    already initialised is used as it is.

    Returns the outcome: `manifest` (counts of the whole output and, under `run`, of this run), `new_shards`,
    `rejected_fraction` (of this run's images; no error is raised when it is over `max_reject_fraction`), and `waiting`
    (inputs that could not be read now; another call takes them up).

    Raises `ConfigError`, in one line, when something must be changed and nothing was done. Raises `StoreError` or an
    exception of Ray when the run could not finish: what is committed stays, and another call continues from there. With
    `index` or `table`, also if the index or the table could not be brought up to the output after the run.
    """
    from rich.console import Console

    from pipelines.job import run_job
    from pipelines.limit import NO_LIMIT
    from sightline.indexing import check_index, index_output
    from sightline.progress import RunProgress

    job = _make_config(config, keys)
    check_index(job)
    with RunProgress(Console(file=sys.stderr, quiet=quiet, soft_wrap=True, emoji=False)) as progress:
        outcome = run_job(job, progress, retry_rejects, limit or NO_LIMIT)
    index_output(job, outcome.manifest, outcome.new_shards)
    if outcome.unpublished:
        raise StoreError(outcome.unpublished)
    return outcome


def plan(config: JobConfig | str | PathLike[str] | None = None, *, quiet: bool = False, **keys: Any) -> Preview:
    """Say what `tag` would do with this configuration, as `sightline plan` does, without writing anything.

    Raises `ConfigError` for what must be changed before a run.
    """
    from rich.console import Console

    from pipelines.preview import preview_run
    from sightline.progress import RunProgress

    job = _make_config(config, keys)
    with RunProgress(Console(file=sys.stderr, quiet=quiet, soft_wrap=True, emoji=False)) as progress:
        return preview_run(job, progress)


def verify(output: str | PathLike[str], *, remove_orphans: bool = False, since: date | None = None) -> Report:
    """Verify an output, as `sightline verify` does: read all its files, and check that every row is there once.

    Returns the report: `ok`, the counts, and `problems` in words. `remove_orphans` deletes files that no commit names;
    do not use it while a run writes to the output. With `since`, only the shards that were committed on that day or
    later (UTC) are checked. An S3 endpoint other than AWS comes from AWS_ENDPOINT_URL.

    Raises `ConfigError`, in one line, when there is no output or the credentials do not allow to read it. Raises
    `storage.store.Unreachable` when the store does not answer, and `StoreError` when the plan is damaged.
    """
    from pipelines.upkeep.verify import verify_output

    with _open(output) as opened:
        return verify_output(opened, remove_orphans=remove_orphans, since=since)


def status(output: str | PathLike[str]) -> Status:
    """Read the status of an output, as `sightline status` shows it: what is committed and waiting, and the latest runs.

    Raises `ConfigError` when there is no output, and `storage.store.Unreachable` when the store does not answer.
    """
    from pipelines.upkeep.status import read_status

    with _open(output) as opened:
        return read_status(opened)


def compact(output: str | PathLike[str], progress: Progress | None = None) -> Compaction:
    """Merge the small files of an output, as `sightline compact` does. Returns how many files there were and are.

    Raises `ConfigError` when there is no finished output, and `StoreError`.
    """
    from rich.console import Console

    from pipelines.upkeep.compaction import compact_output
    from sightline.progress import RunProgress

    with _open(output) as opened, RunProgress(Console(file=sys.stderr, quiet=True)) as quiet:
        return compact_output(opened, progress or quiet)


def publish(output: str | PathLike[str], table: str | None = None) -> list[str]:
    """Bring the tables of an output up to it, as `sightline publish` does. Returns what was done, in words.

    `table` is one to make if the output does not have it: `iceberg:CATALOG/NAMESPACE.TABLE`, or `delta`, which is also
    made if there is none. Raises `ConfigError` when there is no finished output, or a package is missing, and
    `StoreError` when it failed: the output stays as it is, and another call goes on.
    """
    from pipelines.tables.publication import publish_output

    with _open(output) as opened:
        return publish_output(opened, table).lines


def upgrade(output: str | PathLike[str]) -> int:
    """Bring an output of an earlier version to this one, as `sightline upgrade` does. Returns its number of shards.

    Raises `ConfigError` when there is no output, and `StoreError` when a commit record is damaged, or a table of the
    output cannot be brought up to it.
    """
    from pipelines.output.fingerprint import read_fingerprint
    from pipelines.output.state import read_state
    from pipelines.planning.plan import read_plan
    from pipelines.tables.publication import Publication

    with _open(output) as opened:
        plan, fingerprint = read_plan(opened, inputs=False), read_fingerprint(opened)
        if not plan.segments or fingerprint is None:
            raise ConfigError(f"{opened.uri}: there is no plan here, so this is no output of `sightline tag`")
        publication = Publication()
        state = read_state(opened, plan, publication)
        state.renew(fingerprint)
        if publication.failure:
            raise StoreError(publication.failure)
        return state.ledger.totals.shards


@contextmanager
def _open(output: str | PathLike[str]) -> Iterator[Output]:
    """Open an output for the length of a `with` block, in which some errors of the store are the user's."""
    from pipelines.output.output import Output

    try:
        yield Output(absolute(str(output)).rstrip("/"), StoreOptions.from_environment())
    except (NotFound, Forbidden, InvalidUri) as error:
        raise ConfigError(str(error)) from error


def _make_config(config: JobConfig | str | PathLike[str] | None, keys: dict[str, Any]) -> JobConfig:
    if isinstance(config, JobConfig):
        if keys:
            raise ConfigError(f"{', '.join(keys)}: change the JobConfig instead, or give the path of its YAML file")
        return config
    if config is not None:
        return load_config(Path(config), keys)
    raw: dict[str, Any] = {}
    override_keys(raw, keys, JobConfig)
    return check_settings(CONFIG_NAME, raw, JobConfig)
