"""The benchmark, as short as it can be: it must run, and notice what is wrong."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from benchmarking.chart import write_chart
from benchmarking.entrants import check_journal
from benchmarking.loads import BULK, EXHAUSTED, LOADS, REPLAYS, ROWS
from benchmarking.processes import BenchmarkError
from benchmarking.results import Results
from benchmarking.wrk import Counted

from tests.processes import ROOT, run


async def benchmark(path: Path, *arguments: str) -> tuple[int, str]:
    """Run the benchmark where only the programs in `path` can be found."""
    environment = {"PATH": str(path), "PYTHONPATH": str(ROOT / "scripts")}
    return await run(sys.executable, "-m", "benchmarking", *arguments, directory=ROOT, environment=environment)


@pytest.mark.slow
async def test_it_measures_checks_and_reports(tmp_path: Path) -> None:
    wrk = shutil.which("wrk")
    if wrk is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("wrk is not installed")
    programs, output = tmp_path / "programs", tmp_path / "output"
    programs.mkdir()
    (programs / "wrk").symlink_to(wrk)
    contenders = ("no database", "atomic-balance", "Redis, fsync always")
    shortest = ("--loads", REPLAYS, BULK, "--rounds", "1", "--seconds", "1", "--output", str(output))
    status, printed = await benchmark(programs, *shortest, "--contenders", *contenders)
    assert status == 0, printed
    assert "not measured: Redis, fsync always: redis-server is not installed" in printed

    found = json.loads((output / "results.json").read_text())
    measured = [(of["load"], of["connections"], of["contender"]) for of in found["measurements"]]
    assert sorted(measured) == [
        ("1,000 rows, bulk of 500", 16, "atomic-balance"),
        ("1,000 rows, keyed, 50 % replays", 256, "atomic-balance"),
        ("1,000 rows, keyed, 50 % replays", 256, "no database"),
    ]
    assert all(of["requests"] > 0 and of["service_cpu_us"] > 0 for of in found["measurements"])
    page = (output / "README.md").read_text()
    assert "| 16 | **atomic-balance** |" in page
    assert "Not measured: Redis, fsync always" in page


async def test_it_says_what_is_missing(tmp_path: Path) -> None:
    assert await benchmark(tmp_path) == (
        1,
        "benchmark: wrk is not installed, and it makes the load (Debian: apt-get install wrk)\n",
    )


@pytest.mark.parametrize(
    ("load", "statuses", "replays", "rows"),
    [
        (ROWS, {200: 100}, 0, 99),
        (ROWS, {200: 100}, 0, 111),
        (REPLAYS, {200: 100}, 50, 49),
        (REPLAYS, {200: 100}, 50, 100),
        (BULK, {200: 2}, 0, 999),
        (EXHAUSTED, {400: 100}, 0, 1),
    ],
)
def test_a_journal_that_is_not_what_was_answered_is_noticed(
    load: str, statuses: dict[int, int], replays: int, rows: int
) -> None:
    counted = Counted(statuses, replays, failures=0, seconds=1, p50_ms=1, p99_ms=1)
    with pytest.raises(BenchmarkError):
        check_journal(rows, counted, LOADS[load], connections=10)


def test_the_same_figures_give_the_same_chart(tmp_path: Path) -> None:
    results = Results(
        machine={},
        versions={},
        postgres_settings={},
        rounds=1,
        seconds=1,
        not_measured=[],
        measurements=[],
        processes=None,
        crowd=None,
    )
    chart = tmp_path / "throughput.svg"
    write_chart(results, tmp_path)
    first = chart.read_bytes()
    write_chart(results, tmp_path)
    assert chart.read_bytes() == first
