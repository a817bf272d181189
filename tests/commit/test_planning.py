"""What a balance covers: against a model that applies changes one by one."""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomic_balance.changes import BALANCE_LIMIT, Change, Outcome, Refusal
from atomic_balance.commit.planning import covered_prefix, refusal
from atomic_balance.commit.waiting import Backlog, WaitingAccount, WaitingChange

amounts = st.one_of(st.integers(-20, 20), st.sampled_from([-BALANCE_LIMIT, BALANCE_LIMIT])).filter(bool)
balances = st.one_of(st.integers(-30, 30), st.just(BALANCE_LIMIT - 5))


@pytest.fixture(scope="module", autouse=True)
def event_loop_for_futures() -> Iterator[None]:
    """Futures want a loop, though none of them is waited for here."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


def applied_one_by_one(changes: list[int], balance: int, minimum: int) -> list[bool]:
    """Which changes are applied if each is decided on the balance that the ones before left."""
    outcomes = []
    for amount in changes:
        covered = minimum <= balance + amount <= BALANCE_LIMIT
        balance += amount if covered else 0
        outcomes.append(covered)
    return outcomes


def updates(changes: list[int]) -> list[Change]:
    return [Change(1, amount) for amount in changes]


@given(st.lists(amounts), balances, st.integers(-30, 0))
def test_the_prefix_is_what_would_be_applied_before_the_first_refusal(
    changes: list[int], balance: int, minimum: int
) -> None:
    minimum = min(minimum, balance)
    outcomes = applied_one_by_one(changes, balance, minimum)
    first_refused = outcomes.index(False) if False in outcomes else len(outcomes)
    assert covered_prefix(updates(changes), balance - minimum, BALANCE_LIMIT - balance) == first_refused


@given(amounts, balances, st.integers(-30, 0))
def test_a_change_is_refused_exactly_where_the_balance_cannot_cover_it(amount: int, balance: int, minimum: int) -> None:
    minimum = min(minimum, balance)
    reason = refusal(Change(1, amount), balance - minimum, BALANCE_LIMIT - balance)
    assert (reason is None) == applied_one_by_one([amount], balance, minimum)[0]
    if reason is Refusal.INSUFFICIENT_FUNDS:
        assert balance + amount < minimum
    elif reason is Refusal.BALANCE_LIMIT_EXCEEDED:
        assert balance + amount > BALANCE_LIMIT


class Watched(float):
    """A deadline that counts how often it is looked at."""

    looks = 0

    def __le__(self, now: float) -> bool:
        Watched.looks += 1
        return float(self) <= now


def test_expiry_looks_no_further_than_what_is_due() -> None:
    room = Backlog()
    future: asyncio.Future[Outcome] = asyncio.get_event_loop_policy().get_event_loop().create_future()
    changes = [
        WaitingChange(Change(1 + number // 2, -1), f" {number}", number, Watched(number), future)
        for number in range(2_000)
    ]
    for waiting in changes:
        room.add(waiting)
    assert room.due(9) == changes[:10]
    for waiting in changes[3:8]:
        room.answer(waiting)
    assert room.due(9) == changes[:3] + changes[8:10]
    assert Watched.looks == 11 + 6


def test_an_account_keeps_its_turn_when_changes_of_it_expire() -> None:
    backlog = Backlog()
    future: asyncio.Future[Outcome] = asyncio.get_event_loop_policy().get_event_loop().create_future()
    changes = [WaitingChange(Change(user_id, -1), f" {n}", n, 0, future) for n, user_id in enumerate((1, 1, 2))]
    for waiting in changes:
        backlog.add(waiting)
    backlog.answer(changes[0])
    backlog.tidy(1)
    batch = backlog.take_ready(1, 1, 3)
    assert batch is not None
    assert batch.changes() == [changes[1]]


@given(
    st.lists(st.tuples(amounts, st.booleans()), min_size=1, max_size=30),
    st.none() | balances,
    st.integers(-30, 0),
    st.integers(1, 40),
)
def test_a_portion_is_a_prefix_of_what_has_no_answer(
    changes: list[tuple[int, bool]], balance: int | None, minimum: int, room: int
) -> None:
    """Never jumping over a held change: as much as the balance covers or, if that is nothing, all there is room for."""
    account = WaitingAccount(1)
    if balance is not None:
        account.available, account.room = balance - minimum, BALANCE_LIMIT - balance
    loop = asyncio.get_event_loop_policy().get_event_loop()
    for number, (amount, answered) in enumerate(changes):
        waiting = WaitingChange(Change(1, amount), f" {number}", number, 0.0, loop.create_future())
        account.changes.append(waiting)
        if answered:
            waiting.answered = True
    live = [waiting for waiting in account.changes if not waiting.answered][:room]
    if not live:
        return
    part = account.next_changes(room)
    assert part == live[: len(part)]
    if balance is None:
        assert part == live
    else:
        covered = covered_prefix([one.change for one in live], balance - minimum, BALANCE_LIMIT - balance)
        assert len(part) == (covered or len(live))
    live[0].alone = True
    assert account.next_changes(room) == live[:1]
