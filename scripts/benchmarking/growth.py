"""What a change costs when there is much already: journals and accounts of several sizes, which take turns."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarking.contenders import Contender, Running, Stage, execute, service
from benchmarking.loads import Load
from benchmarking.machine import PAGES, ending_in_one_line, machine_of, staged
from benchmarking.report import spread, table
from benchmarking.results import Figures, Key, Results
from benchmarking.rounds import measure

_JOURNAL_USERS = 10_000
_SIZE = "SELECT pg_table_size('{0}') / 1e9, pg_indexes_size('{0}') / 1e9"
_FIGURES = {"rate": 0, "p99_ms": 1, "service_us": 0, "store_us": 0, "wal_bytes": 0, "disk_bytes": 0}
_HEAD = ("requests/s", "p99 ms", "service CPU µs", "store CPU µs", "WAL bytes", "disk bytes")


def main() -> None:
    """Measure, print the page, and write it; exits with 1 where that is not possible, or something wrong was found."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark growth",
        description="Measure what a change costs with journals and accounts of several sizes, and write "
        "docs/benchmarks/growth.md. With these sizes it takes tens of minutes, and tens of GB of disk.",
    )
    parser.add_argument("--journals", type=int, nargs="+", default=(1_000_000, 10_000_000, 50_000_000), metavar="ROWS")
    parser.add_argument("--accounts", type=int, nargs="+", default=(1_000_000, 10_000_000), metavar="ACCOUNTS")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement (5)")
    parser.add_argument("--seconds", type=int, default=5, help="seconds of each round (5)")
    parser.add_argument("--output", type=Path, default=PAGES, metavar="DIR", help="where to write it")
    arguments = parser.parse_args()
    journals = {f"{rows:,} rows": (_JOURNAL_USERS, rows // _JOURNAL_USERS) for rows in arguments.journals}
    accounts = {f"{users:,} accounts": (users, 0) for users in arguments.accounts}
    with ending_in_one_line():
        text = "\n\n".join(_parts(journals, accounts, arguments.rounds, arguments.seconds)) + "\n"
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "growth.md").write_text(text)


Sizes = Mapping[str, tuple[int, int]]
"""By a size's name: how many accounts there are, and how many rows the journal has of each."""


def _parts(journals: Sizes, accounts: Sizes, rounds: int, seconds: int) -> Iterator[str]:
    yield "# Growth"
    yield (
        "`./scripts/benchmark growth` wrote this page: what a change costs when there is much already. Each database "
        "was filled before, and they take turns, on one machine that also makes the load. Rounds: "
        f"{rounds}, of {seconds} s each. A figure is the median of the rounds, with the least and the greatest; "
        '"times" is the ratio to the first row within a round. The load is a withdrawal from a random account, through '
        "256 connections; the latency of one connection is in columns of its own. CPU and bytes are those of one "
        "change, as on [the first page](README.md)."
    )
    with staged() as stage:
        yield "## Rows in the journal"
        yield (
            f"Of {_JOURNAL_USERS:,} accounts, in the order of time: their changes alternate. Callers' keys are UUIDs."
        )
        yield _measured(journals, "balance_changes", rounds, seconds, stage)
        yield "## Accounts"
        yield "With an empty journal; each round changes a sample of 100,000."
        yield _measured(accounts, "users", rounds, seconds, stage)
        yield "## The machine"
        yield table(["", ""], machine_of(stage).items())


def _measured(sizes: Sizes, grown: str, rounds: int, seconds: int, stage: Stage) -> str:
    """A table with a row for each size. `grown`: the table that is large."""
    gigabytes: dict[str, Sequence[float]] = {}

    def start(name: str, load: Load, stage: Stage) -> Running:
        users, changes_of_each = sizes[name]
        running = service(load, stage, users=users, changes_of_each=changes_of_each)
        gigabytes[name] = execute(running.journal_url, _SIZE.format(grown))
        return running

    contenders = {name: Contender("", partial(start, name)) for name in sizes}
    load = Load(f"growth of {grown}", {1: [*sizes], 256: [*sizes]})
    measured: dict[Key, list[Figures]] = {}
    for key, figures in measure({grown: load}, contenders, rounds, seconds, stage):
        measured.setdefault(key, []).append(figures)
    results = Results(measured, rounds, seconds, {}, {}, {})
    first = next(iter(sizes))

    def times(name: str, connections: int, figure: str) -> str:
        return spread(results.ratios((grown, connections, name), (grown, connections, first), figure), 2)

    rows = (
        [
            name,
            *(f"{size:.2f}" for size in gigabytes[name]),
            *(spread(results.figures((grown, 256, name), figure), digits) for figure, digits in _FIGURES.items()),
            times(name, 256, "rate"),
            spread(results.figures((grown, 1, name), "p50_ms"), 2),
            times(name, 1, "p50_ms"),
        ]
        for name in sizes
    )
    return table(["", "table GB", "indexes GB", *_HEAD, "requests/s, times", "one connection: p50 ms", "times"], rows)


if __name__ == "__main__":
    main()
