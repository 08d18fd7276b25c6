"""An object store's server behind a proxy that injects faults, the same for S3, Google's store and Azure's."""

from __future__ import annotations

from dataclasses import dataclass

from storage.cloud.store import CloudStore
from storage.s3.store import S3Store
from storage.store import StoreOptions
from tests.support.stores import azurite as azurite_module
from tests.support.stores import google_server
from tests.support.stores.azurite import ACCOUNT, Azurite
from tests.support.stores.fault_proxy import FaultProxy
from tests.support.stores.google_server import GoogleServer
from tests.support.stores.radosgw import Radosgw

Server = Radosgw | GoogleServer | Azurite


@dataclass(frozen=True)
class Service:
    """A server, and the proxy before it."""

    scheme: str
    server: Server
    proxy: FaultProxy

    @property
    def env(self) -> dict[str, str]:
        """The environment of a client that reaches the server through the proxy."""
        return self.make_env(self.proxy.endpoint)

    def make_env(self, endpoint: str) -> dict[str, str]:
        """The environment of a client that looks for the server at another address."""
        if self.scheme == "gs":
            return google_server.make_env(endpoint)
        if self.scheme == "az":
            return azurite_module.make_env(f"{endpoint}/{ACCOUNT}")
        return {**self.server.env, "AWS_ENDPOINT_URL": endpoint}

    def open_store(self) -> S3Store | CloudStore:
        """A store for the server itself. Those of clouds read the environment when a bucket is first used."""
        if self.scheme == "s3":
            return S3Store(StoreOptions(self.server.endpoint, "us-east-1"))
        return CloudStore("gs" if self.scheme == "gs" else "az", StoreOptions())
