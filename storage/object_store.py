"""Options of libraries that reach an object store by themselves: LanceDB and Delta Lake, with Rust's `object_store`."""

from __future__ import annotations

from storage.cloud.store import allows_http
from storage.schemes import scheme_of
from storage.store import StoreOptions


def make_rust_options(uri: str, options: StoreOptions) -> dict[str, str] | None:
    """Return how such a library reaches what `storage` reaches at a URI with these options, None for a local path.

    Keys in the environment and the identities of clouds are read, and renewed, by the library itself. It has no
    profiles of AWS, so the keys of a profile are among the options: they are secret.
    """
    scheme = scheme_of(uri)
    if scheme in ("gs", "az"):
        return {"allow_http": str(allows_http(scheme)).lower()}
    if scheme != "s3":
        return None
    import boto3

    found = {"aws_virtual_hosted_style_request": "false"} if options.endpoint else {}
    if options.endpoint:
        found["aws_endpoint"] = options.endpoint
        found["allow_http"] = str(options.endpoint.startswith("http://")).lower()
    if options.region:
        found["aws_region"] = options.region
    credentials = boto3.session.Session().get_credentials()
    if credentials is not None and credentials.method in ("shared-credentials-file", "config-file", "sso"):
        keys = credentials.get_frozen_credentials()
        found |= {"aws_access_key_id": keys.access_key, "aws_secret_access_key": keys.secret_key}
        found |= {"aws_session_token": keys.token} if keys.token else {}
    return found
