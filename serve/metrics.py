"""Numbers for Prometheus, through Ray's own metrics agent. Outside Ray they go nowhere.

Names begin with `ray_sightline_` where Prometheus reads them. Ray Serve adds the deployment and the replica as tags.
`serve/grafana/dashboard.json` draws them.
"""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
FILLS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
STAGES = ("queue", "decode", "batch", "forward")
"""A request's stages: waiting for a decoder, decoding, waiting for a batch, the model. Also in Server-Timing."""


class ModelMetrics:
    """What a model replica counts."""

    def __init__(self) -> None:
        self._images = Counter("sightline_items", "Images and texts that the model embedded.", tag_keys=("kind",))
        self._batches = Histogram("sightline_batch_size", "Items in a forward pass.", SIZES, tag_keys=("kind",))
        self._fill = Histogram("sightline_batch_fill", "Items over the batch size.", FILLS, tag_keys=("kind",))
        self._dropped = Counter(
            "sightline_dropped", "Items dropped before the model: cancelled, expired or failed.", tag_keys=("why",)
        )

    def record_batch(self, kind: str, items: int, size: int) -> None:
        """A forward pass over `items`, where up to `size` would have fitted."""
        tags = {"kind": kind}
        self._images.inc(items, tags=tags)
        self._batches.observe(items, tags=tags)
        self._fill.observe(items / size, tags=tags)

    def count_dropped(self, why: str) -> None:
        """An item that was not computed."""
        self._dropped.inc(tags={"why": why})


class IngressMetrics:
    """What an ingress counts."""

    def __init__(self) -> None:
        self._requests = Counter("sightline_requests", "Requests answered.", tag_keys=("route", "status", "code"))
        self._latency = Histogram(
            "sightline_request_seconds", "From a request's first byte to its answer.", SECONDS, tag_keys=("route",)
        )
        self._stages = Histogram(
            "sightline_stage_seconds", "Seconds in each stage of a request.", SECONDS, tag_keys=("stage",)
        )
        self._cache = Counter("sightline_label_cache", "Label sets looked up: hit or miss.", tag_keys=("outcome",))
        self._rejects = Counter("sightline_rejected_images", "Images that could not be read.", tag_keys=("reason",))
        self._in_flight = Gauge("sightline_in_flight", "Images and texts that the ingress holds.")

    def record_request(self, route: str, status: int, code: str, seconds: float) -> None:
        """An answered request; `code` is that of the error envelope, empty for a success."""
        self._requests.inc(tags={"route": route, "status": str(status), "code": code})
        self._latency.observe(seconds, tags={"route": route})

    def record_stages(self, stages: dict[str, float]) -> None:
        """The seconds of a request's stages."""
        for stage, seconds in stages.items():
            self._stages.observe(seconds, tags={"stage": stage})

    def count_lookup(self, hit: bool) -> None:
        """A label set that was cached, or was not."""
        self._cache.inc(tags={"outcome": "hit" if hit else "miss"})

    def count_reject(self, reason: str) -> None:
        """An image that was rejected."""
        self._rejects.inc(tags={"reason": reason})

    def set_in_flight(self, items: int) -> None:
        """Items that are held now."""
        self._in_flight.set(items)
