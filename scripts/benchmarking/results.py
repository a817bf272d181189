"""What was measured, as it is kept in results.json, and the figures that are made of it."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import msgspec


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One round of one contender.

    `requests` were answered in `seconds`, each with so many `updates`. CPU time is microseconds per request: of the
    process that serves, and of the server that keeps the balances with all its children; None where there is none.
    """

    load: str
    connections: int
    contender: str
    round: int
    requests: int
    updates: int
    seconds: float
    p50_ms: float
    p99_ms: float
    service_cpu_us: float | None
    store_cpu_us: float | None

    @property
    def rate(self) -> float:
        """Updates per second."""
        return self.requests * self.updates / self.seconds


class Processes(msgspec.Struct, frozen=True, kw_only=True):
    """Several processes on the same rows, beside one with as many connections in all."""

    processes: int
    connections: int
    seconds: int
    rate_of_one: float
    rate_of_all: float
    p99_ms_of_one: float
    p99_ms_of_all: float
    deadlocks: int
    lock_timeouts: int


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """Resident memory of the service: before, with many connections of which each has a request that waits, and after
    these were answered, the connections still open.
    """

    connections: int
    connections_wanted: int
    before_mb: float
    waiting_mb: float
    idle_mb: float


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """The service with so many workers.

    CPU time is microseconds per request: of all workers, of PostgreSQL, and of the load generator, which shares the
    machine's `cores`. The bytes are those of a change: its write-ahead log, and its journal row with both indexes.
    """

    load: str
    connections: int
    workers: int
    cores: int
    rate: float
    p99_ms: float
    service_cpu_us: float
    store_cpu_us: float
    load_cpu_us: float
    statements_per_second: float
    wal_bytes: float
    disk_bytes: float

    @property
    def reckoned_rate(self) -> float:
        """The rate that the CPU times allow: a worker or the load generator uses one core at most, all together all."""
        threads = 1e6 / max(self.service_cpu_us / self.workers, self.load_cpu_us)
        machine = self.cores * 1e6 / (self.service_cpu_us + self.store_cpu_us + self.load_cpu_us)
        return min(threads, machine)


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run."""

    machine: Mapping[str, str]
    versions: Mapping[str, str]
    postgres_settings: Mapping[str, str]
    rounds: int
    seconds: int
    not_measured: Sequence[str]
    measurements: Sequence[Measurement]
    processes: Processes | None
    crowd: Crowd | None
    scaling: Sequence[Scale] = ()

    def of(self, load: str, connections: int, contender: str) -> list[Measurement]:
        """The rounds of one contender, in order; none if it was not measured."""
        return [
            measurement
            for measurement in self.measurements
            if (measurement.load, measurement.connections, measurement.contender) == (load, connections, contender)
        ]


class Spread(msgspec.Struct, frozen=True):
    """The median, the least and the greatest of several rounds."""

    median: float
    least: float
    greatest: float


def spread(values: Sequence[float]) -> Spread | None:
    """What the values spread over; None of none."""
    return Spread(median(values), min(values), max(values)) if values else None


def ratios(
    above: Sequence[Measurement],
    below: Sequence[Measurement],
    figure: Callable[[Measurement], float | None] = lambda measurement: measurement.rate,
) -> list[float]:
    """The ratio in each round: rounds of the same number are close in time, so that noise falls on both."""
    pairs = ((figure(one), figure(other)) for one, other in zip(above, below, strict=False))
    return [one / other for one, other in pairs if one is not None and other]
