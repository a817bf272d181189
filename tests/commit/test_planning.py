"""What an account covers: against a model that applies updates, holds and settlements one by one."""

import asyncio
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomic_balance.changes import BALANCE_LIMIT, Change, Credit, Outcome, Refusal, capture, hold, release, transfer
from atomic_balance.commit.backlog import Backlog
from atomic_balance.commit.planning import Load, covered_prefix, refusal
from atomic_balance.commit.waiting import WaitingAccount, WaitingChange

amounts = st.one_of(st.integers(-20, 20), st.sampled_from([-BALANCE_LIMIT, BALANCE_LIMIT])).filter(bool)
kept = st.integers(1, 20)
updates = amounts.map(lambda amount: Change(1, amount))
holds = st.one_of(kept, st.just(BALANCE_LIMIT)).map(lambda amount: hold(1, "h", amount, 60, None))
captures = st.tuples(kept, kept).map(lambda two: capture(1, "h", max(two), min(two)))
releases = st.tuples(kept, st.booleans()).map(lambda one: release(1, "h", *one))
changes_of_all_kinds = st.one_of(updates, holds, captures, releases)


@pytest.fixture(scope="module", autouse=True)
def event_loop_for_futures() -> Iterator[None]:
    """Futures want a loop, though none of them is waited for here."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


class Account(NamedTuple):
    """The model: what an account has, what of it is held, and what it must keep."""

    balance: int
    held: int
    minimum: int

    @property
    def available(self) -> int:
        return self.balance - self.held - self.minimum

    @property
    def room(self) -> int:
        return BALANCE_LIMIT - self.balance

    def after(self, change: Change) -> "Account | None":
        """The account after a change; None if the change can't be applied to it."""
        balance, held = self.balance + change.amount, self.held + change.hold_amount
        return (
            Account(balance, held, self.minimum) if self.minimum <= balance - held <= balance <= BALANCE_LIMIT else None
        )


@st.composite
def accounts(draw: st.DrawFn) -> Account:
    """Accounts that hold enough for whatever is settled."""
    minimum, held, available = draw(st.integers(-30, 0)), draw(st.integers(0, 30)), draw(st.integers(0, 30))
    balance = minimum + 600 + held + available
    return Account(draw(st.sampled_from([balance, BALANCE_LIMIT - 5])), 600 + held, minimum)


def applied_before_the_first_refusal(changes: list[Change], account: Account) -> int:
    """How many changes are applied if each is decided on what the ones before left, until one is not."""
    count = 0
    for change in changes:
        after = account.after(change)
        if after is None:
            break
        account = after
        count += 1
    return count


@given(st.lists(changes_of_all_kinds, max_size=30), accounts())
def test_the_prefix_is_what_would_be_applied_before_the_first_refusal(changes: list[Change], account: Account) -> None:
    covered = covered_prefix(changes, account.available, account.room)
    assert covered == applied_before_the_first_refusal(changes, account)


@given(changes_of_all_kinds, accounts())
def test_a_change_is_refused_exactly_where_the_account_cannot_cover_it(change: Change, account: Account) -> None:
    reason = refusal(change, account.available, account.room)
    assert (reason is None) == (account.after(change) is not None)
    if reason is Refusal.INSUFFICIENT_FUNDS:
        assert account.balance + change.amount - account.held - change.hold_amount < account.minimum
    elif reason is Refusal.BALANCE_LIMIT_EXCEEDED:
        assert account.balance + change.amount > BALANCE_LIMIT


@given(captures | releases, accounts())
def test_a_settlement_of_what_is_held_is_always_covered(settlement: Change, account: Account) -> None:
    """So none is ever refused, and a refusal can't keep a hold from being settled."""
    assert refusal(settlement, account.available, account.room) is None


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
    line = backlog.account(1)
    assert line is not None
    backlog.tidy(line)
    batch = backlog.take_ready(0, Load(1, 1), 3)
    assert batch is not None
    assert batch.changes() == [changes[1]]


@given(
    st.lists(st.tuples(changes_of_all_kinds, st.booleans()), min_size=1, max_size=30),
    st.none() | accounts(),
    st.integers(1, 40),
)
def test_a_portion_is_a_prefix_of_what_has_no_answer(
    changes: list[tuple[Change, bool]], known: Account | None, room: int
) -> None:
    """Never jumping over a change that is not covered: as much as is or, if that is nothing, all there is room for."""
    account = WaitingAccount(1)
    if known is not None:
        account.available, account.room = known.available, known.room
    loop = asyncio.get_event_loop_policy().get_event_loop()
    for number, (change, answered) in enumerate(changes):
        waiting = WaitingChange(change, f" {number}", number, 0.0, loop.create_future())
        account.changes.append(waiting)
        waiting.answered = answered
    live = [waiting for waiting in account.changes if not waiting.answered][:room]
    if not live:
        return
    part = account.next_changes(room)
    assert part == live[: len(part)]
    if known is None:
        assert part == live
    else:
        covered = applied_before_the_first_refusal([one.change for one in live], known)
        assert len(part) == (covered or len(live))
    live[0].alone = True
    assert account.next_changes(room) == live[:1]


def test_a_statement_has_no_account_that_is_credited_and_changes_otherwise() -> None:
    withdrawal, payment = Change(2, -1), transfer(1, [Credit(2, 1), Credit(3, 1)], None, None)
    for first, second in ((withdrawal, payment), (payment, withdrawal)):
        load = Load(10, 10)
        assert load.take(first)
        assert not load.take(second)
        assert load.take(transfer(4, [Credit(3, 1)], None, None))


def test_a_change_that_returns_from_another_line_has_its_place_by_arrival() -> None:
    backlog = Backlog()
    payment = transfer(1, [Credit(2, 1)], None, None)
    waiting = [
        WaitingChange(change, "", number, 0.0, asyncio.Future())
        for number, change in enumerate((payment, Change(1, 1)))
    ]
    for one in waiting:
        backlog.add(one)
    backlog.move(waiting[0], 2)
    backlog.move(waiting[0], 1)
    line = backlog.account(1)
    assert line
    assert [one.number for one in line.changes] == [0, 1]
