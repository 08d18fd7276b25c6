"""Numbers for Prometheus, through Ray's own metrics agent. Outside Ray they go nowhere.

Names begin with `ray_sightline_` where Prometheus reads them. Ray Serve adds the deployment and the replica as tags.
`serve/grafana/dashboard.json` draws them.
"""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
FILLS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
FLUSH_SECONDS = 1.0


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
    """What an ingress counts: added up here, and handed to Ray once a second by `flush`.

    Handing over costs as much as a tenth of a millisecond each time, of which a request would pay half a dozen. Ray
    Serve's own `ray_serve_http_request_latency_ms` has the distribution of latencies by route.
    """

    def __init__(self) -> None:
        self._counters = {
            "requests": Counter("sightline_requests", "Requests answered.", tag_keys=("route", "status", "code")),
            "seconds": Counter("sightline_request_seconds", "Seconds of all requests, added up.", tag_keys=("route",)),
            "stages": Counter("sightline_stage_seconds", "Seconds in each stage, added up.", tag_keys=("stage",)),
            "cache": Counter("sightline_label_cache", "Label sets looked up: hit or miss.", tag_keys=("outcome",)),
            "deaths": Counter("sightline_runner_deaths", "Batch runners that ended and were replaced."),
            "labels": Counter("sightline_bad_label_files", "Changed label set files that could not be taken."),
            "rejects": Counter("sightline_rejected_images", "Images that could not be read.", tag_keys=("reason",)),
        }
        self._in_flight = Gauge("sightline_in_flight", "Requests, images and texts that the ingress holds.")
        self._sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def record_request(self, route: str, status: int, code: str, seconds: float) -> None:
        """An answered request; `code` is that of the error envelope, empty for a success."""
        self._add("requests", 1, route=route, status=str(status), code=code)
        self._add("seconds", seconds, route=route)

    def record_stages(self, stages: dict[str, float]) -> None:
        """The seconds of a request's stages."""
        for stage, seconds in stages.items():
            self._add("stages", seconds, stage=stage)

    def count_lookup(self, hit: bool) -> None:
        """A label set that was cached, or was not."""
        self._add("cache", 1, outcome="hit" if hit else "miss")

    def count_reject(self, reason: str) -> None:
        """An image that was rejected."""
        self._add("rejects", 1, reason=reason)

    def count_deaths(self, count: int) -> None:
        """Batch runners that ended."""
        self._add("deaths", count)

    def count_bad_labels(self) -> None:
        """A label set's file that changed to something bad; the set before stays."""
        self._add("labels", 1)

    def flush(self, in_flight: int) -> None:
        """Hand over what was counted, and how many items are held now."""
        sums, self._sums = self._sums, {}
        for (name, tags), value in sums.items():
            if value > 0:
                self._counters[name].inc(value, tags=dict(tags))
        self._in_flight.set(in_flight)

    def _add(self, name: str, value: float, **tags: str) -> None:
        key = (name, tuple(tags.items()))
        self._sums[key] = self._sums.get(key, 0.0) + value
