"""The network policies as a packet filter, with real connections to the ports that Ray, Serve and S3 use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.k8s.support.pods import PODS, Network, open_network


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with open_network(PODS) as network:
        yield network


@pytest.mark.parametrize(
    ("source", "reached", "dropped"),
    [
        # Port 0 is the port that the kernel chose: an ingress calls a model replica in another pod on such a port.
        (
            "worker",
            [("worker2", 0), ("worker2", 10002), ("head", 6379), ("head", 8265), ("s3", 443)],
            [("jobhead", 6379), ("jobworker", 0), ("s3", 80), ("metadata", 80), ("metadata", 443), ("internet", 8000)],
        ),
        (
            "jobworker",
            [("jobworker2", 0), ("jobhead", 6379), ("s3", 443)],
            [("worker", 0), ("head", 8265), ("worker", 8000), ("metadata", 80), ("s3", 6443), ("internet", 80)],
        ),
        ("jobhead", [("jobworker", 0), ("s3", 443), ("internet", 6443)], [("metadata", 80), ("metadata", 6443)]),
        ("submitter", [("jobhead", 8265)], [("jobhead", 6379), ("head", 8265), ("s3", 443), ("internet", 443)]),
        ("operator", [("head", 8265), ("head", 8000), ("jobhead", 8265)], [("head", 6379), ("worker", 0)]),
        ("client", [("worker", 8000)], [("worker", 8265), ("worker", 0), ("head", 8265), ("jobhead", 8000)]),
        ("metrics", [("worker", 8080), ("jobhead", 8080)], [("head", 8265), ("worker", 8000)]),
        ("other", [], [("worker", 8000), ("head", 8265), ("jobhead", 8265), ("worker", 8080)]),
        ("internet", [], [("worker", 8000), ("head", 8265)]),
        ("head", [("dns", 53)], [("dns", 80)]),
    ],
)
def test_only_allowed_connections_are_made(
    network: Network, source: str, reached: list[tuple[str, int]], dropped: list[tuple[str, int]]
) -> None:
    found = dict(zip([*reached, *dropped], network.reaches(source, *reached, *dropped), strict=True))
    assert found == {**dict.fromkeys(reached, True), **dict.fromkeys(dropped, False)}
