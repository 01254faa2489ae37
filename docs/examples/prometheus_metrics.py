"""The client's counts as Prometheus metrics, read when Prometheus asks for them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kontext_async import KontextClient


class KontextCollector(Collector):
    """Metrics of one client; register it with ``prometheus_client.REGISTRY.register``."""

    def __init__(self, client: KontextClient) -> None:
        self._client = client

    def collect(self) -> Iterator[Metric]:
        """Yield the present values."""
        stats = self._client.stats
        yield CounterMetricFamily("kontext_requests", "Requests sent.", stats.requests)
        errors = CounterMetricFamily("kontext_errors", "Polls that failed.", labels=["error"])
        for name, count in stats.errors.items():
            errors.add_metric([name], count)
        yield errors
        yield GaugeMetricFamily("kontext_waits", "Waits under way.", stats.waits)
        yield GaugeMetricFamily("kontext_pause_seconds", "Rest of the pause.", stats.pause)
        rate = float("nan") if stats.rate is None else stats.rate
        yield GaugeMetricFamily("kontext_rate_limit", "Requests per second; NaN: none known.", rate)
