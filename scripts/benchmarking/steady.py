"""An hour at full rate: what checkpoints, vacuum and a journal that grows do to rate and latency."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarking.contenders import execute, service
from benchmarking.figures import lines
from benchmarking.generators import Counted, run_wrk
from benchmarking.loads import LOADS, SERVICE
from benchmarking.machine import PAGES, ending_in_one_line, machine_of, staged
from benchmarking.report import spread, table
from benchmarking.rounds import check_answers, journal_rows_of

_CONNECTIONS = 256
_STATE = """
    SELECT num_timed + num_requested,
           (SELECT sum(autovacuum_count) FROM pg_stat_user_tables),
           pg_total_relation_size('balance_changes'),
           pg_total_relation_size('users')
      FROM pg_stat_checkpointer
"""


class Slice(NamedTuple):
    """A part of the time: changes per second, latencies; and what there was at its end."""

    rate: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    checkpoints: int
    vacuums: int
    journal_bytes: int
    users_bytes: int


def main() -> None:
    """Measure, print the page, and write it; exits with 1 where that is not possible, or something wrong was found."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark steady",
        description="Change balances at full rate for an hour, and write docs/benchmarks/steady.md and its chart.",
    )
    parser.add_argument("--minutes", type=float, default=60, help="for how long (60)")
    parser.add_argument("--slice", type=int, default=30, metavar="SECONDS", help="how long a part is (30)")
    parser.add_argument("--output", type=Path, default=PAGES, metavar="DIR", help="where to write it")
    arguments = parser.parse_args()
    count = max(4, round(arguments.minutes * 60 / arguments.slice))
    with ending_in_one_line():
        slices, machine = _measure(count, arguments.slice)
    text = "\n\n".join([*_parts(slices, arguments.slice), table(["", ""], machine)]) + "\n"
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "steady.md").write_text(text)
    minutes = [(number + 1) * arguments.slice / 60 for number in range(count)]
    (arguments.output / "steady.svg").write_text(
        lines(
            minutes,
            {"changes per second": [each.rate for each in slices], "p99, ms": [each.p99_ms for each in slices]},
            [minute for minute, begun in zip(minutes, _begun(slices), strict=True) if begun],
        )
    )


def _measure(count: int, seconds: int) -> tuple[Sequence[Slice], Sequence[tuple[str, str]]]:
    load, slices, answered = LOADS["rows"], list[Slice](), 0
    with staged() as stage:
        running = service(load, stage)
        for number in range(count):
            print(f"slice {number + 1} of {count}, {seconds} s each", file=sys.stderr, flush=True)
            counted = run_wrk(load, running.ports, _CONNECTIONS, seconds)
            check_answers(SERVICE, load, _CONNECTIONS, counted, None)
            answered += counted.answers
            latencies = counted.latencies
            slices.append(
                Slice(
                    counted.answers / counted.seconds,
                    latencies["p50_ms"],
                    latencies["p99_ms"],
                    latencies["max_ms"],
                    *map(int, execute(running.journal_url, _STATE)),
                )
            )
        rows = journal_rows_of(running)
        whole = Counted({load.status: answered}, replays=0, failures=0, seconds=count * seconds)
        check_answers(SERVICE, load, count * _CONNECTIONS, whole, rows)
        return slices, list(machine_of(stage).items())


def _begun(slices: Sequence[Slice]) -> Sequence[bool]:
    """In which slices a checkpoint began."""
    return [each.checkpoints > before.checkpoints for before, each in zip([slices[0], *slices], slices, strict=False)]


def _parts(slices: Sequence[Slice], seconds: int) -> Iterator[str]:
    yield "# At full rate"
    tenth = max(1, len(slices) // 10)
    last = slices[-1]
    yield (
        f"`./scripts/benchmark steady` wrote this page and its chart: {_CONNECTIONS} connections withdraw from 1,000 "
        f"accounts, as fast as they are answered, for {len(slices) * seconds / 60:.0f} minutes, measured in "
        f"{len(slices)} slices of {seconds} s. A figure is the median of the slices, with the least and the greatest. "
        "PostgreSQL and the load generator share the machine; PostgreSQL has its defaults."
    )
    yield "![Rate and latency over time](steady.svg)"
    begun = [each for each, begun in zip(slices, _begun(slices), strict=True) if begun]
    kinds = {
        "the first tenth": slices[:tenth],
        "all": slices,
        "those in which a checkpoint began": begun,
        "the last tenth": slices[-tenth:],
    }
    yield table(
        ["", "slices", "changes/s", "p50 ms", "p99 ms", "longest ms"],
        (
            [
                what,
                str(len(some)),
                spread([each.rate for each in some], 0),
                spread([each.p50_ms for each in some], 1),
                spread([each.p99_ms for each in some], 1),
                spread([each.max_ms for each in some], 0),
            ]
            for what, some in kinds.items()
        ),
    )
    yield (
        f"Meanwhile the journal grew to {last.journal_bytes / 1e9:.1f} GB with its indexes, the table of accounts to "
        f"{last.users_bytes / 1e6:.1f} MB (after the first slice {slices[0].users_bytes / 1e6:.1f} MB, at the median "
        f"{median(each.users_bytes for each in slices) / 1e6:.1f} MB), autovacuum ran {last.vacuums} times, and "
        f"{last.checkpoints - slices[0].checkpoints} checkpoints began. At the end the journal had every change that "
        "was answered, and `verify` found every balance right."
    )
    yield "## The machine"


if __name__ == "__main__":
    main()
