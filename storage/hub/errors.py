"""Errors of the hub and of its client library, translated to the errors of `storage.store`.

The messages are written for the person who named the dataset and has the token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from storage.store import Changed, Forbidden, NotFound, StoreError, Unreachable, show

PASSING = frozenset((408, 409, 425, 429, *range(500, 600)))
"""Statuses that say that the hub cannot answer now, and nothing about the dataset."""
_TOKEN = "set HF_TOKEN to a token that may read it"


class PastTheEnd(Changed):
    """The requested range starts at or after the end of the file."""


class NoRevision(NotFound):
    """The dataset has no such revision: it was never there, or a branch was deleted or its history rewritten."""


@contextlib.contextmanager
def translate_errors(uri: str, endpoint: str) -> Iterator[None]:
    """Raise errors of httpx2 and of huggingface_hub as `StoreError`s. `uri` and `endpoint` are for the message."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise StoreError(f"{show(uri)}: HF_HUB_OFFLINE is set: set it to 0 to read datasets of the hub") from None
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
        raise StoreError(f"{show(uri)}: no request can be sent to {show(endpoint)}: check HF_ENDPOINT") from error
    except (httpx2.LocalProtocolError, ValueError) as error:  # of characters that no header can have
        raise StoreError(f"{show(uri)}: the request cannot be sent: check HF_TOKEN and HF_ENDPOINT") from error
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
        raise Unreachable(
            f"{show(uri)}: cannot reach the hub at {show(endpoint)}: check the network and HF_ENDPOINT ({_line(error)})"
        ) from error
    # A client that another thread has closed raises `RuntimeError`; the next attempt has a new one.
    except (httpx2.HTTPError, httpx2.StreamError, OSError, RuntimeError) as error:
        raise Unreachable(f"{show(uri)}: the connection to the hub broke off or was silent: {_line(error)}") from error


def explain_response(uri: str, repo: str, endpoint: str, status: int, headers: Mapping[str, str]) -> StoreError:
    """The error that a response of the hub itself with a status of 400 or more stands for."""
    shown, code, message = show(uri), headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
    page = f"{endpoint}/datasets/{repo}"
    said = f" ({show(message[:200])})" if message else ""
    if status in PASSING:
        return Unreachable(f"{shown}: the hub answered {status}{said}")
    if status == 416:
        return PastTheEnd(f"{shown} is shorter than the requested range")
    if code == "GatedRepo":
        return Forbidden(f"{shown}: the dataset is gated: ask for access at {page}, and {_TOKEN}")
    if code == "RevisionNotFound":
        return NoRevision(f"{shown}: the dataset has no such revision: see its branches and tags at {page}/tree/main")
    if code == "EntryNotFound":
        return NotFound(f"{shown}: no such file in the dataset")
    if "resource is disabled" in message.lower():
        return Forbidden(f"{shown}: the hub has disabled access to this dataset{said}: see {page}")
    if status == 401 and ("credential" in message.lower() or "expired" in message.lower()):
        return Forbidden(f"{shown}: the hub refuses the token{said}: it is wrong or expired: set HF_TOKEN to a new one")
    if code == "RepoNotFound" or status == 401:
        # The hub answers the same for a private dataset as for none. It must not count as one that is missing.
        return Forbidden(f"{shown}: there is no dataset {show(repo)}, or it is private: check its name, or {_TOKEN}")
    if status == 403:
        return Forbidden(f"{shown}: the hub refused{said}: check the token's permissions: {_TOKEN}")
    if status == 404:
        return StoreError(
            f"{shown}: {show(endpoint)} answered 404, and not that a file is missing: check that HF_ENDPOINT is a hub"
        )
    return StoreError(f"{shown}: the hub answered {status}{said}")


def no_hub(uri: str, endpoint: str) -> StoreError:
    """The error for an answer that is not the hub's, such as a page to log in to a network."""
    return StoreError(
        f"{show(uri)}: {show(endpoint)} did not answer as the hub does: check HF_ENDPOINT, and whether a proxy or a "
        "login page is in between"
    )


def _line(error: BaseException) -> str:
    return show(" ".join(str(error).split())[:200] or type(error).__name__)
