"""Errors of S3 and of its client library, translated to the errors of `storage.store`.

The messages are written for the person who configured the bucket and the credentials.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from storage.store import Changed, Forbidden, InvalidUri, NotFound, StoreError, Unreachable, show

# Codes that mean "try again later", whatever the HTTP status. So does every other 5xx, and 409 and 429.
_TRANSIENT = frozenset(("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"))
_INVALID = frozenset(("InvalidBucketName", "KeyTooLongError", "InvalidURI"))


class PastTheEnd(Changed):
    """The requested range starts at or after the end of the object."""


@contextlib.contextmanager
def translate_errors(uri: str, endpoint: str) -> Iterator[None]:
    """Raise errors of boto3, botocore and urllib3 as `StoreError`s. `uri` and `endpoint` are for the message."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        raise _explain_response(show(uri), error.response) from error
    except (BotoCoreError, ResponseParserError, HTTPError, OSError, ValueError) as error:
        raise _explain_failure(show(uri), error, endpoint) from error


def _explain_response(uri: str, response: dict[str, Any]) -> StoreError:
    """The error that an unsuccessful response of S3 stands for."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    if code == "NoSuchBucket":
        return NotFound(f"{uri}: no such bucket")
    if status == 404:
        return NotFound(f"{uri}: no such object")
    if status == 412:
        return Changed(f"{uri} changed since it was listed")
    if status == 416:
        return PastTheEnd(f"{uri} is shorter than the requested range")
    if code in _INVALID:
        return InvalidUri(f"{uri}: S3 has no such name ({code})")
    if status == 501:
        return StoreError(f"{uri}: this S3 server does not support the request ({code or status})")
    if code in _TRANSIENT or status in (409, 429) or status >= 500:
        return Unreachable(f"{uri}: S3 answered {code or status}")
    if code == "InvalidObjectState":
        return Forbidden(f"{uri}: S3 refused ({code}): the object is archived and must be restored first")
    if status in (400, 401, 403):
        return Forbidden(f"{uri}: S3 refused ({code}): check the credentials and their permissions")
    return StoreError(f"{uri}: S3 answered {code or status}")


def _explain_failure(uri: str, error: Exception, endpoint: str) -> StoreError:
    """The error for a request that was not sent, or that got no response."""
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    message = " ".join(str(error).split())
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError, boto.TokenRetrievalError)):
        return Forbidden(f"{uri}: no S3 credentials: set AWS_ACCESS_KEY_ID or AWS_PROFILE, or use a role")
    if isinstance(error, (boto.ProfileNotFound, boto.CredentialRetrievalError)):
        return Forbidden(f"{uri}: {message}")
    if isinstance(error, (boto.ParamValidationError, boto.UnsupportedS3ArnError)):
        return InvalidUri(f"{uri}: S3 has no such name: {message}")
    if isinstance(error, (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)):
        return Unreachable(f"{uri}: cannot reach S3 at {endpoint}: check AWS_ENDPOINT_URL")
    if isinstance(error, boto.SSLError):
        return Unreachable(f"{uri}: no secure connection to S3 at {endpoint}: {message}")
    # botocore raises `HTTPClientError` for everything else that happens on a connection.
    broken = (boto.HTTPClientError, ResponseParserError, boto.IncompleteReadError, HTTPError, OSError)
    if isinstance(error, broken):
        return Unreachable(f"{uri}: the connection to S3 at {endpoint} broke off or was silent: {message}")
    return StoreError(f"{uri}: {message}")  # an endpoint that is no URL, a configuration file that cannot be read
