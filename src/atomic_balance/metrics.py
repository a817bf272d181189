"""What is counted and measured, as plain numbers that the workers share, and how Prometheus gets to see them."""

import mmap
import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from itertools import accumulate, pairwise
from typing import TypeAlias

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from atomic_balance.changes import Applied, Outcome, Refusal, Undecided
from atomic_balance.store import State

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
CHANGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
OUTCOMES = ("applied", *Refusal, *Undecided)
FAILURES = tuple(State)
GAUGES = {
    "waiting_changes": "Changes that wait for their answer",
    "pool_connections": "Connections of the pool for reads",
    "pool_idle_connections": "Those of them that are not in use",
}

_PARTS = {
    "pid": 1,
    "outcomes": len(OUTCOMES),
    "replays": 1,
    "failures": len(FAILURES),
    "gauges": len(GAUGES),
    "change_seconds": len(SECONDS) + 2,
    "statement_changes": len(CHANGES) + 2,
    "statement_seconds": len(SECONDS) + 2,
}
_SLICES = dict(
    zip(_PARTS, map(slice, *zip(*pairwise(accumulate(_PARTS.values(), initial=0)), strict=True)), strict=True)
)
_CELLS = sum(_PARTS.values())
_OUTCOME_CELL = {outcome: cell for cell, outcome in enumerate(OUTCOMES)}
_FAILURE_CELL = {state: cell for cell, state in enumerate(FAILURES)}

Cells: TypeAlias = "memoryview[float]"


class Distribution:
    """How often values fell where: `counts[i]` of them at most `bounds[i]`, the last ones above all bounds."""

    def __init__(self, bounds: Sequence[float], cells: Cells) -> None:
        self.bounds = bounds
        self._cells = cells  # the counts, then the values' sum

    @property
    def counts(self) -> list[float]:
        """The counts; one more than there are bounds."""
        return list(self._cells[:-1])

    @property
    def sum(self) -> float:
        """The sum of the values."""
        return self._cells[-1]

    def observe(self, value: float) -> None:
        """Count a value."""
        self._cells[bisect_left(self.bounds, value)] += 1
        self._cells[-1] += value

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        """The distribution as Prometheus has it."""
        names = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self.counts), strict=True))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self.sum)


class Numbers:
    """The numbers of one process, or the sum of several. Counting is an addition: a request hardly notices."""

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self._outcomes = cells[_SLICES["outcomes"]]
        self._replays = cells[_SLICES["replays"]]
        self._failures = cells[_SLICES["failures"]]
        self._gauges = cells[_SLICES["gauges"]]
        self.change_seconds = Distribution(SECONDS, cells[_SLICES["change_seconds"]])
        self.statement_changes = Distribution(CHANGES, cells[_SLICES["statement_changes"]])
        self.statement_seconds = Distribution(SECONDS, cells[_SLICES["statement_seconds"]])

    def count(self, outcome: Outcome) -> None:
        """Count an outcome that somebody was told."""
        if isinstance(outcome, Undecided):
            self._outcomes[_OUTCOME_CELL[outcome]] += 1
            return
        self._outcomes[0 if isinstance(outcome, Applied) else _OUTCOME_CELL[outcome.reason]] += 1
        self._replays[0] += outcome.replayed

    def count_failure(self, state: State) -> None:
        """Count a statement that failed."""
        self._failures[_FAILURE_CELL[state]] += 1

    @property
    def outcomes(self) -> Mapping[str, float]:
        """How many were told each outcome."""
        return dict(zip(OUTCOMES, self._outcomes, strict=True))

    @property
    def replays(self) -> float:
        """How many of the outcomes were given again."""
        return self._replays[0]

    @property
    def failures(self) -> Mapping[str, float]:
        """How many statements failed, and how."""
        return {state.name.lower(): count for state, count in zip(FAILURES, self._failures, strict=True)}

    @property
    def gauges(self) -> Mapping[str, float]:
        """The values that GAUGES names."""
        return dict(zip(GAUGES, self._gauges, strict=True))

    @property
    def pid(self) -> int:
        """The process whose numbers they are; 0: it has gone, or there was none yet."""
        return int(self.cells[0])

    def begin(self, values: Mapping[str, float]) -> None:
        """Say that this process is at work, and what its gauges show."""
        self.cells[0] = os.getpid()
        for cell, name in enumerate(GAUGES):
            self._gauges[cell] = values[name]

    def end(self) -> None:
        """Say that the process has gone. What it counted stays, so that no total ever falls."""
        self.cells[0] = 0
        for cell in range(len(GAUGES)):
            self._gauges[cell] = 0

    def __sub__(self, earlier: "Numbers") -> "Numbers":
        """What has come since `earlier`."""
        return _of(now - before for now, before in zip(self.cells, earlier.cells, strict=True))


def _of(values: Iterator[float]) -> Numbers:
    return Numbers(memoryview(array("d", values)))


def shared_numbers(count: int) -> list[Numbers]:
    """The numbers of `count` processes, in memory that a process shares with those that it forks."""
    cells = memoryview(mmap.mmap(-1, count * _CELLS * array("d").itemsize)).cast("d")
    return [Numbers(cells[start : start + _CELLS]) for start in range(0, count * _CELLS, _CELLS)]


class Metrics(Collector):
    """The numbers of one process, `own`, and of all that serve the same port.

    `gauges`: by the names of GAUGES, functions that give the values of this process.
    """

    def __init__(self, own: Numbers, everyone: Sequence[Numbers]) -> None:
        self.own = own
        self.gauges: dict[str, Callable[[], float]] = {}
        self._version = metadata.version("atomic-balance")
        self._everyone = everyone
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def publish(self) -> None:
        """Show the others what the gauges of this process say now."""
        self.own.begin({name: value() for name, value in self.gauges.items()})

    def total(self) -> Numbers:
        """The sum over all processes."""
        self.publish()
        return _of(map(sum, zip(*(numbers.cells for numbers in self._everyone), strict=True)))

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
        yield total.change_seconds.family(
            "atomic_balance_change_duration_seconds", "From a change's acceptance to its answer"
        )
        yield total.statement_changes.family("atomic_balance_statement_changes", "Changes that one statement carried")
        yield total.statement_seconds.family(
            "atomic_balance_statement_duration_seconds", "From sending a statement to its answer, the commit included"
        )
        yield _counter("atomic_balance_statement_failures", "Statements that failed", "cause", total.failures)
        for name, documentation in GAUGES.items():
            yield GaugeMetricFamily(f"atomic_balance_{name}", documentation, value=total.gauges[name])
        yield InfoMetricFamily("atomic_balance_build", "The version that runs", value={"version": self._version})
        pids = {worker: numbers.pid for worker, numbers in enumerate(self._everyone) if numbers.pid}
        yield GaugeMetricFamily("atomic_balance_workers", "Processes that serve", value=len(pids))
        yield from _of_processes(pids)


def _counter(name: str, documentation: str, label: str, counts: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _of_processes(pids: Mapping[int, int]) -> Iterator[Metric]:
    """prometheus_client's metrics of a process (memory, CPU, open files), of each worker: its number -> its pid."""
    families: dict[str, Metric] = {}
    for worker, pid in pids.items():
        for family in ProcessCollector(pid=partial(int, pid), registry=None).collect():
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [sample._replace(labels={"worker": str(worker)}) for sample in family.samples]
    yield from families.values()
