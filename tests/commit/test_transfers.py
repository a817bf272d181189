"""Transfers through the group commit, on a real database."""

import asyncio
import random

from atomic_balance.changes import (
    Applied,
    Change,
    Credit,
    NoSuchPayee,
    Refusal,
    Refused,
    Undecided,
    transfer,
)
from atomic_balance.commit.answering import Answering
from atomic_balance.commit.backlog import Backlog, Batch
from atomic_balance.commit.waiting import WaitingChange
from atomic_balance.observe.counting import shared_numbers
from atomic_balance.postgres.session import AccountResult, Answers
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.committing import all_of, committing
from tests.database import Database


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
    answering = Answering(backlog, numbers, 1, lambda change, future, request_id: None)
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
