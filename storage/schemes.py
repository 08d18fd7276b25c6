"""URI schemes and their stores. A new object store is one module and one entry in `SCHEMES`."""

from __future__ import annotations

import re
from collections.abc import Callable

from storage.settings import ConfigError
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


def _open_hub(options: StoreOptions) -> Store:
    from storage.hub.store import open_hub

    return open_hub(options)


SCHEMES: dict[str, Callable[[StoreOptions], Store]] = {
    "file": _open_local,
    "s3": _open_s3,
    "gs": _open_google,
    "az": _open_azure,
    "hf": _open_hub,
}
"""By scheme, the function that opens its store. A path without a scheme is a local path."""


INPUTS_ONLY = frozenset(["hf"])
"""Schemes of stores that are only read."""


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


def describe_schemes(word: str, *, written: bool = False) -> str:
    """The schemes of all stores, or only of those that are written to, for a message: `s3://, gs:// or az://`."""
    *others, last = (f"{one}://" for one in SCHEMES if one != "file" and not (written and one in INPUTS_ONLY))
    return f"{', '.join(others)} {word} {last}"


def refuse_output(uri: str) -> None:
    """Raise `ConfigError` if nothing can be written at a URI, because its store is for inputs only."""
    if (scheme := scheme_of(uri)) in INPUTS_ONLY:
        places = describe_schemes("or", written=True)
        raise ConfigError(f"{show(uri)}: {scheme}:// is for inputs only: give a folder, or a prefix in {places}")


def refuse_partial(uri: str) -> None:
    """Raise `ConfigError` for a scheme of `SCHEMES` without a bucket, or without its slashes.

    `s3://` is left when a variable of a template is not set. Taken as a path it would be a folder of this machine.
    """
    scheme, colon, rest = uri.partition(":")
    if not colon or scheme.lower() not in SCHEMES:
        return
    if not rest.startswith("//"):
        raise ConfigError(f"{show(uri)}: write {scheme.lower()}://..., or ./{show(uri)} for a folder of this name")
    if scheme.lower() != "file" and not rest.strip("/"):
        raise ConfigError(f"{show(uri)}: there is no bucket behind {scheme.lower()}://: perhaps a variable is not set")


def open_store(uri: str, options: StoreOptions = StoreOptions()) -> Store:
    """The store that holds `uri`. Raises `InvalidUri` for a scheme that is not in `SCHEMES`."""
    open_one = SCHEMES.get(scheme_of(uri) or "file")
    if open_one is None:
        raise InvalidUri(f"{show(uri)}: only local paths and {describe_schemes('and')} are supported")
    return open_one(options)
