"""A folder of inputs and an output: what planning and reading make of the inputs. No Ray and no model run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.config import JobConfig
from pipelines.inputs.columns import PassedColumns
from pipelines.inputs.formats import read_inputs
from pipelines.inputs.rows import Reading, Row, Skipped
from pipelines.output.output import Output
from pipelines.planning.listing import PlanReport
from pipelines.planning.plan import append_inputs, list_shards, read_plan, read_shard_inputs
from storage.store import StoreOptions

OPTIONS = StoreOptions()


def extend_plan(config: JobConfig, options: StoreOptions) -> tuple[PlanReport, pa.Schema]:
    """What a run does before it reads: the report, and the types of the passed columns."""
    columns = PassedColumns(config.parquet.columns)
    output = Output(config.output, options)
    report = append_inputs(config, output, read_plan(output, config.list_roots()), columns, lambda: None)
    assert report is not None
    return report, columns.schema()


def read_all(config: JobConfig, options: StoreOptions, skipped: Skipped) -> list[Row]:
    """Plan what is new and read everything that is planned."""
    _, columns = extend_plan(config, options)
    return read_planned(config, options, columns, skipped)


def read_planned(config: JobConfig, options: StoreOptions, columns: pa.Schema, skipped: Skipped) -> list[Row]:
    """Read everything that is planned. `columns` are the types of the passed columns."""
    output = Output(config.output, options)
    limit = config.limits.max_bytes
    last = config.fetch.runs == 1
    reading = Reading(options, limit, config.parquet, columns, config.on_changed, config.on_missing, config.fetch, last)
    refs = list_shards(output)
    rows = [row for ref in refs for _, row in read_inputs(read_shard_inputs(output, ref), reading, skipped)]
    return rows if not config.fetch.enabled else sorted(rows, key=lambda row: row.number)


class Folder:
    """An input folder, an output, and what planning and reading make of them."""

    def __init__(self, root: Path) -> None:
        self.input, self.output = root / "input", root / "output"
        self.input.mkdir()
        self.keys: dict[str, Any] = {}
        self.skipped = Skipped()

    def write(self, name: str, data: bytes) -> Path:
        path = self.input / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def config(self, **keys: Any) -> JobConfig:
        return JobConfig(**{"input": str(self.input), "output": str(self.output), "labels": ["a"], **self.keys, **keys})

    def plan(self, **keys: Any) -> PlanReport:
        """Append what is new to the plan."""
        return extend_plan(self.config(**keys), OPTIONS)[0]

    def rows(self, **keys: Any) -> list[Row]:
        """Plan what is new and read everything that is planned."""
        return read_all(self.config(**keys), OPTIONS, self.skipped)


def outcomes(rows: list[Row]) -> list[tuple[str, str | None]]:
    return [(row.key, row.rejected.reason if row.rejected else None) for row in rows]
