"""GET /metrics: the scheduler's statistics as Prometheus text. The frontends count nothing of their own, so that
several of them never disagree."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final

import falcon.asgi
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shoal.frontend.health import QUERY_PATIENCE_S
from shoal.frontend.routes import Operation, Route
from shoal.frontend.service import Service
from shoal.messages import Histogram, RankStatus, Stats

_PREFIX: Final = "shoal:"
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')
_UNITS: Final = {"_ms": "milliseconds", "_us": "microseconds", "_seconds": "seconds", "_bytes": "bytes"}


def routes(service: Service) -> list[Route]:
    """The scrape."""
    return [
        Route(
            path="/metrics",
            resource=Metrics(service),
            operations={"GET": Operation(summary="Prometheus metrics", answer_media="text/plain")},
            scope="metrics",
        )
    ]


class Metrics:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Always 200: ``shoal:up`` is 0 while the scheduler does not answer."""
        stats = await self._service.switchboard.query(QUERY_PATIENCE_S)
        resp.content_type = CONTENT_TYPE_LATEST
        resp.data = render(stats)

    on_head = on_get


def render(stats: Stats | None) -> bytes:
    """The Prometheus text for ``stats``."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_StatsCollector(stats))
    return generate_latest(registry)


class _StatsCollector(Collector):
    """One scrape."""

    def __init__(self, stats: Stats | None) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """Families in the order of the statistics."""
        stats = self._stats
        yield _gauge("up", {}, float(stats is not None))
        if stats is None:
            return
        yield _gauge("ready", {}, float(stats.ready))
        yield _gauge("stalled_ms", {}, float(stats.stalled_ms))
        yield _rank_info(stats.ranks)
        yield from _families(stats.gauges, GaugeMetricFamily)
        yield from _families(stats.counters, CounterMetricFamily)
        for key, histogram in stats.histograms.items():
            yield _histogram(key, histogram)


def _gauge(name: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, _help(name), labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _rank_info(ranks: Sequence[RankStatus]) -> Metric:
    """1 for each rank that there is: what it computes on is in the labels."""
    family = GaugeMetricFamily(_PREFIX + "rank_info", _help("rank_info"), labels=["rank", "device", "level"])
    for rank in ranks:
        if rank.device:
            family.add_metric([str(rank.rank), rank.device, rank.level], 1.0)
    return family


def _families(
    values: dict[str, float], make: type[GaugeMetricFamily] | type[CounterMetricFamily]
) -> Iterator[Metric]:
    """One family a name; the samples of one name differ in their labels."""
    families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
    for key, value in values.items():
        name, labels = _split(key)
        if name not in families:
            families[name] = make(_PREFIX + name, _help(name), labels=list(labels))
        families[name].add_metric(list(labels.values()), value)
    yield from families.values()


def _histogram(key: str, histogram: Histogram) -> Metric:
    name, labels = _split(key)
    family = HistogramMetricFamily(_PREFIX + name, _help(name), labels=list(labels))
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(map(float, histogram.counts)), strict=True))
    family.add_metric(list(labels.values()), buckets, histogram.total)
    return family


def _split(key: str) -> tuple[str, dict[str, str]]:
    """``name{label="value"}`` to its parts."""
    name, _, labels = key.partition("{")
    return name, dict(_LABEL.findall(labels))


def _help(name: str) -> str:
    words = name.removesuffix("_total").replace("_", " ")
    unit = next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), "")
    return f"{words} ({unit})" if unit else words
