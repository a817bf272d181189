"""The page: what was measured and what is made of it, in Markdown."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from benchmarking.handler import POSTGRES_CONNECTIONS, REDIS_CONNECTIONS
from benchmarking.loads import BEFORE, LOADS, NO_DATABASE, SERVICE, WORKERS
from benchmarking.results import FOLLOWING, WAITING, Floor, Results, floors

COSTS = "Workers, and what a change costs"
"""The heading of a table that other documents quote; those of LOADS's titles are the others."""

_FIGURES = {"rate": 0, "p50_ms": 2, "p99_ms": 1, "service_us": 0, "store_us": 0}  # and how many digits they have
_COSTS = ("rate", "predicted", "p99_ms", "statements", "service_us", "store_us", "load_us", "wal_bytes", "disk_bytes")


def page(results: Results) -> str:
    """All of it."""
    return "\n\n".join(_parts(results)) + "\n"


def _parts(results: Results) -> Iterator[str]:
    yield "# Benchmarks"
    yield (
        "`./scripts/benchmark` wrote this page, its chart, and every figure that other documents quote from it. It "
        "measures in one run, on one machine that also makes the load; the contenders take turns. Rounds: "
        f"{results.rounds}, of {results.seconds} s each. A figure is the median of the rounds, with the least and the "
        "greatest. A ratio is taken within a round, because what disturbs the machine disturbs neighbours alike."
    )
    yield "![Requests per second, each load and contender](throughput.svg)"
    yield from (f"Not measured: {name}: {why}." for name, why in results.not_measured.items())

    yield f"## Requests per second as a share of those with {NO_DATABASE}, 256 connections"
    shown = [load for load in LOADS if results.measured.get((load, 256, NO_DATABASE))]
    yield table(["", *(LOADS[load].title for load in shown)], _shares(results, shown))
    if BEFORE in results.contenders:
        yield f"## {SERVICE}, times {BEFORE}"
        head = ["", "connections", "requests/s", "p50", "p99", "service CPU", "store CPU"]
        yield table(head, _before_and_after(results))
    yield "## What it must reach"
    yield table(["", "measured", "bound", "aim", ""], map(_floor, floors(results)))

    yield "## Rates, latency, CPU"
    yield (
        "CPU time is microseconds per request: of the processes that serve, and of the server that keeps the balances "
        "with all its processes. wrk's own is not in it."
    )
    for name, load in LOADS.items():
        if rows := list(_rows(results, name)):
            yield f"### {load.title}"
            unit = "updates/s" if load.updates > 1 else "requests/s"
            yield table(["connections", "", unit, "p50 ms", "p99 ms", "service CPU µs", "store CPU µs"], rows)
    yield f"## {COSTS}"
    yield (
        "CPU time is microseconds per request; the load generator shares the cores. Bytes are those of one change: "
        "write-ahead log, and its row in the journal with both indexes. Predicted: the rate that the CPU times allow "
        "on these cores, as in [scaling.md](../scaling.md)."
    )
    head = ["", "connections", "workers", "requests/s", "predicted", "p99 ms", "statements/s"]
    yield table([*head, "service µs", "store µs", "load µs", "WAL bytes", "disk bytes"], _costs(results))
    for waiting in results.measured.get(WAITING, ()):
        yield "## Requests that wait"
        yield (
            f"{waiting['requests']:,.0f} of them, each in a connection of its own, for a row that another transaction "
            "holds; all were answered when it let go. Resident memory of the service: "
            f"{waiting['before_mb']:.0f} MB before, {waiting['waiting_mb']:.0f} MB while they waited."
        )
    for following in results.measured.get(FOLLOWING, ()):
        yield "## A reader of the feed"
        yield (
            f"One reader, in Python, follows the feed while {FOLLOWING[1]} connections make {following['rate']:,.0f} "
            "changes a second. The newest change of a page was "
            f"{following['behind_p50_ms']:,.0f} ms old when the reader had it (median; "
            f"{following['behind_max_ms']:,.0f} ms at most), and it got all {following['read']:,.0f} of them, each "
            f"once. Reading them once more took {following['pages']:,.0f} requests, at "
            f"{following['backlog_rate']:,.0f} changes a second."
        )
    yield "## The contenders"
    yield table(["", ""], results.contenders.items())
    yield (
        "The handler is one process with aiohttp, uvloop and the service's bodies. With PostgreSQL it uses the same "
        f"server as the service and {POSTGRES_CONNECTIONS} connections that are never reset, with prepared statements. "
        f"Redis is asked through up to {REDIS_CONNECTIONS}. Only the service keeps a journal and knows idempotency "
        "keys: the others do less. After each of its rounds the journal is compared with what was answered, and after "
        "each load `verify` recomputes every balance."
    )
    yield "## The machine"
    yield table(["", ""], results.machine.items())


def _shares(results: Results, shown: Sequence[str]) -> Iterator[list[str]]:
    for who in results.contenders:
        of = [results.ratios((load, 256, who), (load, 256, NO_DATABASE)) for load in shown]
        if any(of) and who != NO_DATABASE:
            yield [_named(who), *(spread(ratios, 2) for ratios in of)]


def _before_and_after(results: Results) -> Iterator[list[str]]:
    for load, connections, who in results.measured:
        if who == BEFORE:
            pair = (load, connections, SERVICE), (load, connections, BEFORE)
            ratios = (spread(results.ratios(*pair, figure), 2) for figure in _FIGURES)
            yield [LOADS[load].title, f"{connections:,}", *ratios]


def _rows(results: Results, load: str) -> Iterator[list[str]]:
    for connections in LOADS[load].contenders:
        for who in results.contenders:
            if results.measured.get(key := (load, connections, who)):
                figures = (spread(results.figures(key, figure), digits) for figure, digits in _FIGURES.items())
                yield [f"{connections:,}", _named(who), *figures]


def _costs(results: Results) -> Iterator[list[str]]:
    for load, connections in (("rows", 1), ("hot", 256), ("rows", 256)):
        for who, workers in WORKERS.items():
            if results.measured.get(key := (load, connections, who)):
                columns = (results.figures(key, figure) for figure in _COSTS)
                figures = (f"{median(column):,.0f}" if column else "-" for column in columns)
                yield [LOADS[load].title, str(connections), str(workers), *figures]


def _floor(floor: Floor) -> list[str]:
    verdict = "not measured" if not floor.measured else "ok" if floor.kept else "**missed**"
    bound = f"at {'least' if floor.at_least else 'most'} {floor.bound:g}"
    return [floor.what, spread(floor.measured, floor.digits), bound, f"{floor.aim or ''}", verdict]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _named(contender: str) -> str:
    return f"**{contender}**" if contender == SERVICE else contender


def spread(values: Sequence[float], digits: int) -> str:
    """The median, the least and the greatest, with so many digits."""
    if not values:
        return "-"
    middle, least, greatest = (f"{value:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return middle if least == greatest else f"{middle} ({least}-{greatest})"
