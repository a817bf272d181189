"""The function that applies a batch: what it leaves, against a plain model; and in which order it takes rows.

That is the order of their ids, whatever their number, so nobody deadlocks.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest

from atomic_balance.changes import BALANCE_LIMIT, Change, Refusal, capture, hold, release, settlement_key
from atomic_balance.postgres.session import AccountResult, Answers, Recorded, RefusalRecord, connect
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.database import Database

BATCHES = 300
HAMMER_SECONDS = 4
HAMMERS = 6
ROWS = 50


@pytest.mark.parametrize("users", [2, 50, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_the_plan_takes_rows_in_the_order_of_their_ids(database: Database, users: int) -> None:
    """A nested loop, driven by the sorted accounts of the batch; over the primary key, where users are many."""
    database.execute(
        "INSERT INTO users (id, balance, opening_balance)"
        f" SELECT id, 1000000, 1000000 FROM generate_series(1, {users}::bigint) AS id"
    )
    database.execute("ANALYZE users")
    for mode in ("force_custom_plan", "force_generic_plan"):
        for changes in (2, 50, 1_000):
            plans, taken = applied_with_plans(database, mode, changes, users)
            (update,) = (found for plan in plans for found in _nodes(plan, UPDATE_OF_USERS))
            (loop,) = update["Plans"]
            assert loop["Node Type"] == "Nested Loop", loop
            outer, inner = loop["Plans"]
            assert (outer["Node Type"], outer["CTE Name"]) == ("CTE Scan", "demand"), loop
            if users > 50:
                assert (inner["Node Type"], inner["Index Name"]) == ("Index Scan", "users_pkey"), loop
            (demand,) = (found for plan in plans for found in _nodes(plan, {"Subplan Name": "CTE demand"}))
            assert (demand["Node Type"], demand["Strategy"]) == ("Aggregate", "Sorted"), demand
            assert len(taken) == min(users, changes)
            assert taken == sorted(taken)


UPDATE_OF_USERS = {"Node Type": "ModifyTable", "Relation Name": "users"}


def applied_with_plans(
    database: Database, mode: str, changes: int, users: int
) -> tuple[list[dict[str, Any]], list[int]]:
    """Apply withdrawals and holds, their users in no order; gives the plans inside the function, and those users."""
    notices: list[str] = []
    arrays = (
        [1 + number * 7_919 % users for number in range(changes)],
        [f"{mode} {changes} {number}" for number in range(changes)],
        [number % 2 - 1 for number in range(changes)],
        [number % 2 or None for number in range(changes)],
        [None] * changes,
        [60 * (number % 2) or None for number in range(changes)],
        [None] * changes,
        [True] * changes,
    )
    types = ("bigint", "text", "bigint", "bigint", "text", "integer", "text", "boolean")
    places = ", ".join(f"%s::{kind}[]" for kind in types)
    with database.session(
        "LOAD 'auto_explain'",
        "SET auto_explain.log_min_duration = 0",
        "SET auto_explain.log_nested_statements = on",
        "SET auto_explain.log_format = json",
        "SET auto_explain.log_level = notice",
        f"SET plan_cache_mode = {mode}",
    ) as connection:
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
        statement = f"SELECT user_id FROM apply_changes(1, {places}, '1s') WHERE applied"
        taken = [user_id for (user_id,) in connection.execute(statement.encode(), arrays)]
        connection.commit()
    return [json.loads(notice.split("plan:", 1)[1])["Plan"] for notice in notices if "plan:" in notice], taken


def _nodes(plan: dict[str, Any], wanted: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The nodes of a plan with the properties `wanted`."""
    if wanted.items() <= plan.items():
        yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child, wanted)


class Account(NamedTuple):
    """An account, in the model."""

    balance: int
    held: int
    minimum: int
    version: int


class Model:
    """The tables, as batches that are applied change by change would leave them."""

    def __init__(self, accounts: dict[int, Account]) -> None:
        self.accounts = accounts
        self.journal: dict[tuple[int, str], tuple[Change, int | None, int, str | None, datetime | None]] = {}
        self.open_holds: dict[tuple[int, str], tuple[int, datetime]] = {}

    def apply(self, changes: list[Change], keys: list[str], repeatable: list[bool], now: datetime | None) -> Answers:
        """What the function answers, and what it leaves; `now`: when, by its own answer."""
        sent = list(enumerate(zip(changes, keys, repeatable, strict=True)))
        recorded = {}
        for place, (change, key, repeated) in sent:
            if repeated and (change.user_id, key) in self.journal:
                first, _, balance, refusal, _ = self.journal[change.user_id, key]
                shown = Change(
                    first.user_id,
                    first.amount,
                    None,
                    first.reference,
                    first.hold_amount,
                    lasting_seconds=0 if first.is_expiry else None,
                )
                recorded[place] = Recorded(shown, balance, Refusal(refusal) if refusal else None)
        results = {}
        for user_id in {change.user_id for place, (change, *_) in sent if place not in recorded}:
            fresh = [
                (change, key) for place, (change, key, _) in sent if place not in recorded and change.user_id == user_id
            ]
            before = self.accounts.get(user_id)
            if before is not None:
                applied = self._apply_account(before, fresh, now)
                results[user_id] = AccountResult(
                    applied, before.balance, before.held, before.minimum, now if applied else None
                )
        return Answers(recorded, results)

    def _apply_account(self, account: Account, fresh: list[tuple[Change, str]], now: datetime | None) -> bool:
        rows = []
        for change, key in fresh:
            balance, held = account.balance + change.amount, account.held + change.hold_amount
            account = Account(balance, held, account.minimum, account.version + 1)
            if not account.minimum <= balance - held or balance > BALANCE_LIMIT:
                return False
            rows.append((change, key, account))
        if account.held < 0:
            return False
        for change, key, after in rows:
            assert now
            lasting = change.lasting_seconds
            expires_at = None if lasting is None else now + timedelta(seconds=lasting)
            self.journal[change.user_id, key] = change, after.version, after.balance, None, expires_at
            if change.hold_amount > 0 and expires_at:
                self.open_holds[change.user_id, key] = change.hold_amount, expires_at
            elif change.hold_id is not None:
                self.open_holds.pop((change.user_id, change.hold_id), None)
            self.accounts[change.user_id] = after
        return True

    def refuse(self, change: Change, key: str) -> RefusalRecord:
        """Bind a refusal to a key."""
        balance = self.accounts[change.user_id].balance
        self.journal[change.user_id, key] = change, None, balance, Refusal.INSUFFICIENT_FUNDS, None
        return RefusalRecord(change, key, balance, Refusal.INSUFFICIENT_FUNDS)

    def check(self, database: Database) -> None:
        """Compare with the tables, row by row."""
        accounts = database.execute("SELECT id, balance, held, minimum_balance, version FROM users")
        assert {user_id: Account(*row) for user_id, *row in accounts} == self.accounts
        rows = database.execute(
            "SELECT user_id, idempotency_key, version, amount, hold_amount, balance, refusal, reference, expires_at,"
            " payees FROM balance_changes"
        )
        assert {(user_id, key): tuple(row) for user_id, key, *row in rows} == {
            name: (
                *(version, change.amount, change.hold_amount or None, balance),
                *(refusal, change.reference, expires_at, None),
            )
            for name, (change, version, balance, refusal, expires_at) in self.journal.items()
        }
        holds = database.execute("SELECT user_id, hold_id, amount, expires_at FROM open_holds")
        assert {(user_id, hold_id): tuple(row) for user_id, hold_id, *row in holds} == self.open_holds


NOBODY = 99
PHANTOM = 10**9
"""What a hold that another session has just settled would have held."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_random_batches_leave_what_a_plain_model_says(database: Database, statement: str, seed: int) -> None:
    """Updates, holds, settlements, replays of all of them and of refusals, users that don't exist."""
    chance = random.Random(seed)
    minimums = {user_id: chance.choice((0, 0, -20)) for user_id in range(1, 7)}
    model = Model({user_id: Account(40, 0, minimum, 0) for user_id, minimum in minimums.items()})
    for user_id, minimum in minimums.items():
        database.execute(
            "INSERT INTO users (id, balance, opening_balance, minimum_balance) VALUES (%s, 40, 40, %s)",
            user_id,
            minimum,
        )
    kinds: Counter[str] = Counter()
    session = await connect(Settings(database_url=database.url, citus=statement != "apply_changes"))
    try:
        for number in range(BATCHES):
            users = [*minimums, NOBODY]
            if statement == "cluster" or chance.random() < 0.2:
                users = [chance.choice(users)]
            size = 1 if chance.random() < 0.3 else chance.randint(2, 16)
            sent = {}
            for place in range(size):
                change, key, repeated = random_change(chance, model, chance.choice(users), f"{number} {place}")
                sent[change.user_id, key] = change, key, repeated
            changes, keys, repeatable = map(list, zip(*sent.values(), strict=True))
            answers = await session.apply(changes, keys, repeatable, 1)
            times = {result.decided_at for result in answers.accounts.values() if result.decided_at}
            assert len(times) < 2
            applied = any(result.applied for result in answers.accounts.values())
            assert times or not (applied and any(change.hold_amount for change in changes))
            moment = times.pop() if times else datetime.now(UTC)  # without a hold nobody needs to know it
            told = {
                user_id: result._replace(decided_at=moment) if result.applied else result
                for user_id, result in answers.accounts.items()
            }
            assert answers._replace(accounts=told) == model.apply(
                changes, keys, repeatable, moment if applied else None
            )
            kinds["replayed"] += len(answers.recorded)
            kinds.update("applied" if result.applied else "not" for result in answers.accounts.values())
            if number % 10 == 0:
                refused = model.refuse(
                    chance.choice([Change(1, -PHANTOM), hold(1, "", PHANTOM, 60, "r")]), f"refused {number}"
                )
                assert await session.record_refusals([refused], 1) == {(1, refused.key)}
            if number % 25 == 0:
                model.check(database)
    finally:
        await session.close()
    model.check(database)
    assert min(kinds["replayed"], kinds["applied"], kinds["not"]) > BATCHES / 20, kinds
    assert any(change.hold_amount < 0 < -change.amount for change, *_ in model.journal.values())
    assert model.open_holds
    assert verify(database.url).differences == []


def random_change(chance: random.Random, model: Model, user_id: int, name: str) -> tuple[Change, str, bool]:
    """A change, the key that it is sent under, and whether the journal may hold that."""
    theirs = [(key, row[0]) for (owner, key), row in model.journal.items() if owner == user_id]
    open_holds = [(key, amount) for (owner, key), (amount, _) in model.open_holds.items() if owner == user_id]
    match chance.choice(("update", "keyed", "hold", "hold", "settle", "settle", "settle", "again", "phantom")):
        case "keyed":
            return Change(user_id, chance.choice((-9, -1, 2, 9)), name, chance.choice((None, "r"))), name, True
        case "hold":
            return (
                hold(user_id, name, chance.randint(1, 9), chance.randint(1, 10**7), chance.choice((None, "r"))),
                name,
                True,
            )
        case "settle" if open_holds:
            key, amount = chance.choice(open_holds)
            change = chance.choice(
                [
                    capture(user_id, key, amount, chance.randint(1, amount)),
                    release(user_id, key, amount),
                    release(user_id, key, amount, expired=True),
                ]
            )
            return change, settlement_key(key), True
        case "again" if theirs:
            key, change = chance.choice(theirs)
            return change, key, True
        case "phantom" if chance.random() < 0.2:
            return release(user_id, name, PHANTOM), settlement_key(name), True
    return Change(user_id, chance.choice((-9, -1, 2, 9))), f" {name}", False


@pytest.mark.slow
async def test_sessions_that_hammer_the_same_rows_neither_deadlock_nor_wait_in_vain(database: Database) -> None:
    """Each deadlock and each lock timeout would be an error to one of them."""
    database.open(dict.fromkeys(range(1, ROWS + 1), 1_000_000))
    database.execute("ANALYZE users")
    settings = Settings(database_url=database.url, lock_seconds=10, statement_seconds=20)
    give_up = asyncio.get_running_loop().time() + HAMMER_SECONDS

    async def hammer(number: int) -> int:
        chance = random.Random(number)
        session = await connect(settings)
        sent = 0
        try:
            while asyncio.get_running_loop().time() < give_up:
                users = chance.choices(range(1, ROWS + 1), k=chance.choice((10, 50, 200)))
                keys = [f"{number}-{sent + place}" for place in range(len(users))]
                sent += len(users)
                changes = [Change(user_id, chance.choice((-2, -1, 3))) for user_id in users]
                answers = await session.apply(changes, keys, [False] * len(users), 10)
                assert all(result.applied for result in answers.accounts.values())
        finally:
            await session.close()
        return sent

    sent = await asyncio.gather(*(hammer(number) for number in range(HAMMERS)))
    found = verify(database.url)
    assert (found.accounts, found.changes, found.differences) == (ROWS, sum(sent), [])
    assert database.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]
