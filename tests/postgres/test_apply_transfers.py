"""The function that applies a batch with transfers: what it leaves, against a plain model; and how it takes rows."""

import asyncio
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from atomic_balance.changes import (
    BALANCE_LIMIT,
    Change,
    Credit,
    Refusal,
    capture,
    credit_key,
    hold,
    release,
    settlement_key,
    transfer,
)
from atomic_balance.commit.planning import Load
from atomic_balance.postgres.session import AccountResult, Answers, Recorded, RefusalRecord, Unpaid, connect
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.database import Database
from tests.postgres.test_apply_changes import UPDATE_OF_USERS, _nodes

BATCHES = 250
USERS = range(1, 9)
FULL = 8
NOBODY = 99
HAMMER_SECONDS = 4
HAMMERS = 5
OPENED = 100


class Account(NamedTuple):
    """An account, in the model."""

    balance: int
    held: int
    minimum: int
    version: int


class Row(NamedTuple):
    """A row of the journal, in the model; `change`: None if it is the credit of a payee."""

    amount: int
    balance: int
    version: int | None
    reference: str | None
    change: Change | None
    refusal: str | None = None


@dataclass
class Model:
    """The tables, as sets that are applied owner by owner, all or none, would leave them."""

    accounts: dict[int, Account]
    journal: dict[tuple[int, str], Row] = field(default_factory=dict)
    open_holds: dict[tuple[int, str], int] = field(default_factory=dict)

    def apply(self, sent: list[tuple[Change, str, bool]]) -> Answers:
        """What the function answers, without its times, and what it leaves."""
        recorded = {
            index: self._recorded(change, key)
            for index, (change, key, repeatable) in enumerate(sent)
            if repeatable and (change.user_id, key) in self.journal
        }
        unpaid = {
            index: [Unpaid(credit.user_id, None) for credit in change.payees if credit.user_id not in self.accounts]
            for index, (change, *_) in enumerate(sent)
            if index not in recorded
        }
        rest = {index: one for index, one in enumerate(sent) if unpaid.get(index) == []}
        moved = {user_id for user_id in self._touched(rest) if self._holds(user_id, rest)}
        failed = {change.user_id for change, *_ in rest.values() if not moved.issuperset(change.accounts)}
        before = dict(self.accounts)
        results = {
            owner: AccountResult(owner not in failed, account.balance, account.held, account.minimum, None)
            for owner in {change.user_id for change, *_ in rest.values()}
            if (account := before.get(owner))
        }
        credited = {index: dict(found.payee_balances) for index, found in recorded.items() if found.payee_balances}
        for index, (change, key, _) in rest.items():
            full = [one for one in change.payees if one.user_id not in moved]
            unpaid[index] = [Unpaid(credit.user_id, before[credit.user_id].balance) for credit in full]
            if change.user_id not in failed:
                balances = self._apply_set(change, key)
                if balances:
                    credited[index] = balances
        return Answers(recorded, results, credited, {index: found for index, found in unpaid.items() if found})

    def _apply_set(self, change: Change, key: str) -> dict[int, int]:
        """Move what a change moves; gives the balances of its payees."""
        owner = change.user_id
        self._move(owner, change.amount, change.hold_amount, key, change.reference, change)
        for credit in change.payees:
            self._move(credit.user_id, credit.amount, 0, credit_key(owner, key), change.reference, None)
        if change.hold_amount > 0:
            self.open_holds[owner, key] = change.hold_amount
        elif change.hold_id is not None:
            self.open_holds.pop((owner, change.hold_id), None)
        return {credit.user_id: self.accounts[credit.user_id].balance for credit in change.payees}

    def _touched(self, rest: dict[int, tuple[Change, str, bool]]) -> set[int]:
        return {user_id for change, *_ in rest.values() for user_id in change.accounts}

    def _holds(self, user_id: int, rest: dict[int, tuple[Change, str, bool]]) -> bool:
        """Whether an account's condition holds for all that is asked of it, in its order."""
        account = self.accounts.get(user_id)
        if account is None:
            return False
        balance, held = account.balance, account.held
        for change, *_ in rest.values():
            steps = [(change.amount, change.hold_amount)] if change.user_id == user_id else []
            steps += [(credit.amount, 0) for credit in change.payees if credit.user_id == user_id]
            for amount, hold_amount in steps:
                balance, held = balance + amount, held + hold_amount
                if balance - held < account.minimum or balance > BALANCE_LIMIT:
                    return False
        return held >= 0

    def _move(
        self, user_id: int, amount: int, hold_amount: int, key: str, reference: str | None, change: Change | None
    ) -> None:
        balance, held, minimum, version = self.accounts[user_id]
        after = Account(balance + amount, held + hold_amount, minimum, version + 1)
        self.accounts[user_id] = after
        self.journal[user_id, key] = Row(amount, after.balance, after.version, reference, change)

    def _recorded(self, change: Change, key: str) -> Recorded:
        row = self.journal[change.user_id, key]
        first = row.change
        assert first is not None
        lasting_seconds = 0 if first.is_expiry else None
        shown = Change(
            *(first.user_id, first.amount, None, first.reference, first.hold_amount, None, lasting_seconds),
            payees=first.payees,
        )
        balances = {
            credit.user_id: self.journal[credit.user_id, credit_key(first.user_id, key)].balance
            for credit in first.payees
            if row.refusal is None
        }
        return Recorded(shown, row.balance, row.refusal, balances or None)

    def refuse(self, change: Change, key: str) -> RefusalRecord:
        """Bind a refusal to a key."""
        balance = self.accounts[change.user_id].balance
        refusal = Refusal.INSUFFICIENT_FUNDS
        self.journal[change.user_id, key] = Row(change.amount, balance, None, change.reference, change, refusal)
        return RefusalRecord(change, key, balance, refusal)

    def check(self, database: Database) -> None:
        """Compare with the tables, row by row."""
        accounts = database.execute("SELECT id, balance, held, minimum_balance, version FROM users")
        assert {user_id: Account(*row) for user_id, *row in accounts} == self.accounts
        rows = database.execute(
            "SELECT user_id, idempotency_key, amount, balance, version, reference, hold_amount, refusal, payees, payer"
            " FROM balance_changes"
        )
        expected = {}
        for (user_id, key), row in self.journal.items():
            change = row.change
            legs = [part for credit in change.payees for part in credit] if change else []
            payer = None if change else int(key.split(" ")[1])
            hold_amount = change.hold_amount or None if change else None
            expected[user_id, key] = (*row[:4], hold_amount, row.refusal, legs or None, payer)
        assert {(user_id, key): tuple(row) for user_id, key, *row in rows} == expected
        holds = database.execute("SELECT user_id, hold_id, amount FROM open_holds")
        assert {(user_id, hold_id): amount for user_id, hold_id, amount in holds} == self.open_holds


def random_change(chance: random.Random, model: Model, name: str) -> tuple[Change, str, bool]:
    """A change, the key that it is sent under, and whether the journal may hold that."""
    user_id = chance.choice([*USERS[:-1], *USERS[:-1], NOBODY])
    others = [other for other in USERS if other != user_id and (other != FULL or chance.random() < 0.3)]
    if chance.random() < 0.08:
        others.append(NOBODY + 1)
    payees = [
        Credit(other, chance.choice((1, 2, 9, 30))) for other in chance.sample(others, chance.choice((1, 1, 2, 3)))
    ]
    reference = chance.choice((None, "r"))
    theirs = [(key, row.change) for (owner, key), row in model.journal.items() if owner == user_id and row.change]
    holds = [(key, amount) for (owner, key), amount in model.open_holds.items() if owner == user_id]
    match chance.choice(("pay", "pay", "pay", "unkeyed", "update", "hold", "settle", "capture", "capture", "again")):
        case "update":
            return Change(user_id, chance.choice((-20, -9, 9, 20)), name, reference), name, True
        case "unkeyed":
            return transfer(user_id, payees, None, reference), f" {name}", False
        case "hold":
            return hold(user_id, name, chance.randint(1, 9), 3_600, reference), name, True
        case "settle" if holds:
            key, amount = chance.choice(holds)
            return release(user_id, key, amount, expired=chance.random() < 0.3), settlement_key(key), True
        case "capture" if holds:
            key, amount = chance.choice(holds)
            part = chance.randint(1, amount)
            return capture(user_id, key, amount, part, [Credit(payees[0].user_id, part)]), settlement_key(key), True
        case "again" if theirs:
            key, change = chance.choice(theirs)
            return change, key, True
    return transfer(user_id, payees, name, reference), name, True


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_random_batches_leave_what_a_plain_model_says(database: Database, statement: str, seed: int) -> None:
    """Payers, payees, holds, captures to payees, replays; users that don't exist, and one that is full."""
    chance = random.Random(seed)
    model = Model({user_id: Account(60, 0, chance.choice((0, 0, -20)), 0) for user_id in USERS})
    model.accounts[FULL] = Account(BALANCE_LIMIT - 12, 0, 0, 0)
    for user_id, account in model.accounts.items():
        database.execute(
            "INSERT INTO users (id, balance, opening_balance, minimum_balance) VALUES (%s, %s, %s, %s)",
            *(user_id, account.balance, account.balance, account.minimum),
        )
    kinds: Counter[str] = Counter()
    session = await connect(Settings(database_url=database.url, citus=statement != "apply_changes"))
    try:
        for number in range(BATCHES):
            load = Load(1_000, 1_000)
            sent = {}
            for place in range(1 if chance.random() < 0.2 else chance.randint(2, 12)):
                change, key, repeatable = random_change(chance, model, f"{number}-{place}")
                if (change.user_id, key) not in sent and load.take(change):
                    sent[change.user_id, key] = change, key, repeatable
            if not any(change.payees for change, *_ in sent.values()):
                continue
            changes, keys, repeatables = map(list, zip(*sent.values(), strict=True))
            answers = await session.apply(changes, keys, repeatables, 1)
            found = answers._replace(
                accounts={name: result._replace(decided_at=None) for name, result in answers.accounts.items()},
                unpaid={index: sorted(payees) for index, payees in answers.unpaid.items()},
            )
            assert found == model.apply(list(sent.values())), (number, sent)
            kinds["replayed"] += len(answers.recorded)
            kinds.update("applied" if result.applied else "not" for result in answers.accounts.values())
            kinds.update("none" if one[0].balance is None else "full" for one in answers.unpaid.values())
            kinds["captured"] += sum(change.hold_amount < 0 < len(change.payees) for change in changes)
            if number % 10 == 0:
                refused = model.refuse(transfer(1, [Credit(3, 10**9), Credit(2, 5)], None, "r"), f"refused {number}")
                assert await session.record_refusals([refused], 1) == {(1, refused.key)}
            if number % 25 == 0:
                model.check(database)
    finally:
        await session.close()
    model.check(database)
    assert min(kinds[kind] for kind in ("replayed", "applied", "not", "none", "full", "captured")) > 5, kinds
    assert verify(database.url).differences == []


@pytest.mark.slow
async def test_sessions_that_pay_each_other_neither_deadlock_nor_wait_in_vain(database: Database) -> None:
    """Each deadlock and each lock timeout would be an error to one of them."""
    accounts = range(1, 31)
    database.open(dict.fromkeys(accounts, 1_000))
    database.execute("ANALYZE users")
    settings = Settings(database_url=database.url, lock_seconds=10, statement_seconds=20)
    give_up = asyncio.get_running_loop().time() + HAMMER_SECONDS

    async def hammer(number: int) -> int:
        chance = random.Random(number)
        session = await connect(settings)
        sent = 0
        try:
            while asyncio.get_running_loop().time() < give_up:
                load = Load(400, 400)
                changes: list[Change] = []
                for _ in range(100):
                    payer, *others = chance.sample(accounts, chance.choice((2, 3)))
                    # Half of them more than is there, so that much is taken back.
                    change = transfer(payer, [Credit(other, chance.choice((1, 700))) for other in others], None, None)
                    if load.take(change):
                        changes.append(change)
                keys = [f" {number}-{sent + place}" for place in range(len(changes))]
                sent += len(changes)
                await session.apply(changes, keys, [False] * len(changes), 10)
        finally:
            await session.close()
        return sent

    sent = await asyncio.gather(*(hammer(number) for number in range(HAMMERS)))
    assert min(sent) > 0
    assert database.execute("SELECT sum(balance) FROM users") == [(1_000 * len(accounts),)]
    assert verify(database.url).differences == []
    assert database.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]


async def test_a_payee_that_is_opened_meanwhile_is_paid_or_missing(database: Database) -> None:
    """The statement takes long enough, and is sent often enough, that some payees are opened in the middle of it."""
    there = range(2, 900)
    database.open({1: 10**9, **dict.fromkeys(there, 0)})
    chance = random.Random(1)
    session = await connect(Settings(database_url=database.url))
    kinds: Counter[str] = Counter()
    seconds = 0.1
    try:
        for new in range(1_000, 1_000 + OPENED):
            change = transfer(1, [Credit(user_id, 1) for user_id in (*there, new)], None, None)
            opening = threading.Timer(chance.uniform(0, seconds), database.open, ({new: 0},))
            began = time.monotonic()
            opening.start()
            answers = await session.apply([change], [f" {new}"], [False], 10)
            seconds = 0.9 * seconds + 0.1 * (time.monotonic() - began)
            opening.join()
            if answers.unpaid:
                assert answers == Answers({}, {}, {}, {0: [Unpaid(new, None)]})
            else:
                assert answers.credited[0].keys() == {*there, new}
            kinds["missing" if answers.unpaid else "paid"] += 1
    finally:
        await session.close()
    assert min(kinds["missing"], kinds["paid"]) > 0, kinds


@pytest.mark.parametrize("users", [50, 20_000])
@pytest.mark.parametrize("transfers", [1, 20])
def test_the_plan_takes_rows_in_the_order_of_their_ids_and_reads_no_table_whole(
    database: Database, users: int, transfers: int
) -> None:
    database.open(dict.fromkeys(range(1, users + 1), 100))
    database.execute("ANALYZE users")
    legs = [
        (number, user_id, account, f"{number}", -2 if account == user_id else 2)
        for number, user_id in enumerate(range(transfers, 0, -1), 1)
        for account in (user_id, user_id + transfers)
    ]
    notices: list[str] = []
    with database.session(
        "LOAD 'auto_explain'",
        "SET auto_explain.log_min_duration = 0",
        "SET auto_explain.log_nested_statements = on",
        "SET auto_explain.log_format = json",
        "SET auto_explain.log_level = notice",
    ) as connection:
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
        rows = connection.execute(
            "SELECT count(*) FROM apply_transfers(%s::bigint[], %s::bigint[], %s::bigint[], %s::text[], %s::bigint[],"
            " NULL, NULL, NULL, NULL, NULL, %s::boolean[], '1s') WHERE verdict IN ('applied', 'credited')",
            [*map(list, zip(*legs, strict=True)), [True] * len(legs)],
        ).fetchall()
    assert rows == [(2 * transfers,)]
    plans = [json.loads(notice.split("plan:", 1)[1])["Plan"] for notice in notices if "plan:" in notice]
    (update,) = (found for plan in plans for found in _nodes(plan, UPDATE_OF_USERS))
    (loop,) = update["Plans"]
    assert loop["Node Type"] == "Nested Loop", loop
    outer, inner = loop["Plans"]
    assert (outer["Node Type"], outer["CTE Name"]) == ("CTE Scan", "demand"), loop
    if users > 50:
        assert (inner["Node Type"], inner["Index Name"]) == ("Index Scan", "users_pkey"), loop
        scans = [found["Relation Name"] for plan in plans for found in _nodes(plan, {"Node Type": "Seq Scan"})]
        assert scans == []
    (demand,) = (found for plan in plans for found in _nodes(plan, {"Subplan Name": "CTE demand"}))
    assert (demand["Node Type"], demand["Strategy"]) == ("Aggregate", "Sorted"), demand
    assert [found["Sort Key"][0] for found in _nodes(demand, {"Node Type": "Sort"})] == ["sent.account"], demand
