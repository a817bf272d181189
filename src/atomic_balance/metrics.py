"""What is counted and measured, as plain numbers, and how Prometheus gets to see it."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from atomic_balance.changes import Applied, Outcome, Undecided

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
CHANGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Distribution:
    """How often values fell where: `counts[i]` of them at most `bounds[i]`, the last ones above all bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        """The distribution as Prometheus has it."""
        names = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self.counts), strict=True))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self.sum)


class Metrics(Collector):
    """All numbers of one service. Counting is an addition, so that it costs a request next to nothing.

    `gauges`: name -> what it says, and a function that gives its value when somebody looks.
    """

    def __init__(self, version: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self.replays = 0
        self.change_seconds = Distribution(SECONDS)
        self.statement_changes = Distribution(CHANGES)
        self.statement_seconds = Distribution(SECONDS)
        self.statement_failures: Counter[str] = Counter()
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self._version = version
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def count(self, outcome: Outcome) -> None:
        """Count an outcome that somebody was told."""
        if isinstance(outcome, Undecided):
            self.outcomes[outcome] += 1
            return
        self.outcomes["applied" if isinstance(outcome, Applied) else outcome.reason] += 1
        self.replays += outcome.replayed

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Everything, as prometheus_client asks for it."""
        yield _counter("atomic_balance_changes", "Changes answered", "outcome", self.outcomes)
        yield CounterMetricFamily("atomic_balance_replays", "Outcomes that were given again", value=self.replays)
        yield self.change_seconds.family(
            "atomic_balance_change_duration_seconds", "From a change's acceptance to its answer"
        )
        yield self.statement_changes.family("atomic_balance_statement_changes", "Changes that one statement carried")
        yield self.statement_seconds.family(
            "atomic_balance_statement_duration_seconds", "From sending a statement to its answer, the commit included"
        )
        yield _counter("atomic_balance_statement_failures", "Statements that failed", "cause", self.statement_failures)
        for name, (documentation, value) in self.gauges.items():
            yield GaugeMetricFamily(f"atomic_balance_{name}", documentation, value=value())
        yield InfoMetricFamily("atomic_balance_build", "The version that runs", value={"version": self._version})


def _counter(name: str, documentation: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family
