"""Rewriting merged files of which some rows do not count any more, because a table names whole files."""

from __future__ import annotations

from pipelines.output.output import FINGERPRINT
from pipelines.output.schema import OutputFormat
from pipelines.output.state import OutputState
from pipelines.output.writer import OutputWriter
from pipelines.tables.changes import find_partial
from pipelines.upkeep.merging import KINDS, Compaction, merge_groups
from storage.store import StoreError

_ATTEMPTS = 3


def rewrite_partial(state: OutputState, format_: OutputFormat) -> None:
    """Write each such file without the rows that do not count, and seal a ledger that names the new file.

    This is a compaction of single files: a retry of rejected rows after a compaction leaves such files. They are
    deleted with the run's leftovers. Raises `StoreError` if other runs keep changing the shards.
    """
    output = state.output
    for _ in range(_ATTEMPTS):
        found = {kind: paths for kind in KINDS if (paths := find_partial(state.ledger, kind))}
        if not found:
            return
        # A marker of its own, that of a compaction: a run that is killed here leaves merged files.
        own = OutputState(output, state.plan, state.ledger, kind="compaction")
        writer = OutputWriter(output, format_, output.read(FINGERPRINT).decode())
        try:
            for kind, paths in found.items():
                merge_groups(own, writer, kind, [[path] for path in paths], Compaction())
        finally:
            own.retire()
        state.ledger.refresh()
    raise StoreError(f"{output.uri}: other runs changed the shards of merged files {_ATTEMPTS} times meanwhile")
