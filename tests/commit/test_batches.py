"""Whatever the batches are, the outcomes are those of some order in which the changes came one by one.

The group commit on a real database against a model, while another process changes the account too.
"""

import asyncio
import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from atomic_balance.changes import BALANCE_LIMIT, Applied, Change, Outcome, Refused
from atomic_balance.commit.planning import covered_prefix
from atomic_balance.postgres.session import Session
from atomic_balance.settings import Settings
from tests.committing import committing
from tests.database import Database

CHANGE = (
    "UPDATE users SET balance = balance + %s WHERE id = %s AND balance + %s BETWEEN minimum_balance AND %s"
    " RETURNING balance"
)

_users = itertools.count(1)

small = st.integers(-30, 30).filter(bool)
amounts = small | st.sampled_from([-BALANCE_LIMIT, BALANCE_LIMIT, 3 - BALANCE_LIMIT, BALANCE_LIMIT - 3])
batches = st.lists(amounts, max_size=12)
minimums = st.sampled_from([0, 0, 5, -7, -BALANCE_LIMIT])
balances = st.integers(0, 40) | st.integers(BALANCE_LIMIT - 40, BALANCE_LIMIT)


class Account(NamedTuple):
    """The model: an account that is asked for one change at a time."""

    balance: int
    minimum: int

    def after(self, amount: int) -> "Account":
        """The account after a change, or as it was if it refuses."""
        changed = self._replace(balance=self.balance + amount)
        return changed if changed.is_allowed() else self

    def is_allowed(self) -> bool:
        return self.minimum <= self.balance <= BALANCE_LIMIT


over_a_database = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


accounts = st.builds(Account, balances, minimums).filter(Account.is_allowed)


def one_by_one(account: Account, batch: Iterable[int]) -> list[bool]:
    """Which changes of a batch are applied, one after the other."""
    applied = []
    for amount in batch:
        after = account.after(amount)
        applied.append(after != account)
        account = after
    return applied


@given(accounts, batches)
def test_a_prefix_is_covered_just_where_the_extremes_of_its_running_sum_are(account: Account, batch: list[int]) -> None:
    """The statement looks at these extremes alone; it must apply the very batches that were planned."""
    changes = [Change(1, amount) for amount in batch]
    for count in range(1, len(batch) + 1):
        assert _extremes_allow(account, batch[:count]) == (
            covered_prefix(changes, account.balance - account.minimum, BALANCE_LIMIT - account.balance) >= count
        )


class Decided(NamedTuple):
    """What was decided, in the order in which it was: a change by its place in the batch, or another process's."""

    place: int | None
    amount: int
    applied: bool


async def decide(database: Database, account: Account, batch: list[int], others: Iterable[int]) -> list[Decided]:
    """Have the group commit decide a batch, every second change with a key.

    Another process's change comes before each of its statements, as long as there are `others`: what is known may be
    stale. Where it is not, a statement must decide something, or the batch could wait for ever.
    """
    user_id = next(_users)
    database.execute(
        "INSERT INTO users (id, balance, opening_balance, minimum_balance) VALUES (%s, %s, %s, %s)",
        *(user_id, account.balance, account.balance, account.minimum),
    )
    decided: list[Decided] = []
    coming = iter(others)
    statements = 0
    apply = Session.apply

    async def disturbed(session: Session, *arguments: Any) -> Any:
        nonlocal statements
        statements += 1
        await asyncio.sleep(0)  # so that what was decided before is noted before
        for amount in itertools.islice(coming, 1):
            changed = database.execute(CHANGE, amount, user_id, amount, BALANCE_LIMIT)
            decided.append(Decided(None, amount, applied=bool(changed)))
        return await apply(session, *arguments)

    def note(place: int, outcome: asyncio.Future[Outcome]) -> None:
        assert isinstance(outcome.result(), Applied | Refused)
        decided.append(Decided(place, batch[place], isinstance(outcome.result(), Applied)))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Session, "apply", disturbed)
        async with committing(Settings(database_url=database.url, lanes=2)) as committer:
            futures = []
            for place, amount in enumerate(batch):
                key = f"key-{place}" if place % 2 else None
                futures.append(committer.submit(Change(user_id, amount, key)))
                futures[-1].add_done_callback(functools.partial(note, place))
            await asyncio.gather(*futures)
    first = 1  # nothing is known yet
    assert statements <= first + sum(one.place is None for one in decided) + len(batch)
    return decided


def _extremes_allow(account: Account, batch: list[int]) -> bool:
    """The statement's condition."""
    sums = list(itertools.accumulate(batch))
    return account.minimum <= account.balance + min(sums) and account.balance + max(sums) <= BALANCE_LIMIT


@pytest.mark.over_both_statements
@given(accounts, batches, st.lists(amounts, max_size=8))
@example(Account(5, 0), [-3, -3, 2, -4], [-1, 10])
@over_a_database
async def test_the_outcomes_of_a_batch_are_those_of_some_order_one_by_one(
    database: Database, account: Account, batch: list[int], others: list[int]
) -> None:
    """That order is the one in which they were decided; those that are applied keep their order of arrival."""
    decided = await decide(database, account, batch, others)
    assert sorted(one.place for one in decided if one.place is not None) == list(range(len(batch)))
    assert [one.applied for one in decided] == one_by_one(account, (one.amount for one in decided))
    applied = [one.place for one in decided if one.applied and one.place is not None]
    assert applied == sorted(applied)


@pytest.mark.over_both_statements
@given(accounts, st.lists(amounts, max_size=5))
@over_a_database
async def test_some_order_is_found_by_trying_them_all(database: Database, account: Account, batch: list[int]) -> None:
    """As above, without trusting the order of the decisions."""
    outcomes = {one.place: one.applied for one in await decide(database, account, batch, ())}
    assert any(
        [outcomes[index] for index in order] == one_by_one(account, (batch[index] for index in order))
        for order in itertools.permutations(range(len(batch)))
    )
