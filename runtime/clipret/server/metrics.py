"""Metrics of the service for Prometheus. Labels are routes and gallery names, never values from clients."""

from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from clipret.server.service import ServedGallery

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4  # what `generate_latest` writes

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one service, in a registry of their own, because a process may have several services."""

    def __init__(self) -> None:
        self._registry = registry = _Registry()
        about = "Time from the header of a request to the end of its response, by route."
        seconds = Histogram("clipret_request_seconds", about, ["route"], registry=registry, buckets=_SECONDS)
        about = "Searches per batch."
        sizes = Histogram("clipret_batch_size", about, ["gallery"], registry=registry, buckets=_SIZES)
        about = "Requests, by route and status."
        requests = Counter("clipret_requests_total", about, ["route", "status"], registry=registry)
        # `labels` takes a lock and builds strings at every call; there are few routes and few galleries.
        self._requests, self._seconds, self._sizes = cache(requests.labels), cache(seconds.labels), cache(sizes.labels)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            route: The path of its route, as declared.
            status: The HTTP status of the response.
            seconds: From the header of the request to the end of the response.
        """
        self._requests(route, status).inc()
        self._seconds(route).observe(seconds)

    def batch(self, gallery: str, size: int) -> None:
        """Count a batch of `size` searches of a gallery."""
        self._sizes(gallery).observe(size)

    def follow(self, galleries: Collection["ServedGallery"]) -> None:
        """Include the values of these galleries in `text`. Call it once."""
        self._registry.register(_Galleries(galleries))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format, of the type CONTENT_TYPE."""
        return generate_latest(self._registry)


class _Registry(CollectorRegistry):
    """Omits the creation time of each counter; the library's switch for this is global."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _Galleries(Collector):
    """Values that are read when the metrics are requested."""

    def __init__(self, galleries: Collection["ServedGallery"]) -> None:
        self._galleries = galleries

    def collect(self) -> Iterator[Metric]:
        for kind, name, about, value in _GALLERY:
            metric = kind(name, about, labels=["gallery"])
            for served in self._galleries:
                metric.add_metric([served.name], value(served))
            yield metric


_GALLERY: tuple[
    tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, Callable[["ServedGallery"], float]], ...
] = (
    (GaugeMetricFamily, "clipret_waiting", "Searches waiting for the model.", lambda served: len(served.batcher)),
    (GaugeMetricFamily, "clipret_images", "Images of a gallery.", lambda served: served.snapshot.count),
    (
        CounterMetricFamily,
        "clipret_reloads_total",
        "Snapshots that were loaded of a gallery.",
        lambda served: served.reloads,
    ),
    (
        GaugeMetricFamily,
        "clipret_reload_failing",
        "1 while the last change of a gallery cannot be loaded.",
        lambda served: served.reload_error is not None,
    ),
)
