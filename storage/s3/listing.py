"""Parallel listing of an S3 bucket: the key space is split into ranges, which are listed at the same time.

S3 returns 1,000 keys for each request, and a page can be requested only when the one before is there. So a listing that
is longer than `SPLIT_PAGES` pages looks for common prefixes behind its last key (`Delimiter=/`). Each of them begins a
range, which is listed with `StartAfter`. A range that turns out to be long is split in the same way. Prefixes with few
objects share a range, so that they do not cost a request each.

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

from storage.s3.pages import Page
from storage.store import Forbidden, StoreError, show

SPLIT_PAGES = 4
"""The pages of a range that are listed before the range is split. A shorter listing makes no other requests."""
RANGE_PAGES = 8
"""The pages that a range of several prefixes should have, by the size of the prefixes before it."""
BOUNDARIES = 64
"""The most ranges that a range is split into at once."""
THREADS = 16
"""The most pages that are requested at the same time."""
HELD_PAGES = 128
"""The most pages that wait for the caller or are being requested."""

_DIRECTORY_BUCKETS = ("--x-s3", "--xa-s3")
# How names of S3 Express's buckets and of their access points end. They list in no order, and have no StartAfter.

Fetch = Callable[[dict[str, str]], Page]
"""Requests one page, with retries. Raises `StoreError`."""


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

    `last` moves on with each page. `folder` is the prefix whose common prefixes may split the range, and `inner` are
    those of them that are known already.
    """

    last: str
    until: str | None
    folder: str
    inner: list[str] = field(default_factory=list)
    token: str | None = None
    pages: deque[Page] = field(default_factory=deque)
    listed: int = 0
    split_at: int = SPLIT_PAGES
    busy: bool = False
    done: bool = False
    error: BaseException | None = None

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
        try:
            folders, more = self._find_folders(one)
        except Forbidden:  # a policy may permit only some prefixes or delimiters; the listing itself is permitted
            return []
        depth = len(one.folder)
        seen = len({key[: key.find("/", depth) + 1] for key in page.keys})
        # A page in which one prefix begins after the other tells their size. One that is all of a prefix tells nothing.
        stride = max(1, RANGE_PAGES * (seen - 1), -(-len(folders) // BOUNDARIES))
        if stride >= len(folders) > 1 or not folders:
            return []
        ranges = []
        for start in range(0, len(folders), stride):
            inner = folders[start + 1 : start + stride]
            is_last = start + stride >= len(folders)
            until = one.until if is_last else folders[start + stride]
            folder = one.folder if inner or (is_last and more) else folders[start]
            ranges.append(_Range(folders[start], until, folder, inner))
        if one.last.startswith(one.folder):
            one.folder = one.last[: one.last.find("/", depth) + 1] or one.folder
        if not self._split and not self._starts_after(ranges[0]):
            self._splits = False
            return []
        self._split = True
        one.until, one.inner = folders[0], []
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
            found = self._fetch(self._arguments | arguments)
            folders = sorted(folder for folder in found.folders if self._is_boundary(folder, one))
            slash = one.last.find("/", len(one.folder)) if one.last.startswith(one.folder) else -1
            if folders or slash < 0:
                return folders, found.token is not None
            one.folder = one.last[: slash + 1]

    def _is_boundary(self, folder: str, one: _Range) -> bool:
        # Ceph 16.2 repeats StartAfter and Prefix in its response without encoding, so a character that XML cannot hold
        # would break it. A character that stands for bytes that are not UTF-8 sorts elsewhere than those bytes.
        usable = folder.isprintable() and "\ufffd" not in folder
        return usable and one.last < folder and (one.until is None or folder < one.until)

    def _starts_after(self, second: _Range) -> bool:
        """Whether the server heeds StartAfter. The page that shows it becomes the range's first page."""
        page = self._fetch(self._arguments | {"StartAfter": second.last})
        if not page.keys or not _is_ordered(page.keys, second.last):
            return False
        second.accept(page)
        return True

    def _uri(self) -> str:
        return show(f"s3://{self._arguments['Bucket']}/{self._arguments['Prefix']}")


def _is_ordered(keys: list[str], last: str) -> bool:
    """Whether keys are in ascending order, each once, and after `last`."""
    return not keys or (last < keys[0] and all(map(lt, keys, islice(keys, 1, None))))
