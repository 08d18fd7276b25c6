"""URI schemes and their stores. A new object store is one module and one entry in `SCHEMES`."""

from __future__ import annotations

import re
from collections.abc import Callable

from storage.store import InvalidUri, Store, StoreOptions, show

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def _open_local(options: StoreOptions) -> Store:
    from storage.local import LocalStore

    return LocalStore()


def _open_s3(options: StoreOptions) -> Store:
    from storage.s3.store import open_s3  # boto3 takes half a second to import

    return open_s3(options)


def _open_google(options: StoreOptions) -> Store:
    from storage.cloud.store import open_cloud

    return open_cloud("gs", options)


def _open_azure(options: StoreOptions) -> Store:
    from storage.cloud.store import open_cloud

    return open_cloud("az", options)


SCHEMES: dict[str, Callable[[StoreOptions], Store]] = {
    "file": _open_local,
    "s3": _open_s3,
    "gs": _open_google,
    "az": _open_azure,
}
"""By scheme, the function that opens its store. A path without a scheme is a local path."""


def scheme_of(uri: str) -> str | None:
    """The scheme of a URI, such as `s3`, or None for a path without a scheme. It need not be a supported one."""
    found = _SCHEME.match(uri)
    return found[1] if found else None


def lower_scheme(uri: str) -> str:
    """A URI with its scheme in lower case, which RFC 3986 says is the same URI. What follows is unchanged."""
    scheme = scheme_of(uri)
    return uri if scheme is None else scheme.lower() + uri[len(scheme) :]


def is_remote(uri: str) -> bool:
    """Whether a URI names something in an object store, not on a disk: it has a scheme other than `file`."""
    return scheme_of(uri) not in (None, "file")


def is_web(uri: str) -> bool:
    """Whether a URI is an http(s) URL, which is no object of a store."""
    return (scheme_of(uri) or "").lower() in ("http", "https")


def open_store(uri: str, options: StoreOptions = StoreOptions()) -> Store:
    """The store that holds `uri`. Raises `InvalidUri` for a scheme that is not in `SCHEMES`."""
    open_one = SCHEMES.get(scheme_of(uri) or "file")
    if open_one is None:
        *others, last = (f"{scheme}://" for scheme in SCHEMES if scheme != "file")
        known = f"{', '.join(others)} and {last}" if others else last
        raise InvalidUri(f"{show(uri)}: only local paths and {known} are supported")
    return open_one(options)
