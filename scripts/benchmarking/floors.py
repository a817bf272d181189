"""What the service must reach, and whether it did: medians of ratios, each of two rounds that were close in time."""

from collections.abc import Iterator
from typing import NamedTuple

from benchmarking.loads import BARE_STATEMENT, BULK, EXHAUSTED, HOT, LOADS, NO_DATABASE, REPLAYS, ROWS, SERVICE
from benchmarking.results import Measurement, Results, Spread, ratios, spread


class Verdict(NamedTuple):
    """A floor (`at_least`) or a ceiling, what was measured (None: nothing), and the aim if there is one.

    `digits`: how many the measured value is shown with, behind the point.
    """

    what: str
    measured: Spread | None
    bound: float
    at_least: bool = True
    aim: float | None = None
    digits: int = 2

    @property
    def ok(self) -> bool | None:
        """Whether the median keeps the bound; None if it was not measured."""
        if self.measured is None:
            return None
        return self.measured.median >= self.bound if self.at_least else self.measured.median <= self.bound


def verdicts(results: Results) -> Iterator[Verdict]:
    """Every floor, in order."""

    def of(load: str, contender: str, connections: int = 256) -> list[Measurement]:
        return results.of(LOADS[load].title, connections, contender)

    def ratio(load: str, contender: str, connections: int = 256) -> list[float]:
        return ratios(of(load, SERVICE, connections), of(load, contender, connections))

    for load, floor, aim in ((HOT, 0.75, 0.90), (EXHAUSTED, 0.75, 0.90), (ROWS, 0.60, 0.80), (REPLAYS, 0.50, 0.65)):
        what = f"{LOADS[load].title}: throughput, of {NO_DATABASE}"
        yield Verdict(what, spread(ratio(load, NO_DATABASE)), floor, aim=aim)
    for load, floor in ((HOT, 5.0), (EXHAUSTED, 1.8), (ROWS, 1.8)):
        what = f"{LOADS[load].title}: throughput, times {BARE_STATEMENT}"
        yield Verdict(what, spread(ratio(load, BARE_STATEMENT)), floor)
    what = f"{LOADS[BULK].title}: updates/s, times single requests"
    yield Verdict(what, spread(ratios(of(BULK, SERVICE, 16), of(ROWS, SERVICE))), 4)
    latency = ratios(of(HOT, SERVICE, 1), of(HOT, BARE_STATEMENT, 1), lambda measurement: measurement.p50_ms)
    yield Verdict(f"one connection: median latency, times {BARE_STATEMENT}", spread(latency), 1.5, at_least=False)
    few = ratio(HOT, NO_DATABASE, 64)
    for connections in (256, 1024):
        kept = [many / start for many, start in zip(ratio(HOT, NO_DATABASE, connections), few, strict=False)]
        what = f"share of {NO_DATABASE} with {connections:,} connections, of that with 64"
        yield Verdict(what, spread(kept), 0.9)
    cpu = ratios(of(HOT, SERVICE), of(HOT, NO_DATABASE), lambda measurement: measurement.service_cpu_us)
    yield Verdict(f"one hot row: CPU per request, times {NO_DATABASE}", spread(cpu), 1.25, at_least=False)
    yield from _verdicts_on_processes(results)
    errors = [abs(of.reckoned_rate / of.rate - 1) for of in results.scaling if of.connections > 1]
    what = "the rate reckoned from CPU times: how far from the measured one, of all workers and loads"
    yield Verdict(what, spread(errors), 0.25, at_least=False)
    memory = [results.crowd.waiting_mb] if results.crowd else []
    yield Verdict("resident memory with 10,000 requests that wait, MB", spread(memory), 150, at_least=False, digits=0)


def _verdicts_on_processes(results: Results) -> Iterator[Verdict]:
    processes = results.processes
    p99 = [processes.p99_ms_of_all / processes.p99_ms_of_one] if processes else []
    yield Verdict("four processes on 50 rows: p99, times that of one process", spread(p99), 4, at_least=False)
    failures = [float(processes.deadlocks + processes.lock_timeouts)] if processes else []
    yield Verdict(
        "four processes on 50 rows: deadlocks and lock timeouts", spread(failures), 0, at_least=False, digits=0
    )
