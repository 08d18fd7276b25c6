"""A batch on a CPU's cores: each takes a part of it, instead of all of them a part of every operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from threading import Barrier

import torch


class CoreThreads:
    """`count` threads, each of which runs torch's operations alone. With one, it is the calling thread's work.

    torch cuts each operation among the cores and waits for the last of them, some hundred times in a forward pass: a
    core that anything else needs for a moment keeps all of them waiting. In parts the base model embedded 16 images in
    0.83 of the time on two cores, 0.89 compiled.

    Parts have at most `rows` rows, of which each core takes the next when it is done with one; without that number
    there is a part for each core.
    """

    def __init__(self, count: int, rows: int | None = None) -> None:
        self.count = count
        self._rows = rows
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="core") if self.count > 1 else None
        if self._pool:
            together = Barrier(self.count)

            def start() -> None:
                torch.set_num_threads(1)
                torch.get_num_threads()  # else this thread's first operation would take what was set last by then
                together.wait()  # no thread takes two of these

            for started in [self._pool.submit(start) for _ in range(self.count)]:
                started.result()
            torch.set_num_threads(self.count)  # threads of others begin with what was set last

    def fill(self, count: int) -> int:
        """The size from `count` on at which all parts of a batch are equal."""
        parts = self._count_parts(count)
        return -(-count // parts) * parts

    def run(self, function: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """What `function` makes of the batches' rows, in their order.

        A core that has no more to do of one batch begins the next. A batch of fewer rows than threads stays whole, on
        all cores.
        """
        if self._pool is None:  # one after the other: a batch may be copied to a GPU while the one before is computed
            return torch.cat([_infer(function, part) for batch in batches for part in self._cut(batch)])
        cuts = [self._cut(batch) for batch in batches]
        spread = self._pool.map(partial(_infer, function), [part for cut in cuts if len(cut) > 1 for part in cut])
        outputs: list[torch.Tensor] = []
        for cut in cuts:
            outputs += islice(spread, len(cut)) if len(cut) > 1 else [_infer(function, cut[0])]
        return torch.cat(outputs)

    def run_first(self, function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> None:
        """One part on one thread, for a function that is compiled as it runs: once, and not by all at the same time."""
        cut = self._cut(rows)
        if self._pool and len(cut) > 1:
            self._pool.submit(_infer, function, cut[0]).result()
        else:
            _infer(function, cut[0])

    def _cut(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.tensor_split(rows, self._count_parts(len(rows)))

    def _count_parts(self, rows: int) -> int:
        """As many for each core, so that all are done at the same time. Fewer rows than cores are one part."""
        if rows < self.count:
            return 1
        return self.count * (-(-rows // (self.count * self._rows)) if self._rows else 1)


def _infer(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Without gradients, which each thread says for itself."""
    with torch.inference_mode():
        return function(rows)
