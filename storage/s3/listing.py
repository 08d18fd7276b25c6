"""Parallel listing of an S3 bucket: the key space is split into ranges, which are listed at the same time.

S3 returns 1,000 keys for each request, and a page can be requested only when the one before is there. So a listing that
is longer than `SPLIT_PAGES` pages looks for common prefixes behind its last key (`Delimiter=/`). Each of them begins a
range, which is listed with `StartAfter`. A range that turns out to be long is split in the same way. Prefixes with few
objects share a range, so that they do not cost a request each. A long folder of files, or of tiny folders, is split by
the next characters of the names instead.

The keys come in the order of their UTF-8 bytes, which is also the order of Python's strings: both sort by code points,
those beyond the basic multilingual plane included. At most `HELD_PAGES` pages wait for the caller.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile
from operator import lt
from typing import Any

from storage.s3.pages import Page
from storage.store import Forbidden, StoreError, show

SPLIT_PAGES = 4
"""The pages of a range that are listed before the range is split. A shorter listing makes no other requests."""
RANGE_PAGES = 8
"""The pages that a range of several prefixes should have, by the size of the prefixes before it."""
NAMES_PAGES = 16
"""The pages of a range that are listed before it is split by the characters of names, which costs more requests."""
PROBES = 24
"""The most characters of a name that are tried as the one in which the names behind it differ."""
BOUNDARIES = 64
"""The most ranges that a range is split into at once."""
THREADS = 16
"""The most pages that are requested at the same time."""
HELD_PAGES = 128
"""The most pages that wait for the caller or are being requested."""

_DIRECTORY_BUCKETS = ("--x-s3", "--xa-s3")
# How names of S3 Express's buckets and of their access points end. They list in no order, and have no StartAfter.

Fetch = Callable[[dict[str, Any]], Page]
"""Requests the page with these arguments of `list_objects_v2`, with retries. Raises `StoreError`."""


def list_pages(fetch: Fetch, bucket: str, prefix: str) -> Iterator[Page]:
    """Yield all objects whose keys begin with `prefix`, as pages, which may be shorter than S3's, or empty.

    They come in the order of the keys, or in the server's order if it lists in another one. Raises `StoreError` where a
    page cannot be had, after the pages before it.
    """
    arguments = {"Bucket": bucket, "Prefix": prefix}
    ordered, last, listed = not bucket.endswith(_DIRECTORY_BUCKETS), "", 0
    while True:
        page = fetch(arguments)
        yield page
        if page.token is None:
            return
        listed += 1
        ordered = ordered and _is_ordered(page.keys, last)
        last = page.keys[-1] if page.keys else last
        arguments["ContinuationToken"] = page.token
        if ordered and listed == SPLIT_PAGES:
            yield from _Listing(fetch, bucket, prefix, last, page).take_pages()
            return


@dataclass(eq=False)
class _Range:
    """The keys after `last` until `until`, that key included. None means the end of the listing.

    `last` moves on with each page, from `begun`. `folder` is the prefix whose common prefixes may split the range, and
    `inner` are those of them that are known already. A range `by_names` is split by the characters of names after
    `folder`.
    """

    last: str
    until: str | None
    folder: str
    inner: list[str] = field(default_factory=list)
    by_names: bool = False
    token: str | None = None
    pages: deque[Page] = field(default_factory=deque)
    listed: int = 0
    split_at: int = SPLIT_PAGES
    busy: bool = False
    done: bool = False
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.begun = self.last
        if self.by_names:
            self.split_at = RANGE_PAGES

    def accept(self, page: Page) -> None:
        """Add the next page, up to the end of the range."""
        keys, until = page.keys, self.until
        self.done = page.token is None
        if until is not None and keys and keys[-1] > until:
            stop = bisect_right(keys, until)
            page = Page(keys[:stop], page.sizes[:stop], page.etags[:stop], [], None)
            self.done = True
        if page.keys:
            self.last = page.keys[-1]
        self.token = page.token
        self.listed += 1
        self.pages.append(page)


class _Listing:
    """The ranges of a listing in the order of their keys, and the threads that list them."""

    def __init__(self, fetch: Fetch, bucket: str, prefix: str, last: str, page: Page) -> None:
        self._fetch = fetch
        self._arguments = {"Bucket": bucket, "Prefix": prefix}
        first = _Range(last, None, prefix, token=page.token, listed=SPLIT_PAGES)
        self._ranges = [first]
        self._threads = 0
        self._split = False  # from the first split on, the result relies on the server's order
        self._splits = True
        self._stopped = False
        self._changed = threading.Condition()

    def take_pages(self) -> Iterator[Page]:
        """Yield the pages in order. Closing the iterator ends the threads after their requests."""
        try:
            with self._changed:
                self._start_threads()
            while (page := self._take_page()) is not None:
                yield page
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()

    def _take_page(self) -> Page | None:
        with self._changed:
            while self._ranges:
                first = self._ranges[0]
                if first.pages:
                    self._changed.notify_all()
                    return first.pages.popleft()
                if first.error is not None:
                    raise first.error
                if first.done and not first.busy:
                    self._ranges.pop(0)
                else:
                    self._changed.wait()
        return None

    def _start_threads(self) -> None:
        for _ in range(self._threads, min(THREADS, len(self._ranges))):
            # Daemons, because a request that is not answered must not delay the end of the process.
            threading.Thread(target=self._work, name="s3-listing", daemon=True).start()
            self._threads += 1

    def _work(self) -> None:
        while True:
            with self._changed:
                while (one := self._choose()) is None and not self._stopped:
                    self._changed.wait()
                if one is None or self._stopped:
                    return
                one.busy = True
            try:
                self._advance(one)
            except BaseException as error:  # the caller gets it, where the range's next page would be
                one.error = error
            with self._changed:
                one.busy = False
                self._changed.notify_all()

    def _choose(self) -> _Range | None:
        """The first range in order of which a page may be requested now. The caller may wait for the very first."""
        held = sum(len(one.pages) + one.busy for one in self._ranges)
        for one in self._ranges:
            if one.busy or one.done or one.error is not None:
                continue
            if held < HELD_PAGES or (one is self._ranges[0] and not one.pages):
                return one
        return None

    def _advance(self, one: _Range) -> None:
        """Request the next page of a range, and split the range if it is long."""
        following = {"ContinuationToken": one.token} if one.token else {"StartAfter": one.last}
        page = self._fetch(self._arguments | following)
        if not _is_ordered(page.keys, one.last):
            if self._split:
                raise StoreError(
                    f"{self._uri()}: this S3 server lists keys in another order than that of their bytes, or listed a "
                    "key twice, so its objects cannot be listed in parts"
                )
            self._splits = False
        with self._changed:
            one.accept(page)
            self._changed.notify_all()
        if not one.done and self._splits and one.listed >= one.split_at:
            ranges = self._split_range(one, page)
            with self._changed:
                one.split_at = one.listed + SPLIT_PAGES if ranges else 2 * one.listed
                if ranges:
                    position = self._ranges.index(one) + 1
                    self._ranges[position:position] = ranges
                    self._start_threads()

    def _split_range(self, one: _Range, page: Page) -> list[_Range]:
        """The ranges behind the first boundary after the range's last key. Empty if it is not to be split."""
        boundaries: list[str] = []
        more, stride = False, 0
        if not one.by_names:
            boundaries, more = self._find_folders(one)
            depth = len(one.folder)
            seen = {key[: key.find("/", depth) + 1] for key in page.keys}
            # If a prefix begins in a page, that tells the size of the one before. If none does, nothing is known.
            stride = _choose_stride(boundaries, RANGE_PAGES * (len(seen) - 1))
        if not stride and (one.by_names or one.listed >= NAMES_PAGES):
            boundaries, passed = self._probe_names(one, page)
            stride = _choose_stride(boundaries, -(-RANGE_PAGES * passed // one.listed))
            one.by_names = bool(stride) or one.by_names
        if not stride:
            return []
        ranges = []
        for start in range(0, len(boundaries), stride):
            inner = boundaries[start + 1 : start + stride]
            is_last = start + stride >= len(boundaries)
            until = one.until if is_last else boundaries[start + stride]
            folder = one.folder if one.by_names or inner or (is_last and more) else boundaries[start]
            ranges.append(_Range(boundaries[start], until, folder, inner, one.by_names))
        if one.last.startswith(one.folder) and not one.by_names:
            one.folder = one.last[: one.last.find("/", len(one.folder)) + 1] or one.folder
        if not self._split and not self._starts_after(ranges[0]):
            self._splits = False
            return []
        self._split = True
        one.until, one.inner = boundaries[0], []
        return ranges

    def _find_folders(self, one: _Range) -> tuple[list[str], bool]:
        """The first common prefixes in the rest of a range, and whether there may be more of them.

        Descends towards the last key while there is only the prefix that holds it.
        """
        if folders := [folder for folder in one.inner if folder > one.last]:
            return folders, False
        while True:
            if not one.folder.isprintable():
                return [], False
            start = "".join(takewhile(str.isprintable, one.last))
            arguments = {"Prefix": one.folder, "Delimiter": "/"} | ({"StartAfter": start} if start else {})
            try:
                found = self._fetch(self._arguments | arguments)
            except Forbidden:  # a policy may permit only some prefixes or delimiters; the listing itself is permitted
                return [], False
            folders = sorted(folder for folder in found.folders if self._is_boundary(folder, one))
            slash = one.last.find("/", len(one.folder)) if one.last.startswith(one.folder) else -1
            if folders or slash < 0:
                return folders, found.token is not None
            one.folder = one.last[: slash + 1]

    def _probe_names(self, one: _Range, page: Page) -> tuple[list[str], int]:
        """Boundaries in the rest of a folder, by the first character in which its next names differ from the last key.

        They have the characters that the names of a page have. Also returns how many of these boundaries would have
        been passed in the range until now, which tells how much lies between two of them.
        """
        last, until, probes = one.last, one.until, 0
        for place in range(len(one.folder), len(last)) if last.startswith(one.folder) else ():
            start = last[:place]
            after = start + chr(ord(last[place]) + 1)
            if probes == PROBES or not self._is_boundary(after, one):
                continue
            probes += 1
            found = self._fetch(self._arguments | {"StartAfter": after, "MaxKeys": 1})
            first = found.keys[0] if found.keys else ""
            if len(first) <= place or not first.startswith(start) or (until is not None and first > until):
                continue
            names = (key[place:].partition("/")[0] for key in page.keys)
            characters = sorted({first[place], *"".join(name.rpartition(".")[0] or name for name in names)})
            begun = one.begun[place : place + 1] if one.begun.startswith(start) else ""
            boundaries = [start + character for character in characters if character >= first[place]]
            passed = sum(begun <= character < last[place] for character in characters)
            return [boundary for boundary in boundaries if self._is_boundary(boundary, one)], passed
        return [], 0

    def _is_boundary(self, text: str, one: _Range) -> bool:
        # Ceph 16.2 repeats StartAfter and Prefix in its response without encoding, so a character that XML cannot hold
        # would break it. A character that stands for bytes that are not UTF-8 sorts elsewhere than those bytes.
        usable = text.isprintable() and "\ufffd" not in text
        return usable and one.last < text and (one.until is None or text < one.until)

    def _starts_after(self, second: _Range) -> bool:
        """Whether the server heeds StartAfter. The page that shows it becomes the range's first page."""
        page = self._fetch(self._arguments | {"StartAfter": second.last})
        if not page.keys or not _is_ordered(page.keys, second.last):
            return False
        second.accept(page)
        return True

    def _uri(self) -> str:
        return show(f"s3://{self._arguments['Bucket']}/{self._arguments['Prefix']}")


def _choose_stride(boundaries: list[str], least: int) -> int:
    """How many boundaries a range should span, at least `least`. 0 if too little lies behind the boundaries."""
    stride = max(1, least, -(-len(boundaries) // BOUNDARIES))
    return stride if boundaries and (stride < len(boundaries) or len(boundaries) == 1) else 0


def _is_ordered(keys: list[str], last: str) -> bool:
    """Whether keys are in ascending order, each once, and after `last`."""
    return not keys or (last < keys[0] and all(map(lt, keys, islice(keys, 1, None))))
