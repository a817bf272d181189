"""The report: README.md and results.json of the output folder, and the summary that is printed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from benchmarking.contenders import POSTGRES_CONNECTIONS, REDIS_CONNECTIONS
from benchmarking.floors import Verdict, verdicts
from benchmarking.loads import CONTENDERS, LOADS, NO_DATABASE, SERVICE, Load
from benchmarking.results import Measurement, Results, Spread, ratios, spread

_CONNECTIONS = 256
_VERDICTS = {True: "ok", False: "**missed**", None: "not measured"}


def write_report(results: Results, folder: Path) -> None:
    """Write README.md and results.json."""
    (folder / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    (folder / "README.md").write_text("\n\n".join(_page(results)) + "\n")


def summary(results: Results) -> str:
    """What was to be reached and what was, for a terminal."""
    lines = (
        f"{_VERDICTS[verdict.ok].strip('*'):13} {_reached(verdict):20} {_bound(verdict):14} {verdict.what}"
        for verdict in verdicts(results)
    )
    return "\n".join([*lines, *(f"not measured: {text}" for text in results.not_measured)])


def _page(results: Results) -> Iterator[str]:
    yield "# Benchmarks"
    yield (
        "`./scripts/benchmark` wrote this page. Everything was measured in one run, on one machine that also made the "
        f"load. The contenders take turns; rounds: {results.rounds}, of {results.seconds} s each. A figure is the "
        "median of the rounds, with the least and the greatest. A ratio is taken within each round, because what "
        "disturbs the machine disturbs neighbours alike. [results.json](results.json) holds every round."
    )
    yield "![Updates per second, each load and contender](throughput.svg)"
    yield from (f"Not measured: {text}." for text in results.not_measured)

    yield f"## Throughput of the same handler without a database that remains, {_CONNECTIONS} connections"
    loads = [load for load in LOADS.values() if results.of(load.title, _CONNECTIONS, NO_DATABASE)]
    yield _table(["", *(load.title for load in loads)], _share_rows(results, loads))

    yield "## What it must reach"
    yield _table(
        ["", "measured", "bound", "aim", ""],
        (
            [verdict.what, _reached(verdict), _bound(verdict), _aim(verdict), _VERDICTS[verdict.ok]]
            for verdict in verdicts(results)
        ),
    )

    yield "## Rates, latency, CPU"
    yield (
        "CPU time is microseconds per request: of the process that serves, and of the server that keeps the balances "
        "with all its processes. wrk's own is not in it."
    )
    for load in LOADS.values():
        rows = list(_rate_rows(results, load))
        if rows:
            yield f"### {load.title[0].upper()}{load.title[1:]}"
            unit = "updates/s" if load.updates > 1 else "requests/s"
            yield _table(["connections", "", unit, "p50 ms", "p99 ms", "service CPU µs", "store CPU µs"], rows)

    yield from _extremes(results)

    yield "## The contenders"
    yield _table(["", ""], CONTENDERS.items())
    yield (
        "All but pgbench are one process with aiohttp, uvloop and the same bodies. Those with PostgreSQL use the same "
        f"server as the service and {POSTGRES_CONNECTIONS} connections that are never reset, with prepared statements; "
        f"Redis is asked through up to {REDIS_CONNECTIONS}. Only the service keeps a journal and knows idempotency "
        "keys: the others do less. After each of its rounds the journal is compared with what was answered, and after "
        "each load `verify` recomputes every balance."
    )
    yield "## The machine"
    yield _table(["", ""], {**results.machine, **results.versions}.items())
    yield "PostgreSQL is as initdb makes it, and durable:"
    yield _table(["", ""], results.postgres_settings.items())


def _share_rows(results: Results, loads: Sequence[Load]) -> Iterator[list[str]]:
    for contender in CONTENDERS:
        shares = [
            spread(
                ratios(
                    results.of(load.title, _CONNECTIONS, contender), results.of(load.title, _CONNECTIONS, NO_DATABASE)
                )
            )
            for load in loads
        ]
        if any(shares) and contender != NO_DATABASE:
            yield [_named(contender), *(_ratio(share) for share in shares)]


def _rate_rows(results: Results, load: Load) -> Iterator[list[str]]:
    for connections in load.contenders:
        for contender in CONTENDERS:
            rounds = results.of(load.title, connections, contender)
            if rounds:
                figures: Sequence[tuple[Callable[[Measurement], float | None], int]] = (
                    (lambda of: of.rate, 0),
                    (lambda of: of.p50_ms, 2),
                    (lambda of: of.p99_ms, 1),
                    (lambda of: of.service_cpu_us, 0),
                    (lambda of: of.store_cpu_us, 0),
                )
                cells = (_spread([figure(of) for of in rounds], digits) for figure, digits in figures)
                yield [f"{connections:,}", _named(contender), *cells]


def _extremes(results: Results) -> Iterator[str]:
    if processes := results.processes:
        yield f"## {processes.processes} processes on the same 50 rows"
        yield (
            f"{processes.connections} connections in all, for {processes.seconds} s. In PostgreSQL's log: "
            f"{processes.deadlocks} deadlocks, {processes.lock_timeouts} lock timeouts."
        )
        yield _table(
            ["", "requests/s", "p99 ms"],
            (
                ["one process", f"{processes.rate_of_one:,.0f}", f"{processes.p99_ms_of_one:.1f}"],
                [f"{processes.processes} processes", f"{processes.rate_of_all:,.0f}", f"{processes.p99_ms_of_all:.1f}"],
            ),
        )
    if results.scaling:
        yield "## Workers, and what a change costs"
        yield (
            "`WORKERS`, one connection or many. CPU time is microseconds per request; the load generator shares the "
            "cores. Bytes are those of one change: write-ahead log, and its row in the journal with both indexes. "
            "Reckoned: the rate that the CPU times allow on these cores, as in [scaling.md](../scaling.md)."
        )
        head = ["", "connections", "workers", "requests/s", "reckoned", "p99 ms", "statements/s"]
        yield _table([*head, "service µs", "store µs", "load µs", "WAL bytes", "disk bytes"], _scale_rows(results))
    if crowd := results.crowd:
        yield f"## {crowd.connections:,} connections that wait"
        fewer = "" if crowd.connections == crowd.connections_wanted else " (more files may not be opened here)"
        yield (
            f"Each with a request for a row that another transaction holds{fewer}; all were answered when it let go. "
            f"Resident memory of the service: {crowd.before_mb:.0f} MB before, {crowd.waiting_mb:.0f} MB while they "
            f"waited, {crowd.idle_mb:.0f} MB when all were answered and still connected."
        )


def _scale_rows(results: Results) -> Iterator[list[str]]:
    for scale in results.scaling:
        figures = [
            scale.rate,
            scale.reckoned_rate if scale.connections > 1 else None,  # a lone one is bound by latency
            scale.p99_ms,
            scale.statements_per_second,
            scale.service_cpu_us,
            scale.store_cpu_us,
            scale.load_cpu_us,
            scale.wal_bytes,
            scale.disk_bytes,
        ]
        yield [scale.load, str(scale.connections), str(scale.workers), *map(_figure, figures)]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _named(contender: str) -> str:
    return f"**{contender}**" if contender == SERVICE else contender


def _ratio(ratio: Spread | None) -> str:
    return _text(ratio, 2)


def _spread(values: Iterable[float | None], digits: int) -> str:
    return _text(spread([value for value in values if value is not None]), digits)


def _text(found: Spread | None, digits: int) -> str:
    if found is None:
        return "-"
    if found.least == found.greatest:
        return f"{found.median:,.{digits}f}"
    return f"{found.median:,.{digits}f} ({found.least:,.{digits}f}-{found.greatest:,.{digits}f})"


def _reached(verdict: Verdict) -> str:
    return _text(verdict.measured, verdict.digits)


def _bound(verdict: Verdict) -> str:
    return f"at {'least' if verdict.at_least else 'most'} {verdict.bound:g}"


def _aim(verdict: Verdict) -> str:
    return "" if verdict.aim is None else f"{verdict.aim:g}"
