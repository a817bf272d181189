"""Whatever the batches are, the outcomes are those of some order in which the changes came one by one.

Planning and the statement's condition, against a model; test_group_commit.py has the same over a real database.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atomic_balance.changes import BALANCE_LIMIT
from atomic_balance.planning import covered_prefix, refusal

pytestmark = pytest.mark.over_both_statements

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
    for count in range(1, len(batch) + 1):
        assert _extremes_allow(account, batch[:count]) == (
            covered_prefix(batch, account.balance, account.minimum) >= count
        )


class Decided(NamedTuple):
    """What was decided, in the order in which it was: a change by its place in the batch, or another process's."""

    place: int | None
    amount: int
    applied: bool


def decide(account: Account, batch: list[int], others: Iterator[int]) -> list[Decided]:
    """Decide a batch by turns, as a group commit does: a covered prefix, all of it or none, by the extremes of its sum.

    Another process's change comes between any two turns, as long as there are `others`: what is known may be stale.
    Where it is not, a turn must decide something, or the batch could wait for ever.
    """
    decided: list[Decided] = []
    waiting = dict(enumerate(batch))
    known: Account | None = None
    while waiting:
        for other in itertools.islice(others, 1):
            decided.append(Decided(None, other, account.after(other) != account))
            account = account.after(other)
        before, stale = len(waiting), known != account
        in_order = list(waiting.values())
        count = covered_prefix(in_order, known.balance, known.minimum) if known else 0
        sent = list(waiting.items())[: count or len(waiting)]
        if _extremes_allow(account, [amount for _, amount in sent]):
            for index, amount in sent:
                account = account.after(amount)
                decided.append(Decided(index, amount, applied=True))
                del waiting[index]
        known = account
        for index, amount in list(waiting.items()):
            if refusal(amount, known.balance, known.minimum) is not None:
                decided.append(Decided(index, amount, applied=False))
                del waiting[index]
        assert stale or len(waiting) < before
    return decided


def _extremes_allow(account: Account, batch: list[int]) -> bool:
    """The statement's condition."""
    sums = list(itertools.accumulate(batch))
    return account.minimum <= account.balance + min(sums) and account.balance + max(sums) <= BALANCE_LIMIT


@given(accounts, batches, st.lists(amounts, max_size=8))
@example(Account(5, 0), [-3, -3, 2, -4], [-1, 10])
def test_the_outcomes_of_a_batch_are_those_of_some_order_one_by_one(
    account: Account, batch: list[int], others: list[int]
) -> None:
    """That order is the one in which they were decided; those that are applied keep their order of arrival."""
    decided = decide(account, batch, iter(others))
    assert sorted(one.place for one in decided if one.place is not None) == list(range(len(batch)))
    assert [one.applied for one in decided] == one_by_one(account, (one.amount for one in decided))
    applied = [one.place for one in decided if one.applied and one.place is not None]
    assert applied == sorted(applied)


@given(accounts, st.lists(amounts, max_size=5))
def test_some_order_is_found_by_trying_them_all(account: Account, batch: list[int]) -> None:
    """As above, without trusting the order of the decisions."""
    outcomes = {one.place: one.applied for one in decide(account, batch, iter(()))}
    assert any(
        [outcomes[index] for index in order] == one_by_one(account, (batch[index] for index in order))
        for order in itertools.permutations(range(len(batch)))
    )
