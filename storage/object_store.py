"""Options of libraries that reach an object store by themselves: LanceDB and Delta Lake, with Rust's `object_store`."""

from __future__ import annotations

from storage.store import StoreOptions


def make_rust_options(options: StoreOptions) -> dict[str, str]:
    """Return how such a library reaches the object store that boto3 reaches with these options.

    Keys in the environment and the identities of clouds are read, and renewed, by the library itself. It has no
    profiles, so the keys of a profile are among the options: they are secret.
    """
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
