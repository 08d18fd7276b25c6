"""The configured inputs as roots: what is below them, under which paths, and what was met before below another one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise

from pipelines.planning import inventory
from storage.hidden_names import is_hidden
from storage.links import LinkedFolders, RealPaths, real_path
from storage.schemes import is_remote
from storage.store import Entry


class Roots:
    """The configured inputs, each as a folder. One that is a file is a folder without anything below it.

    Local roots may be one folder under several names, or be below each other, also through links. Memory holds a hash
    of each object that is met, if it may be met once more.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        local = [_to_path(root) for root in inputs if not is_remote(root)]
        self.links = LinkedFolders(local)
        """The folders that links led to below all roots."""
        self._paths = RealPaths(local)
        self._roots = [root.rstrip("/") + "/" for root in inputs]
        # An object is met twice only if one configured input is below another, or in an inventory.
        real = [f"{_resolve_root(root)}/" for root in inputs]
        several = len(inputs) > 1 and any(map(inventory.recognizes, inputs))
        self._met: set[int] | None = set() if _are_nested(real) or several else None
        # The roots that links lead to, if an object below one may be met below another root too.
        self._linked = set() if self._met is None else {*real} - {*self._roots}

    def add(self, root: str) -> None:
        """Add a root that ends with a slash: the bucket of an inventory."""
        if root not in self._roots:
            self._roots.append(root)

    def meet(self, entry: Entry) -> bool:
        """Tell whether an object is met for the first time."""
        if self._met is None:
            return True
        identity = hash((self._resolve(entry.uri), entry.etag))
        if identity in self._met:
            return False
        self._met.add(identity)
        return True

    def key_of(self, uri: str) -> str:
        """Return the path of an object relative to the first root that holds it, or its name if it is a root."""
        return next(self._relative_paths(uri), None) or uri.rpartition("/")[2]

    def is_hidden(self, uri: str) -> bool:
        """Tell whether an object is hidden below each root that holds it. What is above does not count."""
        return all(is_hidden(path) for path in self._relative_paths(uri))

    def holds(self, folder: str) -> bool:
        """Tell whether a folder is a root, or below one by its name."""
        return any(f"{folder}/".startswith(root) for root in self._roots)

    def _relative_paths(self, uri: str) -> Iterator[str]:
        yield from (uri[len(root) :] for root in self._roots if uri.startswith(root))
        if self._linked:
            path = self._resolve(uri)
            yield from (path[len(root) :] for root in self._linked if path.startswith(root))

    def _resolve(self, uri: str) -> str:
        return uri if is_remote(uri) else self._paths.of(_to_path(uri))


def is_empty(folder: str) -> bool:
    """Tell whether a folder is empty. One that may not be read is not: the folders of the days can be looked at."""
    try:
        with os.scandir(folder) as names:
            return next(names, None) is None
    except OSError:
        return False


def _to_path(uri: str) -> str:
    return uri.removeprefix("file://")


def _resolve_root(root: str) -> str:
    """Return a configured input without a slash at its end, and a local one without links."""
    real = None if is_remote(root) else real_path(_to_path(root))
    return root.rstrip("/") if real is None else real


def _are_nested(roots: list[str]) -> bool:
    """Tell whether one root is given twice or is below another one. Each ends with a slash."""
    # Sorted, a root stands directly before those below it: the slash at its end is part of their names.
    return any(below.startswith(above) for above, below in pairwise(sorted(roots)))
