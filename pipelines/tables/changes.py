"""What a table lacks: the files that the ledgers name, compared with those that the table names."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.output.ledger import Ledger
from pipelines.upkeep.merging import Kind

FILES = pa.schema([("path", pa.string()), ("rows", pa.int64()), ("bytes", pa.int64())])
"""The files of a table: `path` is the name in `data/` or `rejects/`, and `bytes` the size of the file."""
TOGETHER = 100_000
"""Files that a table gets in one transaction, if it loses none. It holds about 0.5 KB of memory for each of them."""


@dataclass(frozen=True)
class Changes:
    """The files that a table gets, with the columns `FILES`, and the paths of those that it loses.

    `moved` is true if the rows stay the same: files were merged. Readers of a table's changes skip such a transaction.
    """

    added: pa.Table
    removed: pa.ChunkedArray
    moved: bool

    def take(self, count: int) -> tuple[Changes, bool]:
        """Return the first `count` files that are added, and whether these are all changes.

        If files are removed too, all changes are returned: in one transaction, no row is missing or there twice.
        """
        if len(self.removed) or len(self.added) <= count:
            return self, True
        return Changes(self.added.slice(0, count), self.removed, self.moved), False


def compare_files(wanted: pa.Table, present: pa.ChunkedArray, moved: bool) -> Changes:
    """Compare the files that a table is to have, with the columns `FILES`, with the paths of those that it has.

    Nothing else is remembered, so files that another program has put into the table are removed from it, and those that
    it has removed are added again. A file that is there twice is removed and added. `moved` tells that the ledgers
    since then only moved rows.
    """
    counts = pc.value_counts(present)
    paths, often = counts.field("values"), pc.greater(counts.field("counts"), 1)
    added = wanted.filter(pc.invert(pc.is_in(wanted["path"], paths.filter(pc.invert(often)))))
    removed = paths.filter(pc.or_(often, pc.invert(pc.is_in(paths, wanted["path"]))))
    return Changes(added, pa.chunked_array([removed]), moved and len(removed) > 0)


def list_files(ledger: Ledger, kind: Kind, first: int = 0) -> pa.Table:
    """Return the files of one kind that ledgers name from number `first` on, each once, with the columns `FILES`.

    `rows` are those that count.
    """
    tables = [table.select(FILES.names) for table in ledger.read_tables([kind], first)]
    grouped = pa.concat_tables([FILES.empty_table(), *tables]).group_by("path", use_threads=False)
    files = grouped.aggregate([("rows", "sum"), ("bytes", "max")])
    return files.set_column(0, "path", pc.replace_substring_regex(files["path"], f"^{kind}/", "")).rename_columns(
        FILES.names
    )


def find_partial(ledger: Ledger, kind: Kind) -> list[str]:
    """Return the paths of the merged files of which some rows do not count any more.

    A retry replaces the rows of its shards there, and the file stays for the rows of others. A table names whole files.
    """
    if ledger.replacing < 0:
        return []
    sizes: dict[str, int] = {}
    counts: dict[str, int] = {}
    for found, replaced in ((sizes, True), (counts, False)):
        for table in ledger.read_tables([kind], replaced=replaced):
            merged = table.filter(pc.starts_with(table["path"], f"{kind}/merged-"))
            for path, first, rows in zip(
                *(merged[name].to_pylist() for name in ("path", "first", "rows")), strict=True
            ):
                found[path] = max(sizes.get(path, 0), first + rows) if replaced else found.get(path, 0) + rows
    return [path for path, rows in counts.items() if rows < sizes[path]]
