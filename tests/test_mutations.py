"""A sample of the mutations, another one each time: what a promise rests on is taken out, and its test fails."""

import random
import time

import pytest

from tests.mutating import checkout_copy, mutations, unmutated, verdict
from tests.processes import ROOT

SAMPLE = 10


def test_every_mutation_applies_and_has_its_test() -> None:
    table = mutations()
    assert len({mutation.name for mutation in table}) == len(table) >= 60
    assert [each.name for each in table if (ROOT / each.file).read_text().count(each.old) != 1] == []
    for mutation in table:
        path, _, test = mutation.test.partition("::")
        assert f"def {test}(" in (ROOT / path).read_text(), mutation.name


@pytest.mark.slow
async def test_a_sample_of_the_mutations_is_noticed() -> None:
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")
    chosen = random.Random(seed).sample(mutations(), SAMPLE)
    async with checkout_copy() as copy:
        assert await unmutated(copy, chosen) == ""
        verdicts = {mutation.name: await verdict(copy, mutation) for mutation in chosen}
    assert {name: found for name, found in verdicts.items() if found not in ("killed", "hangs")} == {}
