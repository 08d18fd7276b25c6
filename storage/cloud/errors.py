"""Errors of obstore, translated to the errors of `storage.store`, for the person who configured the credentials."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from storage.store import Changed, Forbidden, InvalidUri, NotFound, StoreError, Unreachable, show

CREDENTIALS = {
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a service account's file, or use the identity of the machine",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or use the identity of the machine",
}
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_NO_BUCKET = re.compile(r"ContainerNotFound|NoSuchBucket")
_ARCHIVED = re.compile(r"BlobArchived|BlobBeingRehydrated")
_NO_IDENTITY = re.compile(r"token request|[Mm]etadata|credential|must be specified")
_PAST = re.compile(r'object was only|"bytes 0--1/0"')
"""Of obstore's own checks, for servers that answer a range past the end with nothing and no error."""


class PastTheEnd(Changed):
    """The requested range starts at or after the end of the object."""


@contextlib.contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Raise obstore's errors as `StoreError`s. `uri` is for the message."""
    from obstore import exceptions as obstore

    try:
        yield
    except FileNotFoundError as error:  # which obstore raises in place of its `NotFoundError`
        raise _explain_missing(show(uri), str(error)) from error
    except obstore.PreconditionError as error:
        raise Changed(f"{show(uri)} changed since it was listed") from error
    except (obstore.PermissionDeniedError, obstore.UnauthenticatedError) as error:
        raise _explain_refusal(uri, _find_status(str(error))) from error
    except obstore.InvalidPathError as error:
        raise InvalidUri(f"{show(uri)}: there is an object whose name is not supported: {_first(error)}") from error
    except (obstore.GenericError, obstore.AlreadyExistsError) as error:  # the second is what it makes of any 409
        raise _explain_failure(uri, str(error)) from error
    except (obstore.BaseError, OSError, ValueError) as error:
        raise StoreError(f"{show(uri)}: {_first(error)}") from error


def _explain_missing(shown: str, text: str) -> StoreError:
    return NotFound(f"{shown}: no such {'bucket' if _NO_BUCKET.search(text) else 'object'}")


def _explain_refusal(uri: str, status: int) -> StoreError:
    scheme = uri.partition("://")[0]
    return Forbidden(
        f"{show(uri)}: the store refused ({status or 'no access'}): check the credentials and their permissions: "
        f"{CREDENTIALS[scheme]}"
    )


def _explain_failure(uri: str, text: str) -> StoreError:
    """The error for what obstore has no type for: an unexpected status, or a request without a response."""
    shown, status = show(uri), _find_status(text)
    if status == 409 and _ARCHIVED.search(text):
        return Forbidden(f"{shown}: the object is archived and must be restored first")
    if status == 404:
        return _explain_missing(shown, text)
    if status == 412:
        return Changed(f"{shown} changed since it was listed")
    if status == 416 or (not status and _PAST.search(text)):
        return PastTheEnd(f"{shown} is shorter than the requested range")
    if status in (401, 403):
        return _explain_refusal(uri, status)
    if status in (408, 409, 429) or status >= 500:
        return Unreachable(f"{shown}: the store answered {status}")
    line = " ".join(text.partition("Debug source")[0].split())[:300]
    if status:
        return StoreError(f"{shown}: the store answered {status}: {line}")
    if _NO_IDENTITY.search(line):
        scheme = uri.partition("://")[0]
        return Forbidden(f"{shown}: no credentials: {CREDENTIALS[scheme]} ({line})")
    return Unreachable(f"{shown}: the connection broke off or was silent: {line}")


def _find_status(text: str) -> int:
    found = _STATUS.search(text)
    return int(found[1]) if found else 0


def _first(error: BaseException) -> str:
    """The message of an error in one line, without obstore's description of its causes."""
    return " ".join(str(error).partition("Debug source")[0].split())[:300]
