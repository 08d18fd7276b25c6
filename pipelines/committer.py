"""The driver's part of committing: which shards are complete, and Ray tasks that commit them."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import ray

from pipelines.cluster import COMMIT_CPUS, RETRIES, TOGETHER_ROWS
from pipelines.inputs.rows import WaitReason
from pipelines.output.commit import commit_shard
from pipelines.output.state import OutputState
from pipelines.output.writer import OutputWriter
from pipelines.planning.listing import Waiting
from pipelines.planning.plan import ShardRef, read_inputs_of, read_shard_inputs
from pipelines.progress import Progress
from pipelines.run_report import RunReport
from pipelines.stages.parts import ShardSummary, covers
from pipelines.stages.reader import describe_death
from storage.schemes import open_store
from storage.settings import ConfigError
from storage.store import StoreError, Unreachable

logger = logging.getLogger(__name__)

_AWAY_SHARDS, _LOOKED_AT = 4, 3
"""After so many shards in a row that could not be reached, so many of the others are looked at."""

Parts = dict[str, list[int]]
"""The URIs of a shard's parts, each with the runs of the rows that the part holds."""
_Complete = tuple[ShardRef, Parts, ShardSummary]
"""A shard whose rows are all written."""


@dataclass
class ShardTracker:
    """Tracks the shards in progress by their receipts, and finds out when a shard is complete.

    `pending` are the shards that are not complete, by name. Memory holds a few numbers for each part of the shards in
    progress. Receipts of shards that were taken are ignored; a replayed task may send them.
    """

    pending: dict[str, ShardRef]
    parts: dict[str, Parts] = field(default_factory=dict)
    summaries: dict[str, ShardSummary] = field(default_factory=dict)

    def add(self, receipt: dict[str, Any]) -> ShardSummary | None:
        """Add a receipt. Return the shard's summary if all rows are now written, or if the shard has to wait.

        Receipts may come in any order, and the one with the summary need not be the last.
        """
        shard = receipt["shard"]
        if shard not in self.pending:
            return None
        if receipt["part"]:
            self.parts.setdefault(shard, {})[receipt["part"]] = receipt["rows"]
        if receipt["summary"] is not None:
            self.summaries[shard] = ShardSummary.from_json(receipt["summary"])
        summary = self.summaries.get(shard)
        if summary is None:
            return None
        complete = bool(summary.wait) or covers([*self.parts.get(shard, {}).values()], summary.rows)
        return summary if complete else None

    def take(self, shard: str) -> tuple[ShardRef, Parts]:
        """Return a shard with its parts, and forget them."""
        self.summaries.pop(shard, None)
        return self.pending.pop(shard), self.parts.pop(shard, {})


class Committer:
    """Turns receipts into commits while the dataset runs. The commits themselves are Ray tasks.

    `count_at_once` returns how many commits may run at once: the number of shards that are read at once. A commit that
    finds no idle worker makes Ray start one, which takes longer than the commit itself.

    `waiting` are the shards that the store could not deliver, and those that could not be read or committed because of
    an unexpected exception. None of their rows are committed.
    """

    def __init__(
        self,
        state: OutputState,
        writer: OutputWriter,
        report: RunReport,
        progress: Progress,
        count_at_once: Callable[[], int],
    ) -> None:
        self.waiting: list[Waiting] = []
        self.expected = self.stopped = 0
        """Shards whose receipts were to come, and those of them that were not begun before the run's deadline."""
        self._unreachable, self._look_at = 0, _AWAY_SHARDS  # shards in a row whose input's store did not answer
        self._state = state
        self._tracker = ShardTracker({})
        self._writer = writer
        self._remote_writer = ray.put(writer)
        self._report = report
        self._progress = progress
        self._count_at_once = count_at_once
        self._complete: deque[_Complete] = deque()
        self._in_flight: dict[ray.ObjectRef[list[dict[str, Any] | str]], list[_Complete]] = {}
        self._set_aside: set[str] = set()
        self._unused_parts: list[str] = []
        self._waiting_refs: dict[str, ShardRef] = {}

    def expect(self, shards: Iterable[ShardRef]) -> None:
        """Tell of shards whose receipts will come."""
        added = {ref.name: ref for ref in shards}
        self.expected += len(added.keys() - self._tracker.pending.keys())  # one may come again, in a block of its own
        self._tracker.pending.update(added)

    def receive(self, receipt: dict[str, Any]) -> bool:
        """Add a receipt (see `pipelines.stages.sink.RECEIPT_SCHEMA`), and start a commit if a shard is complete now.

        Returns True if the store of the inputs seems to be away, so that the run should end.
        """
        self._report.add(receipt)
        rows, rejects = receipt["tagged"] + receipt["rejected"], receipt["rejected"]
        self._progress.update(rows=rows, rejects=rejects, rate=self._report.rate())
        shard = receipt["shard"]
        if shard in self._set_aside and receipt["part"]:
            self._unused_parts.append(receipt["part"])
        summary = self._tracker.add(receipt)
        if summary is not None:
            ref, parts = self._tracker.take(shard)
            if summary.wait == "unreachable":
                self._unreachable += 1
            else:
                self._unreachable, self._look_at = 0, _AWAY_SHARDS
            if summary.wait is None:
                self._report.lost += summary.lost
                self._report.add_trouble(summary.trouble)
                self._complete.append((ref, parts, summary))
            elif summary.wait == "stopped":
                self.stopped += 1
            else:
                self._set_aside.add(shard)
                self._wait(ref, parts, summary.wait, summary.detail)
        if self._in_flight:
            done, _ = ray.wait([*self._in_flight], num_returns=len(self._in_flight), timeout=0)
            self._count(done)
        self._start_commits()
        return self._is_input_away()

    def _is_input_away(self) -> bool:
        """Tell whether the store of the inputs is away, once several shards in a row could not be reached.

        Each shard takes minutes then, because every request is tried several times. So a few others are looked at.
        """
        if self._unreachable < self._look_at or not self._tracker.pending:
            return False
        self._look_at = self._unreachable + _AWAY_SHARDS
        refs = random.sample([*self._tracker.pending.values()], min(_LOOKED_AT, len(self._tracker.pending)))
        with ThreadPoolExecutor(_LOOKED_AT) as pool:
            return all(pool.map(self._is_unreachable, refs))

    def _is_unreachable(self, ref: ShardRef) -> bool:
        """Look up the first input of a shard."""
        output = self._writer.output
        try:
            [first, *_] = read_shard_inputs(output, ref)
            open_store(first.uri, output.options).stat(first.uri)
        except Unreachable:
            return True
        except (StoreError, ConfigError):
            pass
        return False

    def give_up(self, shards: int, images: int) -> None:
        """Let all shards wait that are not complete: `shards` of them, with about `images` images."""
        self._tracker.pending.clear()
        detail = f"{shards:,} shards were not tried, because {self._unreachable:,} in a row could not be reached"
        self.waiting.insert(0, Waiting("input", "unreachable", detail, images, shards))

    def count_missing(self) -> int:
        """Return the number of shards whose receipts did not all come."""
        return len(self._tracker.pending)

    def list_missing(self, blocks: int) -> Iterator[list[list[ShardRef]]]:
        """Yield the shards whose receipts did not all come, each for a block of its own, `blocks` at a time.

        The processes that read them have died, at each attempt of one shard or because of another shard of its block.
        """
        missing = iter([*self._tracker.pending.values()])
        while wave := [[ref] for ref in islice(missing, blocks)]:
            yield wave

    def set_missing_aside(self) -> None:
        """Let shards wait whose receipts did not all come, although they had blocks of their own.

        Ray keeps what the first attempt of a task has returned, and not what a later one returns in its place. So the
        summary is lost with which the last attempt says that the process died at all of them.
        """
        missing = [*self._tracker.pending.values()]
        for ref, inputs in read_inputs_of(self._writer.output, missing):
            _, parts = self._tracker.take(ref.name)
            self._wait(ref, parts, "error", describe_death(inputs))

    def list_waiting(self, inputs: Iterable[Waiting]) -> list[Waiting]:
        """Return what waits: these inputs that are not planned, and the shards. No image counts twice.

        An input that changed before its shard was committed waits with the shard, which has its planned version.
        """
        changed = {one.name for one in self.waiting if one.reason == "changed"}
        held: set[str] = set()
        refs = sorted((ref for name, ref in self._waiting_refs.items() if name in changed), key=lambda ref: ref.shard)
        for _, planned in read_inputs_of(self._writer.output, refs):
            held.update(one.uri for one in planned)
        return [one for one in inputs if one.reason != "changed" or one.name not in held] + self.waiting

    def finish(self) -> None:
        """Wait until all complete shards are committed, then delete the parts of shards that wait."""
        while self._in_flight:
            done, _ = ray.wait([*self._in_flight])
            self._count(done)
            self._start_commits()
        for part in self._unused_parts:
            self._writer.output.store.delete(part)

    def _start_commits(self) -> None:
        while self._complete and len(self._in_flight) < self._count_at_once():
            together = [self._complete.popleft()]
            rows = together[0][0].rows
            while self._complete and (rows := rows + self._complete[0][0].rows) <= TOGETHER_ROWS:
                together.append(self._complete.popleft())
            self._in_flight[_commit.remote(self._remote_writer, together)] = together

    def _count(self, done: list[ray.ObjectRef[list[dict[str, Any] | str]]]) -> None:
        for commit, results in zip(done, ray.get(done), strict=True):
            for (ref, parts, _), result in zip(self._in_flight.pop(commit), results, strict=True):
                if isinstance(result, dict):
                    self._state.add(result)
                    self._report.add_commit()
                    self._progress.update(shards=1, rate=self._report.rate())
                else:
                    self._wait(ref, parts, "error", f"shard {ref.shard}: {result}")

    def _wait(self, ref: ShardRef, parts: Parts, reason: WaitReason, detail: str) -> None:
        self._unused_parts += parts
        self.waiting.append(Waiting(ref.name, reason, detail, ref.rows))
        self._waiting_refs[ref.name] = ref
        self._progress.update(waiting=1)


@ray.remote(num_cpus=COMMIT_CPUS, max_retries=RETRIES)
def _commit(writer: OutputWriter, shards: Sequence[_Complete]) -> list[dict[str, Any] | str]:
    """Commit shards. Return the record of each, or the text of an unexpected exception, which must not stop others."""
    results: list[dict[str, Any] | str] = []
    for ref, parts, summary in shards:
        try:
            results.append(commit_shard(writer, ref, parts, summary))
        except StoreError:
            raise
        except Exception as error:
            logger.exception("shard %s", ref.shard)
            results.append(f"{type(error).__name__}: {error}")
    return results
