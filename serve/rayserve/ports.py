"""The port that Ray Serve gives each replica for calls from other replicas: on the node's own address."""

from __future__ import annotations

import functools
from typing import Any

import ray.util
from grpc.aio._server import Server

_ALL = "[::]:0"


def make_private(deployment: type) -> type:
    """A deployment's class whose replicas open that port on their node's address, and not on all interfaces.

    For the class itself, before `serve.ingress` has made an application's of it.
    """

    class Private(deployment):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            _listen_on_node()
            super().__init__(*args, **options)

    return Private


def _listen_on_node() -> None:
    """From now on, what this process's gRPC servers would open on all interfaces they open on Ray's own address.

    Ray Serve binds a replica's port to "[::]:0" and has no setting for it (`_on_initialized` of its `replica.py`), and
    whoever reaches that port may have a pickle loaded. Other replicas call it at the address of the node, which a Ray
    that was started on loopback has there.
    """
    bind = Server.add_insecure_port
    if getattr(bind, "on_node", False):
        return

    @functools.wraps(bind)
    def bind_on_node(server: Server, address: str) -> int:
        if address == _ALL:
            host = ray.util.get_node_ip_address()
            address = f"[{host}]:0" if ":" in host else f"{host}:0"
        return int(bind(server, address))

    bind_on_node.on_node = True  # type: ignore[attr-defined]
    Server.add_insecure_port = bind_on_node
