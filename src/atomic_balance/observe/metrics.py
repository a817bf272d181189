"""What was counted and measured, as Prometheus asks for it: the sum over all workers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from atomic_balance.observe.counting import GAUGES, Distribution, Numbers
from atomic_balance.observe.log_writer import dropped_lines


class Metrics(Collector):
    """The numbers of one process, `own`, and of all that serve the same port.

    `gauges`: by the names of GAUGES, functions that give the values of this process. `kinds_of_requests`: method, route
    and status of each, in the order of their cells; KINDS_OF_REQUESTS_MAX at most.
    """

    def __init__(self, own: Numbers, everyone: Sequence[Numbers]) -> None:
        self.own = own
        self.gauges: dict[str, Callable[[], float]] = {}
        self.kinds_of_requests: Sequence[tuple[str, str, str]] = ()
        self._dropped_log_lines = 0
        self._version = metadata.version("atomic-balance")
        self._everyone = everyone
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def publish(self) -> None:
        """Show the others what the gauges of this process say now, and what its log has dropped."""
        dropped = dropped_lines()
        self.own.count_dropped_log_lines(dropped - self._dropped_log_lines)
        self._dropped_log_lines = dropped
        self.own.begin({name: value() for name, value in self.gauges.items()})

    def total(self) -> Numbers:
        """The sum over all processes."""
        self.publish()
        return Numbers.total(self._everyone)

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: the values are not there before the service runs."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Everything, as prometheus_client asks for it."""
        total = self.total()
        yield _counter("atomic_balance_changes", "Changes answered", "outcome", total.outcomes)
        yield CounterMetricFamily("atomic_balance_replays", "Outcomes that were given again", value=total.replays)
        yield _histogram(
            total.change_seconds, "atomic_balance_change_duration_seconds", "From a change's acceptance to its answer"
        )
        yield _histogram(
            total.statement_changes, "atomic_balance_statement_changes", "Changes that one statement carried"
        )
        yield _histogram(
            total.statement_seconds,
            "atomic_balance_statement_duration_seconds",
            "From sending a statement to its answer, the commit included",
        )
        yield _counter("atomic_balance_statement_failures", "Statements that failed", "cause", total.failures)
        yield self._requests(total)
        yield CounterMetricFamily(
            "atomic_balance_log_lines_dropped", "Log lines that could not be written", value=total.dropped_log_lines
        )
        for name, documentation in GAUGES.items():
            yield GaugeMetricFamily(f"atomic_balance_{name}", documentation, value=total.gauges[name])
        yield InfoMetricFamily("atomic_balance_build", "The version that runs", value={"version": self._version})
        pids = {worker: numbers.pid for worker, numbers in enumerate(self._everyone) if numbers.pid}
        yield GaugeMetricFamily("atomic_balance_workers", "Processes that serve", value=len(pids))
        yield from _of_processes(pids)

    def _requests(self, total: Numbers) -> CounterMetricFamily:
        labels = ("method", "route", "status")
        family = CounterMetricFamily("atomic_balance_requests", "Requests answered", labels=labels)
        for cell, kind in enumerate(self.kinds_of_requests):
            family.add_metric(kind, total.requests[cell])
        return family


def _counter(name: str, documentation: str, label: str, counts: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _histogram(found: Distribution, name: str, documentation: str) -> HistogramMetricFamily:
    bounds = [*(f"{bound:g}" for bound in found.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(found.counts), strict=True))
    return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=found.sum)


def _of_processes(pids: Mapping[int, int]) -> Iterator[Metric]:
    """prometheus_client's metrics of a process (memory, CPU, open files), of each worker: its number -> its pid."""
    families: dict[str, Metric] = {}
    for worker, pid in pids.items():
        for family in ProcessCollector(pid=partial(int, pid), registry=None).collect():
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [sample._replace(labels={"worker": str(worker)}) for sample in family.samples]
    yield from families.values()
