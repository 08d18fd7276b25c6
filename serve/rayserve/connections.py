"""The connections that HAProxy accepts: how many, and how many of them from one address."""

from __future__ import annotations

import resource
from ipaddress import IPv4Network, IPv6Network

from pydantic import BaseModel, ConfigDict, Field

CONNECTIONS = "SIGHTLINE_HAPROXY_CONNECTIONS"
"""Environment variable: a `ConnectionsConfig` as JSON, for the HAProxy that Ray Serve starts."""
FILES_PER_CONNECTION = 3
"""Open files that HAProxy reserves for each connection: the client's, the ingress's, and half a pipe, rounded up."""
OTHER_FILES = 256
"""Open files that HAProxy has besides connections, rounded up."""
SOURCES = 100_000
"""Size of HAProxy's table of addresses, more than it can have connections."""


class ConnectionsConfig(BaseModel):
    """Connections of clients. One HAProxy serves all applications of a node, so it reads them in its environment.

    `sightline serve` sets the environment. In a Ray cluster, set `CONNECTIONS` where Ray is started.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    total: int = Field(
        32_768,
        ge=64,
        le=SOURCES,
        description="Largest number of connections. It is lowered to what the limit of open files (ulimit -Hn) allows.",
    )
    per_source: int = Field(
        2048,
        ge=8,
        description="Largest number of connections from one IPv4 address or one /64 network of IPv6, at most an eighth "
        "of total; more get 429. Beyond half of it, each response closes its connection.",
    )
    new_per_second: int = Field(
        256,
        ge=8,
        description="Largest number of new connections in a second from one address or /64 network; more get 429. Each "
        "costs an ingress about a millisecond, however small its request is. Clients that keep their connections open "
        "need few.",
    )
    exempt: list[IPv4Network | IPv6Network] = Field(
        [],
        description="Addresses and networks without these limits, such as a load balancer's: 10.0.0.5, 10.1.0.0/16.",
    )


def fit_files(config: ConnectionsConfig, files: int | None = None) -> ConnectionsConfig:
    """Return the largest numbers, up to those of `config`, for which HAProxy may open enough files.

    `files` is the limit of open files; None is this process's hard limit, up to which HAProxy raises its own.
    """
    if files is None:
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    total = config.total
    if files != resource.RLIM_INFINITY:
        total = max(64, min(total, (files - OTHER_FILES) // FILES_PER_CONNECTION))
    return config.model_copy(update={"total": total, "per_source": min(config.per_source, total // 8)})


def make_rules(config: ConnectionsConfig, frontend: str, refusal: str) -> list[str]:
    """Return the lines of HAProxy's configuration that limit the connections of the section `frontend NAME`.

    `refusal` is the path of the file with the response for a connection too many.

    An address beyond its share or its rate gets the refusal; beyond one and a quarter of its share, its connections are
    reset unanswered. While more than three quarters of all connections are taken, an eighth of the share is the limit
    for new ones, so that many addresses together do not lock others out. While an address has more than half of its
    share, or all together half of the total, a connection is closed after each response: so idle connections never
    take all.
    """
    share, exempt = config.per_source, " ".join(map(str, config.exempt))
    crowded = f"{{ fe_conn({frontend}) gt {config.total * 3 // 4} }} {{ sc0_conn_cur gt {max(1, share // 8)} }}"
    return [
        f"stick-table type ipv6 size {SOURCES} expire 1m store conn_cur,conn_rate(1s)",
        # `ipmask` treats an IPv4 address that is mapped to IPv6 as IPv4.
        f"tcp-request connection track-sc0 src,ipmask(32,64){f' unless {{ src {exempt} }}' if exempt else ''}",
        f"tcp-request connection reject if {{ sc0_conn_cur gt {share + share // 4} }}",
        f"tcp-request connection set-var(sess.excess) bool(true) if {{ sc0_conn_cur gt {share} }}",
        f"tcp-request connection set-var(sess.excess) bool(true) if {{ sc0_conn_rate gt {config.new_per_second} }}",
        f"tcp-request connection set-var(sess.excess) bool(true) if {crowded}",
        f"http-request return status 429 errorfile {refusal} if {{ var(sess.excess) -m bool }}",
        f"http-after-response set-header connection close if {{ sc0_conn_cur gt {share // 2} }}",
        f"http-after-response set-header connection close if {{ fe_conn({frontend}) gt {config.total // 2} }}",
    ]
