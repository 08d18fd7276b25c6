"""Prometheus metrics of replicas and ingresses, exported by Ray's metrics agent. Outside Ray they are not exported.

In Prometheus the names begin with `ray_sightline_`. Ray Serve adds the deployment and the replica as tags.
`serve/grafana/dashboard.json` is a dashboard of these metrics.
"""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
"""Histogram boundaries for items in a batch."""
FILLS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
"""Histogram boundaries for a batch's items divided by the largest batch."""
FLUSH_SECONDS = 1.0
"""Seconds between two calls of `IngressMetrics.flush`."""


class ModelMetrics:
    """Metrics of a model replica."""

    def __init__(self) -> None:
        self._images = Counter("sightline_items", "Images and texts that the model embedded.", tag_keys=("kind",))
        self._batches = Histogram("sightline_batch_size", "Items in a forward pass.", SIZES, tag_keys=("kind",))
        self._fill = Histogram("sightline_batch_fill", "Items over the batch size.", FILLS, tag_keys=("kind",))
        self._dropped = Counter(
            "sightline_dropped", "Items dropped before the model: cancelled, expired or failed.", tag_keys=("why",)
        )

    def record_batch(self, kind: str, items: int, size: int) -> None:
        """Record a forward pass of `items`, in a batch of at most `size`. `kind` is "image" or "text"."""
        tags = {"kind": kind}
        self._images.inc(items, tags=tags)
        self._batches.observe(items, tags=tags)
        self._fill.observe(items / size, tags=tags)

    def count_dropped(self, why: str) -> None:
        """Count an item that was dropped. `why` is "cancelled", "expired" or "failed"."""
        self._dropped.inc(tags={"why": why})


class IngressMetrics:
    """Metrics of an ingress. They are summed here, and `flush` passes the sums to Ray once a second.

    Passing one number to Ray takes up to 0.1 ms, and a request has about six numbers. The distribution of latencies by
    route is in Ray Serve's own metric `ray_serve_http_request_latency_ms`.
    """

    def __init__(self) -> None:
        self._counters = {
            "requests": Counter("sightline_requests", "Requests answered.", tag_keys=("route", "status", "code")),
            "seconds": Counter("sightline_request_seconds", "Total seconds of all requests.", tag_keys=("route",)),
            "stages": Counter("sightline_stage_seconds", "Total seconds in each stage.", tag_keys=("stage",)),
            "cache": Counter("sightline_label_cache", "Label sets looked up: hit or miss.", tag_keys=("outcome",)),
            "deaths": Counter(
                "sightline_runner_deaths", "Batch runners and background tasks that ended and were replaced."
            ),
            "labels": Counter("sightline_bad_label_files", "Changed label set files that could not be used."),
            "refreshes": Counter(
                "sightline_search_refreshes", "Looks for new commits of the searched output.", tag_keys=("outcome",)
            ),
            "rejects": Counter("sightline_rejected_images", "Images that could not be read.", tag_keys=("reason",)),
        }
        self._in_flight = Gauge(
            "sightline_in_flight", "Images, texts and thousands of pairs that the ingress works on."
        )
        self._sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def record_request(self, route: str, status: int, code: str, seconds: float) -> None:
        """Record a response. `code` is the code in the error envelope, empty for a success."""
        self._add("requests", 1, route=route, status=str(status), code=code)
        self._add("seconds", seconds, route=route)

    def record_stages(self, stages: dict[str, float]) -> None:
        """Add the seconds of a request's stages."""
        for stage, seconds in stages.items():
            self._add("stages", seconds, stage=stage)

    def count_lookup(self, hit: bool) -> None:
        """Count a lookup of a label set. `hit` is whether it was cached."""
        self._add("cache", 1, outcome="hit" if hit else "miss")

    def count_reject(self, reason: str) -> None:
        """Count an image that was rejected. `reason` is a key of `siglip.images.decode.REASONS`."""
        self._add("rejects", 1, reason=reason)

    def count_deaths(self, count: int) -> None:
        """Count batch runners and background tasks that ended."""
        self._add("deaths", count)

    def count_bad_labels(self) -> None:
        """Count a changed label set file that cannot be used. The previous label set stays in use."""
        self._add("labels", 1)

    def count_refresh(self, outcome: str) -> None:
        """Count a look for new commits of the searched output: "changed", "unchanged" or "failed"."""
        self._add("refreshes", 1, outcome=outcome)

    def flush(self, in_flight: int) -> None:
        """Pass the sums to Ray, and the number of requests, images and texts that the ingress holds now."""
        sums, self._sums = self._sums, {}
        for (name, tags), value in sums.items():
            if value > 0:
                self._counters[name].inc(value, tags=dict(tags))
        self._in_flight.set(in_flight)

    def _add(self, name: str, value: float, **tags: str) -> None:
        key = (name, tuple(tags.items()))
        self._sums[key] = self._sums.get(key, 0.0) + value
