"""docs/scaling.md reckons with what the benchmark measured, and its example is near it."""

import re

import msgspec
import pytest
from benchmarking.results import Results, Scale

from tests.processes import ROOT

PAGE = (ROOT / "docs" / "scaling.md").read_text()
RESULTS = msgspec.json.decode((ROOT / "docs" / "benchmarks" / "results.json").read_bytes(), type=Results)
NEAR = pytest.approx


def measured(load: str, connections: int, workers: int) -> Scale:
    (found,) = [of for of in RESULTS.scaling if (of.load, of.connections, of.workers) == (load, connections, workers)]
    return found


def number(pattern: str) -> float:
    (found,) = re.findall(pattern, PAGE)
    return float(found.replace(",", ""))


@pytest.mark.parametrize(
    "scale", RESULTS.scaling, ids=lambda scale: f"{scale.load}-{scale.connections}-{scale.workers}"
)
def test_the_table_is_what_was_measured(scale: Scale) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
    figures = [
        *(scale.rate, scale.statements_per_second, scale.service_cpu_us, scale.store_cpu_us),
        *(scale.wal_bytes, scale.disk_bytes),
    ]
    assert [
        f"{scale.load}, {'1 connection' if scale.connections == 1 else f'{scale.connections} connections'}",
        str(scale.workers),
        *(f"{figure:,.0f}" for figure in figures),
    ] in rows


def test_the_example_is_within_a_quarter_of_what_was_measured() -> None:
    scale = measured("1,000 rows", 256, 2)
    reckoned = number(r"= ([\d,]+) changes a second \(reckoned\)")
    assert reckoned == NEAR(scale.reckoned_rate, rel=0.02)
    assert reckoned == NEAR(scale.rate, rel=0.25)
    assert number(r"measured: ([\d,]+) a second") == NEAR(scale.rate, rel=0.01)


def test_the_example_multiplies_what_was_measured() -> None:
    scale = measured("1,000 rows", 256, 2)
    peak, average = number(r"([\d,]+) changes a second at the peak"), number(r"([\d,]+) on average")
    assert number(r"processes .* = ([\d.]+), so") == NEAR(peak * scale.service_cpu_us / 1e6 / 0.7, rel=0.05)
    assert number(r"database cores .* = ([\d.]+), so") == NEAR(peak * scale.store_cpu_us / 1e6 / 0.7, rel=0.05)
    assert number(r"disk a day .* = ([\d.]+) GB") == NEAR(average * 86_400 * scale.disk_bytes / 1e9, rel=0.02)
    assert number(r"WAL a day .* = ([\d.]+) GB") == NEAR(average * 86_400 * scale.wal_bytes / 1e9, rel=0.02)
