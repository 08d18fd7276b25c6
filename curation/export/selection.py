"""The rows that an export takes: all, or those of a condition (`--where`) and of a list of images (`--keep`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curation.tagged_output import ID, TaggedOutput
from curation.where import make_where
from storage.settings import ConfigError

_ROWS = 8192


class Selection:
    """The rows of an output that an export takes, in the order of the output.

    `keep` is a list of images: a text file with a key or an id in each line, or a Parquet file with a column `id` or
    `key`. It is looked for in one pass over the output's keys, before anything else is read. Memory holds the list,
    with a list or a condition one byte for each row of the output, and one batch.

    Raises `ConfigError` if the condition or the list cannot be used, or if entries of the list name no row.
    """

    def __init__(self, output: TaggedOutput, where: str | None = None, keep: str | PathLike[str] | None = None) -> None:
        self._output = output
        self._where = make_where(where, output)
        self.notices: list[str] = []
        """What a user should know about the list, a sentence each."""
        self.without_keep = 0
        """The number of rows that are not in the list."""
        self.without_where = 0
        """The number of rows of the list, or of the output, for which the condition does not hold, after a pass."""
        self._kept: NDArray[np.bool_] | None = None
        self._known = False  # whether `_kept` has what the condition says
        if keep is not None:
            self._kept = self._find(Path(keep))
            self.without_keep = int(len(self._kept) - self._kept.sum())

    def batches(self, columns: Sequence[str], rows: int = _ROWS) -> Iterator[pa.RecordBatch]:
        """Yield the selected rows as record batches of at most `rows` rows, none of them empty.

        `columns` may include `id`. A condition is computed in the first pass that comes to its end, and every later
        pass has the same rows: `random() < 0.1` would hold for others. Raises `StoreError`, and `ConfigError` if the
        condition cannot be computed for a row.
        """
        where = None if self._known else self._where
        wanted = list(dict.fromkeys([*columns, *(where.columns if where is not None else ())]))
        masks: list[NDArray[np.bool_]] = []
        without = first = 0
        for batch in self._output.batches(wanted, rows):
            kept = np.ones(len(batch), np.bool_)
            if self._kept is not None:
                kept = self._kept[first : first + len(batch)]
            first += len(batch)
            if where is not None:
                chosen = kept & where.keep(batch) if kept.any() else kept
                without += int(kept.sum() - chosen.sum())
                masks.append(chosen)
                kept = chosen
            if kept.any():
                part = batch.select(list(columns))
                yield part if kept.all() else part.filter(pa.array(kept))
        if where is not None:
            self._kept, self._known, self.without_where = np.concatenate(masks), True, without

    def _find(self, path: Path) -> NDArray[np.bool_]:
        """Return for each row of the output whether it is in the list."""
        kinds, entries = _read_list(path)
        places = {entry: place for place, entry in enumerate(entries)}
        found = np.zeros(len(entries), np.int64)
        by_key = np.zeros(len(entries), np.int64)
        kept: list[NDArray[np.bool_]] = []
        for batch in self._output.batches([ID, "key"], _ROWS):
            mask = np.zeros(len(batch), np.bool_)
            for kind in kinds:
                for row, value in enumerate(batch[kind].to_pylist()):
                    place = places.get(value)
                    if place is not None:
                        mask[row] = True
                        found[place] += 1
                        by_key[place] += kind == "key"
            kept.append(mask)
        if missing := np.flatnonzero(found == 0).tolist():
            raise ConfigError(
                f"--keep {path}: {len(missing):,} of {len(entries):,} lines name no image of {self._output.uri}, such "
                f"as {entries[missing[0]]!r}: remove them, or write the keys as the output has them"
            )
        if several := np.flatnonzero(by_key > 1).tolist():
            self.notices.append(
                f"--keep {path}: {len(several):,} keys are those of several images, {int(by_key[several].sum()):,} in "
                f"all, such as {entries[several[0]]!r}: all of them are exported"
            )
        return np.concatenate(kept)


def _read_list(path: Path) -> tuple[tuple[str, ...], list[str]]:
    """Read a list of images: the columns that its entries may be values of, and the entries, each once."""
    kinds: tuple[str, ...] = (ID, "key")
    try:
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path) as file:
                kinds = tuple(name for name in kinds if name in file.schema_arrow.names)[:1]
                if not kinds:
                    raise ConfigError(f"--keep {path}: it has neither a column id nor a column key")
                entries = file.read(columns=list(kinds))[kinds[0]].cast(pa.string()).to_pylist()
            if None in entries:
                raise ConfigError(f"--keep {path}: the column {kinds[0]} has nulls")
        else:
            # Only line feeds end a line: keys may contain other characters that Python takes for line ends.
            text = path.read_bytes().decode("utf-8-sig")
            entries = [line.removesuffix("\r") for line in text.split("\n")]
            entries = [line for line in entries if line]
    except OSError as error:
        raise ConfigError(f"--keep {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--keep {path} is not a text file in UTF-8: {error}") from error
    except pa.ArrowException as error:
        raise ConfigError(f"--keep {path} is not a Parquet file with texts: {error}") from error
    if not entries:
        raise ConfigError(f"--keep {path}: it is empty")
    return kinds, list(dict.fromkeys(entries))
