"""The benchmark, as short as it can be: it must run, notice what is wrong, and report what it measured."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from benchmarking.contenders import BenchmarkError
from benchmarking.figures import DOCUMENTS, chart, quoted, rows_of
from benchmarking.generators import Counted
from benchmarking.loads import BARE_UPDATE, BEFORE, LOADS, NO_DATABASE, REDIS_ALWAYS, SERVICE
from benchmarking.report import page
from benchmarking.results import Results
from benchmarking.rounds import check_answers, rotated

from tests.processes import ROOT, run

PAGE = (ROOT / "docs" / "benchmarks" / "README.md").read_text()


async def benchmark(path: Path, *arguments: str, module: str = "benchmarking") -> tuple[int, str]:
    """Run the benchmark where only the programs in `path` can be found."""
    environment = {"PATH": str(path), "PYTHONPATH": str(ROOT / "scripts")}
    return await run(sys.executable, "-m", module, *arguments, directory=ROOT, environment=environment)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with wrk and nothing else."""
    wrk = shutil.which("wrk")
    if wrk is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("wrk is not installed")
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "wrk").symlink_to(wrk)
    return folder


@pytest.mark.slow
async def test_it_measures_checks_and_reports(tmp_path: Path, programs: Path) -> None:
    output, other = tmp_path / "output", tmp_path / "other"
    other.mkdir()
    (other / ".venv").symlink_to(sys.prefix)
    contenders = (NO_DATABASE, SERVICE, REDIS_ALWAYS)
    loads = ("replays", "bulk", "captures", "following")
    shortest = ("--quick", "--loads", *loads, "--contenders", *contenders, "--output", str(output))
    status, printed = await benchmark(programs, *shortest, "--against", str(other))
    assert status == 0, printed

    written = (output / "README.md").read_text()
    assert f"Not measured: {REDIS_ALWAYS}: redis-server is not installed." in written
    replays, bulk = rows_of(written, LOADS["replays"].title), rows_of(written, LOADS["bulk"].title)
    assert [row[""] for row in replays] == [BEFORE, NO_DATABASE, f"**{SERVICE}**"]
    assert [row[""] for row in bulk] == [BEFORE, f"**{SERVICE}**"]
    assert all(row[name] != "-" for row in bulk for name in row)
    captures = rows_of(written, LOADS["captures"].title)
    assert [(row["connections"], row[""]) for row in captures][-1] == ("256", f"**{SERVICE}**")
    assert [row["connections"] for row in rows_of(written, f"{SERVICE}, times {BEFORE}")] == ["256", "16", "1", "256"]
    assert "<svg" in (output / "throughput.svg").read_text()
    assert "## A reader of the feed" in written


@pytest.mark.slow
async def test_it_measures_what_has_grown(tmp_path: Path, programs: Path) -> None:
    sizes = ["--journals", "10000", "30000", "--accounts", "2000", "--rounds", "1", "--seconds", "1"]
    status, printed = await benchmark(programs, *sizes, "--output", str(tmp_path), module="benchmarking.growth")
    assert status == 0, printed
    written = (tmp_path / "growth.md").read_text()
    journals, accounts = [*rows_of(written, "Rows in the journal")], rows_of(written, "Accounts")
    assert [row[""] for row in (*journals, *accounts)] == ["10,000 rows", "30,000 rows", "2,000 accounts"]
    assert all(row[name] != "-" for row in journals for name in row)


@pytest.mark.slow
async def test_it_measures_for_a_while(tmp_path: Path, programs: Path) -> None:
    short = ["--minutes", "0", "--slice", "1"]
    status, printed = await benchmark(programs, *short, "--output", str(tmp_path), module="benchmarking.steady")
    assert status == 0, printed
    rows = rows_of((tmp_path / "steady.md").read_text(), "At full rate")
    assert [(row[""], row["slices"]) for row in rows][1] == ("all", "4")
    assert "<svg" in (tmp_path / "steady.svg").read_text()


async def test_it_says_what_is_missing(tmp_path: Path) -> None:
    assert await benchmark(tmp_path) == (
        1,
        "benchmark: wrk is not installed, and it makes the load (Debian: apt-get install wrk)\n",
    )


@pytest.mark.parametrize(
    ("load", "statuses", "replays", "rows"),
    [
        ("rows", {200: 100}, 0, 99),
        ("rows", {200: 100}, 0, 111),
        ("rows", {200: 99, 503: 1}, 0, 100),
        ("rows", {}, 0, 0),
        ("replays", {200: 100}, 50, 49),
        ("replays", {200: 100}, 50, 100),
        ("bulk", {200: 2}, 0, 999),
        ("exhausted", {400: 100}, 0, 1),
        ("holds", {201: 99, 200: 1}, 0, 100),
        ("captures", {200: 99, 404: 1}, 0, 99),
        ("captures", {200: 100}, 0, 99),
    ],
)
def test_answers_that_are_wrong_and_a_journal_that_is_not_what_was_answered_are_noticed(
    load: str, statuses: dict[int, int], replays: int, rows: int
) -> None:
    with pytest.raises(BenchmarkError):
        check_answers(SERVICE, LOADS[load], 10, Counted(statuses, replays, failures=0, seconds=1), rows)


def test_everyone_begins_a_round() -> None:
    assert [rotated("abc", number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert rotated("abc", 1) == ["b", "c", "a"]


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    rates = {NO_DATABASE: (10, 100, 1000), SERVICE: (9, 50, 700), BARE_UPDATE: (1, 10, 100)}
    measured = {("hot", 256, who): [{"rate": float(rate)} for rate in of] for who, of in rates.items()}
    contenders = dict.fromkeys(rates, "")
    written = page(Results(measured, 3, 1, contenders, not_measured={}, machine={}))
    assert "| one hot row: rate, of no database | 0.70 (0.50-0.90) | at least 0.75 | 0.9 | **missed** |" in written
    assert "| one hot row: rate, times bare UPDATE | 7.00 (5.00-9.00) | at least 5 |  | ok |" in written
    assert "| one hot row, holds: rate, of updates | - | at least 0.8 |  | not measured |" in written
    assert "| 1,000 rows: rate, of no database | - | at least 0.6 | 0.8 | not measured |" in written


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_quotes_the_page(name: str) -> None:
    document = (ROOT / name).read_text()
    assert "<!-- figures: " in document
    assert quoted(document, PAGE) == document


def test_figures_are_quoted_between_the_markers_and_nowhere_else() -> None:
    document = "18,747\n\n<!-- figures: speed -->\n\nold\n\n<!-- end -->\n\n18,747\n"
    written = quoted(document, "### one hot row\n\n| connections |  | requests/s |\n|-|-|-|\n| 256 | x | 5 (4-6) |\n")
    head = "| requests per second | one hot row | one exhausted row | 1,000 rows |\n| --- | --- | --- | --- |"
    table = f"{head}\n| x | 5 | - | - |"
    assert written == document.replace("old", table)


def test_the_chart_is_drawn_from_the_page() -> None:
    assert (ROOT / "docs" / "benchmarks" / "throughput.svg").read_text() == chart(PAGE)
