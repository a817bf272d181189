"""What was measured, the ratios that are made of it, and what the service must reach."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from benchmarking.loads import BARE_UPDATE, FOR_UPDATE, FOUR_PROCESSES, LOADS, NO_DATABASE, SERVICE, WORKERS

Key = tuple[str, int, str]
"""Load, connections, contender."""

WAITING: Key = ("waiting", 10_000, SERVICE)
"""What is none of LOADS: very many requests that wait, once."""

FOLLOWING: Key = ("following", 256, SERVICE)
"""Nor is this: one reader of the feed, while others change balances."""

Figures = Mapping[str, float]
"""What was measured of a contender in one round.

`rate`: updates per second; `p50_ms` and `p99_ms` of a request; `service_us`, `store_us` and `load_us`: CPU time of a
request, of the processes that serve, of the server that keeps the balances, of the load generator. Of the service also
`statements` per second; `wal_bytes` and `disk_bytes` of a change, its write-ahead log and its row in the journal with
both indexes; `lock_failures`, deadlocks and lock timeouts in all; `predicted`: the rate that the CPU times allow.
Of WAITING only how many `requests` there were, and the service's resident memory, `before_mb` and `waiting_mb`.
Of FOLLOWING the `rate` of the changes; `behind_p50_ms` and `behind_max_ms`, how old the newest change of a page was
when the reader had it; how many changes it `read`; and from the beginning once more, in `pages`, `backlog_rate` a
second.
"""


class Results(NamedTuple):
    """A run: rounds of so many seconds. `contenders`: what each is; `not_measured`: those that can't be, and why."""

    measured: Mapping[Key, Sequence[Figures]]
    rounds: int
    seconds: int
    contenders: Mapping[str, str]
    not_measured: Mapping[str, str]
    machine: Mapping[str, str]

    def figures(self, key: Key, figure: str) -> list[float]:
        """One figure of each round; none if it was not measured."""
        return [figures[figure] for figures in self.measured.get(key, ()) if figure in figures]

    def ratios(self, above: Key, below: Key, figure: str = "rate") -> list[float]:
        """The ratio in each round: neighbours in time, so that what disturbs the machine falls on both."""
        pairs = zip(self.figures(above, figure), self.figures(below, figure), strict=False)
        return [one / other for one, other in pairs if other]


class Floor(NamedTuple):
    """A floor or a ceiling, what was measured (nothing: empty), and the aim if there is one."""

    what: str
    measured: Sequence[float]
    bound: float
    at_least: bool = True
    aim: float | None = None
    digits: int = 2

    @property
    def kept(self) -> bool:
        """Whether the median keeps the bound."""
        return median(self.measured) >= self.bound if self.at_least else median(self.measured) <= self.bound


def floors(results: Results) -> Iterator[Floor]:
    """All of them, in order."""

    def ratio(load: str, contender: str, connections: int = 256, figure: str = "rate") -> list[float]:
        return results.ratios((load, connections, SERVICE), (load, connections, contender), figure)

    for load, bound, aim in (("hot", 0.75, 0.9), ("exhausted", 0.75, 0.9), ("rows", 0.6, 0.8), ("replays", 0.5, 0.65)):
        yield Floor(f"{LOADS[load].title}: rate, of {NO_DATABASE}", ratio(load, NO_DATABASE), bound, aim=aim)
    for load, bound in (("hot", 5), ("exhausted", 1.8), ("rows", 1.8)):
        yield Floor(f"{LOADS[load].title}: rate, times {BARE_UPDATE}", ratio(load, BARE_UPDATE), bound)
    bulk = results.ratios(("bulk", 16, SERVICE), ("rows", 256, SERVICE))
    yield Floor(f"{LOADS['bulk'].title}: updates/s, times single requests", bulk, 4)
    for load in ("holds", "captures"):
        updates = results.ratios((load, 256, SERVICE), ("hot", 256, SERVICE))
        yield Floor(f"{LOADS[load].title}: rate, of updates", updates, 0.8)
    for load, bound, aim, times in (("one payee", 0.5, 0.7, 7), ("transfers", 0.4, 0.6, 2)):
        yield Floor(f"{LOADS[load].title}: rate, of {NO_DATABASE}", ratio(load, NO_DATABASE), bound, aim=aim)
        yield Floor(f"{LOADS[load].title}: rate, times {FOR_UPDATE}", ratio(load, FOR_UPDATE), times)
    lone = results.ratios(("transfers", 1, SERVICE), ("rows", 1, SERVICE), "p50_ms")
    yield Floor("a lone transfer: median latency, times an update's", lone, 1.6, at_least=False)
    latency = ratio("hot", BARE_UPDATE, 1, "p50_ms")
    yield Floor(f"one connection: median latency, times {BARE_UPDATE}", latency, 1.4, at_least=False)
    for connections in (256, 1024):
        pairs = zip(ratio("hot", NO_DATABASE, connections), ratio("hot", NO_DATABASE, 64), strict=False)
        what = f"share of {NO_DATABASE} with {connections:,} connections, of that with 64"
        yield Floor(what, [many / few for many, few in pairs], 0.9)
    cpu = ratio("hot", NO_DATABASE, figure="service_us")
    yield Floor(f"one hot row: CPU per request, times {NO_DATABASE}", cpu, 1.25, at_least=False)
    p99 = results.ratios(("fifty", 256, FOUR_PROCESSES), ("fifty", 256, SERVICE), "p99_ms")
    yield Floor("four processes on 50 rows: p99, times that of one process", p99, 4, at_least=False)
    for load in ("fifty", "fifty transfers"):
        failures = results.figures((load, 256, FOUR_PROCESSES), "lock_failures")
        what = f"four processes, {LOADS[load].title}: deadlocks and lock timeouts"
        yield Floor(what, [sum(failures)] if failures else [], 0, at_least=False, digits=0)
    off = [
        abs(predicted / rate - 1)
        for key in ((load, 256, contender) for load in ("hot", "rows") for contender in WORKERS)
        for predicted, rate in zip(results.figures(key, "predicted"), results.figures(key, "rate"), strict=False)
    ]
    yield Floor("the rate predicted from CPU times: how far from the measured one", off, 0.25, at_least=False)
    backlog = results.figures(FOLLOWING, "backlog_rate")
    yield Floor("one reader of the feed, from a backlog: changes/s", backlog, 20_000, digits=0)
    memory = results.figures(WAITING, "waiting_mb")
    yield Floor("resident memory with 10,000 requests that wait, MB", memory, 150, at_least=False, digits=0)
