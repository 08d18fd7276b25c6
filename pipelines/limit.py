"""How much of the pending work a run does: for a backfill that goes on night by night."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """Limits of a run. It ends at the end of a shard, and later runs do the rest.

    `images` is the expected number of images after which no further shard is begun, `seconds` the time after which
    none is, counted from the start of the run. With `newest_first`, the shards that were planned last come first.
    """

    images: int | None = None
    seconds: float | None = None
    newest_first: bool = False


NO_LIMIT = Limit()
