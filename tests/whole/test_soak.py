"""The soak test for a while, with another seed each time: it is printed, and scripts/soak takes it."""

import time
from pathlib import Path

import pytest

from tests.soak import soak

SECONDS = 60


@pytest.mark.slow
async def test_faults_under_load(tmp_path: Path) -> None:
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")
    summary, wrong = await soak(SECONDS, seed, tmp_path, lambda share: None)
    print(summary)
    assert wrong == []
