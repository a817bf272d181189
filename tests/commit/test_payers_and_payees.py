"""Transfers through the group commit, on a real database."""

import asyncio
import random
from collections.abc import Callable

import pytest
from msgspec import structs

from atomic_balance.changes import (
    BALANCE_LIMIT,
    Applied,
    Change,
    Credit,
    NoSuchPayee,
    Refusal,
    Refused,
    Undecided,
    capture,
    hold,
    transfer,
)
from atomic_balance.commit.answering import Answering
from atomic_balance.commit.backlog import Backlog, Batch
from atomic_balance.commit.waiting import WaitingChange
from atomic_balance.observe.counting import shared_numbers
from atomic_balance.postgres.session import AccountResult, Answers
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.commit.test_lost_statements import INSUFFICIENT, quick
from tests.committing import all_of, committing
from tests.database import Database, until
from tests.fault_proxy import Link


async def test_a_transfer_moves_money_from_one_to_many(database: Database) -> None:
    database.open({1: 100, 2: 0, 3: 5})
    async with committing(Settings(database_url=database.url)) as committer:
        change = transfer(1, [Credit(3, 10), Credit(2, 60)], "k", "r")
        (outcome,) = await all_of(committer.submit(change))
        assert outcome == Applied(30, payee_balances={2: 60, 3: 15})
        (again,) = await all_of(committer.submit(change))
        assert again == Applied(30, replayed=True, payee_balances={2: 60, 3: 15})
        assert await all_of(committer.submit(Change(1, -70, "k", "r"))) == [Undecided.KEY_REUSED]
        assert await all_of(committer.submit(transfer(1, [Credit(2, 31)], "l", None))) == [
            Refused(Refusal.INSUFFICIENT_FUNDS)
        ]
        assert await all_of(committer.submit(transfer(1, [Credit(2, 31)], "l", None))) == [
            Refused(Refusal.INSUFFICIENT_FUNDS, True)
        ]
        assert await all_of(committer.submit(transfer(1, [Credit(4, 1)], "m", None))) == [NoSuchPayee(4)]
        assert await all_of(committer.submit(transfer(9, [Credit(2, 1)], "m", None))) == [Undecided.NO_SUCH_USER]
    assert verify(database.url).differences == []


async def test_changes_of_an_account_that_waited_in_two_lines_are_told_its_balances_one_after_the_other() -> None:
    """The transfer waited in its payee's line because that one's row could not be had."""
    loop, backlog = asyncio.get_running_loop(), Backlog()
    (numbers,) = shared_numbers(1)
    answering = Answering(backlog, numbers, 1, lambda change, future, request_id, deadline: None)
    changes = [transfer(1, [Credit(2, 30)], None, None), Change(1, -4), Change(1, -70)]
    waiting = [
        WaitingChange(one, str(number), number, loop.time() + 1, loop.create_future())
        for number, one in enumerate(changes)
    ]
    for one in waiting:
        backlog.add(one)
    backlog.move(waiting[0], 2)
    batch = Batch([(line, [one]) for one in waiting[:2] if (line := one.line)], arrived_before=3)
    of_account = AccountResult(applied=True, balance=100, held=0, minimum_balance=0, decided_at=None)
    answering.settle(batch, batch.changes(), Answers({}, {1: of_account}, {0: {2: 30}}))
    assert [one.future.result() for one in waiting] == [
        Applied(70, payee_balances={2: 30}),
        Applied(66),
        Refused(Refusal.INSUFFICIENT_FUNDS),
    ]


async def test_payers_that_are_payees_too_neither_make_nor_lose_money(database: Database) -> None:
    accounts = range(1, 11)
    database.open(dict.fromkeys(accounts, 100))
    chance = random.Random(1)
    async with committing(Settings(database_url=database.url)) as committer:
        futures = []
        deposited = 0
        for number in range(3_000):
            payer, payee = chance.sample(accounts, 2)
            futures.append(committer.submit(transfer(payer, [Credit(payee, chance.randint(1, 30))], None, None)))
            if number % 7 == 0:
                futures.append(committer.submit(Change(payee, 1)))
                deposited += 1
            if number % 100 == 0:
                await asyncio.sleep(0)
        outcomes = await all_of(*futures)
    assert {type(outcome) for outcome in outcomes} == {Applied, Refused}
    ((total,),) = database.execute("SELECT sum(balance) FROM users")
    assert total == 100 * len(accounts) + deposited
    assert verify(database.url).differences == []


def pay(payer: int, amount: int, *payees: int, key: str | None = None) -> Change:
    """A transfer of the same amount to each payee."""
    return transfer(payer, [Credit(payee, amount) for payee in payees], key, None)


async def test_a_payee_that_does_not_exist_or_is_full_fails_its_own_transfer_alone(database: Database) -> None:
    database.open({1: 100, 2: 0, 3: BALANCE_LIMIT})
    async with committing(Settings(database_url=database.url)) as committer:
        first = committer.submit(Change(1, 1))  # so that the others share a statement
        changes = [pay(1, 10, 2), pay(1, 1, 2, 9), pay(1, 20, 2, key="k"), pay(1, 1, 3), pay(1, 1, 2, 3, key="l")]
        outcomes = await all_of(first, *map(committer.submit, [*changes, pay(1, 30, 2)]))
        full = Refused(Refusal.BALANCE_LIMIT_EXCEEDED)
        assert [outcome.balance if isinstance(outcome, Applied) else outcome for outcome in outcomes] == [
            *(101, 91, NoSuchPayee(9), 71, full, full, 41),
        ]
        assert await committer.submit(changes[4]) == Refused(Refusal.BALANCE_LIMIT_EXCEEDED, replayed=True)
    assert [database.balance(user_id) for user_id in (1, 2, 3)] == [41, 60, BALANCE_LIMIT]
    assert verify(database.url).differences == []


async def test_of_two_payers_for_whom_there_is_room_alone_but_not_together_one_pays(database: Database) -> None:
    database.open({1: 10, 2: 10, 3: BALANCE_LIMIT - 10, 4: 0})
    async with committing(Settings(database_url=database.url)) as committer:
        first = committer.submit(Change(4, 1))
        outcomes = await all_of(first, committer.submit(pay(1, 6, 3)), committer.submit(pay(2, 6, 3)))
    assert outcomes.count(Refused(Refusal.BALANCE_LIMIT_EXCEEDED)) == 1
    assert database.balance(3) == BALANCE_LIMIT - 4
    assert verify(database.url).differences == []


async def test_transfers_to_a_full_payee_that_never_stop_hold_up_no_others_of_their_payer(database: Database) -> None:
    database.open({1: 1_000_000, 2: 0, 3: BALANCE_LIMIT - 1})
    async with committing(Settings(database_url=database.url)) as committer, asyncio.TaskGroup() as tasks:

        async def pay_the_full_one() -> None:
            while True:
                await committer.submit(pay(1, 2, 3))

        streams = [tasks.create_task(pay_the_full_one()) for _ in range(20)]
        for left in range(30):
            assert (await all_of(committer.submit(pay(1, 1, 2)))) == [
                Applied(999_999 - left, payee_balances={2: left + 1})
            ]
        for stream in streams:
            stream.cancel()


async def test_an_exhausted_account_whose_withdrawals_never_stop_still_receives_and_pays(database: Database) -> None:
    database.open({1: 1_000, 2: 0, 3: 0})
    async with committing(Settings(database_url=database.url)) as committer, asyncio.TaskGroup() as tasks:

        async def withdraw() -> None:
            while True:
                await committer.submit(Change(2, -1_000))

        streams = [tasks.create_task(withdraw()) for _ in range(20)]
        for number in range(1, 31):
            assert await all_of(committer.submit(pay(1, 3, 2))) == [
                Applied(1_000 - 3 * number, payee_balances={2: 2 * number + 1})
            ]
            assert await all_of(committer.submit(pay(2, 1, 3))) == [Applied(2 * number, payee_balances={3: number})]
        for stream in streams:
            stream.cancel()


async def test_a_blocked_payee_delays_nobody_who_does_not_pay_it(database: Database) -> None:
    """Not even its payers' other changes; and all who pay it have paid, in order, once it is free."""
    merchant, payers, others = 1, range(2, 42), range(42, 62)
    database.open({merchant: 0, 62: 0, **dict.fromkeys((*payers, *others), 100)})
    async with committing(Settings(database_url=database.url)) as committer:
        with database.holding(merchant) as holder:
            paying = [committer.submit(pay(payer, 2, merchant)) for payer in payers for _ in range(3)]
            await until(database.blocked)
            for _ in range(5):
                outcomes = await all_of(
                    *(committer.submit(Change(payer, -1)) for payer in payers),
                    *(committer.submit(pay(other, 1, 62)) for other in others),
                )
                assert all(isinstance(outcome, Applied) for outcome in outcomes)
            assert not any(future.done() for future in paying)
            holder.commit()
            outcomes = await all_of(*paying)
    assert all(isinstance(outcome, Applied) for outcome in outcomes)
    assert database.balance(merchant) == 2 * len(paying)
    assert verify(database.url).differences == []


async def test_a_payer_with_one_blocked_payee_goes_on_paying_the_others(database: Database) -> None:
    database.open({1: 10_000, 2: 0, 3: 0})
    async with committing(Settings(database_url=database.url)) as committer:
        with database.holding(2) as holder:
            stuck = committer.submit(pay(1, 5, 2, 3))
            await until(database.blocked)
            for number in range(1, 101):
                assert isinstance(await committer.submit(pay(1, 1, 3)), Applied)
                assert not stuck.done()
                if number % 20 == 0:
                    more = committer.submit(pay(1, 5, 2))
            holder.commit()
            assert all(isinstance(outcome, Applied) for outcome in await all_of(stuck, more))
    assert (database.balance(1), database.balance(3)) == (10_000 - 10 - 100 - 5 * 5, 105)
    assert verify(database.url).differences == []


async def test_a_payer_that_is_blocked_holds_up_nobody_who_pays_the_same(database: Database) -> None:
    database.open({1: 100, 2: 100, 3: 0})
    async with committing(Settings(database_url=database.url)) as committer:
        with database.holding(1) as holder:
            stuck = committer.submit(pay(1, 5, 3))
            await until(database.blocked)
            for number in range(1, 21):
                assert await all_of(committer.submit(pay(2, 1, 3))) == [
                    Applied(100 - number, payee_balances={3: number})
                ]
            assert not stuck.done()
            holder.commit()
            assert await all_of(stuck) == [Applied(95, payee_balances={3: 25})]


async def test_where_no_row_tells_that_it_is_held_the_others_go_on(database: Database) -> None:
    """Several transactions share the payee's row, so its header names none of them."""
    share = "SELECT FROM users WHERE id = 1 FOR SHARE"
    payers = range(2, 22)
    database.open({1: 0, **dict.fromkeys((*payers, 30, 31), 100)})
    async with committing(Settings(database_url=database.url)) as committer:
        with database.session(share) as one, database.session(share) as other:
            stuck = [committer.submit(pay(payer, 1, 1)) for payer in payers]
            await until(database.blocked)
            for number in range(1, 21):
                assert await all_of(committer.submit(pay(30, 1, 31))) == [
                    Applied(100 - number, payee_balances={31: 100 + number})
                ]
            assert not any(future.done() for future in stuck)
            one.rollback()
            other.rollback()
            assert all(isinstance(outcome, Applied) for outcome in await all_of(*stuck))
    assert database.balance(1) == len(payers)


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("fault", [Link.cut, Link.cut_at_answer, Link.swallow, Link.swallow_answers])
async def test_a_transfer_whose_statement_or_answer_was_lost_is_applied_once(
    database: Database, fault: Callable[[Link], None], key: str | None
) -> None:
    database.open({1: 10, 2: 0, 3: 0})
    async with database.proxied() as (proxy, url), committing(quick(url)) as committer:
        struck = proxy.strike(b"here", fault)
        change = transfer(1, [Credit(2, 3), Credit(3, 4)], key, "here")
        applied = Applied(3, payee_balances={2: 3, 3: 4})
        assert await all_of(committer.submit(change), committer.submit(Change(1, -4))) == [applied, INSUFFICIENT]
        assert struck.done()
        if key:
            assert await committer.submit(change) == structs.replace(applied, replayed=True)
    assert [database.balance(user_id) for user_id in (1, 2, 3)] == [3, 3, 4]
    assert verify(database.url).differences == []


async def test_a_capture_whose_payee_is_full_leaves_its_hold_open(database: Database) -> None:
    database.open({1: 10, 2: BALANCE_LIMIT, 3: 0})
    async with committing(Settings(database_url=database.url)) as committer:
        await committer.submit(hold(1, "h", 5, 60, None))
        for _ in range(2):
            assert await committer.submit(capture(1, "h", 5, 5, [Credit(2, 5)])) == Refused(
                Refusal.BALANCE_LIMIT_EXCEEDED
            )
        assert await committer.submit(capture(1, "h", 5, 5, [Credit(9, 5)])) == NoSuchPayee(9)
        captures = [committer.submit(capture(1, "h", 5, 5, [Credit(3, 5)])) for _ in range(3)]
        applied = Applied(5, payee_balances={3: 5})
        assert await all_of(*captures) == [applied, *[structs.replace(applied, replayed=True)] * 2]
    assert verify(database.url).differences == []
