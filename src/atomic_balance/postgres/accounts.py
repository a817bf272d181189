"""Opens and reads accounts, sets their minimum balance, and reads the journal."""

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

import asyncpg

from atomic_balance.changes import Account, Credit, Refusal, settlement_key
from atomic_balance.postgres.failures import Failure, UnreachableError, failure_of
from atomic_balance.postgres.migrations import missing_migrations
from atomic_balance.postgres.session import credits_from
from atomic_balance.postgres.statements import (
    APPLIED_MIGRATIONS,
    COUNT_OPEN_HOLDS,
    COUNT_OVERDUE_HOLDS,
    EXPIRED_HOLDS,
    KEEP_FEED_ASCENDING,
    LIST_ACCOUNTS,
    OPEN_ACCOUNT,
    READ_ACCOUNT,
    READ_CHANGE,
    READ_CHANGES,
    READ_CHANGES_AFTER,
    READ_FEED,
    READ_FEED_HEAD,
    READ_HOLDS,
    READ_OPEN_HOLDS,
    READ_PAST_BALANCE,
    READ_SHARD_HOLDS,
    SET_MINIMUM_BALANCE,
    SUM_BALANCES,
    TAKE_EXPIRY_TURN,
    in_schema,
)
from atomic_balance.settings import Settings


class Opening(NamedTuple):
    """The account as it is now, the values that it was opened with, and whether this call opened it."""

    account: Account
    opening_balance: int
    opening_minimum_balance: int
    opened: bool


class PastBalance(NamedTuple):
    """What an account had at a time: its balance, and its version.

    `opened`: whether the account was open then; one of which that is not known always was. `over`: whether that time is
    over, by the database's clock.
    """

    balance: int
    version: int
    opened: bool
    over: bool


class HoldStatus(StrEnum):
    """What has become of a hold: it is held until its settlement is in the journal, also if its time is over."""

    HELD = "held"
    CAPTURED = "captured"
    RELEASED = "released"
    EXPIRED = "expired"


class Hold(NamedTuple):
    """A hold that was placed.

    `overdue`: its time is over, by the database's clock. `captured`, `balance`: what its capture took and left.
    `payees`: to whom it was captured, if to anybody.
    """

    user_id: int
    hold_id: str
    amount: int
    reference: str | None
    expires_at: datetime
    status: HoldStatus
    overdue: bool = False
    captured: int | None = None
    balance: int | None = None
    payees: tuple[Credit, ...] = ()


class ExpiredHold(NamedTuple):
    """An open hold whose time is over."""

    user_id: int
    hold_id: str
    amount: int
    expires_at: datetime


_BEFORE_ALL = (datetime.min.replace(tzinfo=UTC), 0, "")


class JournalRow(NamedTuple):
    """A row of the journal. `version` is None, and `refusal` is not, if the change was refused; 0 for the opening.

    `hold_amount`: what the change added to what is held; 0 if it has nothing to do with a hold. `payees`: whom it paid,
    if it was a transfer. `payer`: who paid, if it is the credit of a payee. `created_at`: None of an old opening.
    """

    version: int | None
    amount: int
    hold_amount: int
    balance: int
    idempotency_key: str
    reference: str | None
    created_at: datetime | None
    refusal: Refusal | None
    payees: tuple[Credit, ...] = ()
    payer: int | None = None


class FeedPlace(NamedTuple):
    """A place in the feed: right after a row, by its position, user and version; all 0: the beginning."""

    position: int = 0
    user_id: int = 0
    version: int = 0


class FeedHead(NamedTuple):
    """How far the feed goes: the position of its newest row, and for how long an older transaction holds back the next.

    `lag_seconds`: 0 if nothing is held back.
    """

    position: int
    lag_seconds: float


class Accounts:
    """Everything that is asked of the database but to apply changes. Every method may raise UnreachableError.

    Every method can be repeated without harm, so it need not tell a lost answer from a statement that was never run.
    """

    def __init__(self, pool: asyncpg.Pool, settings: Settings) -> None:
        self._pool = pool
        self._settings = settings
        self._holds_statement = READ_SHARD_HOLDS if settings.citus else READ_HOLDS

    async def open_account(self, user_id: int, balance: int, minimum_balance: int) -> Opening:
        """Open an account with `balance` and `minimum_balance`, unless there is one."""
        while True:
            rows = await self._fetch(OPEN_ACCOUNT, user_id, balance, minimum_balance)
            if rows:
                account, opening = rows[0][:5], rows[0][5:]
                return Opening(Account(user_id, *account), *opening)

    async def account(self, user_id: int) -> Account | None:
        """The account of a user; None if there is no such user."""
        rows = await self._fetch(READ_ACCOUNT, user_id)
        return Account(user_id, *rows[0]) if rows else None

    async def balance_at(self, user_id: int, time: datetime) -> PastBalance | None:
        """What a user had at `time`, which has an offset; None if there is no such user."""
        rows = await self._fetch(READ_PAST_BALANCE, user_id, time)
        return PastBalance(*rows[0]) if rows else None

    async def accounts(self, after: int, count_max: int) -> list[Account]:
        """The first `count_max` accounts with a user id above `after`, by id."""
        return [Account(*row) for row in await self._fetch(LIST_ACCOUNTS, after, count_max)]

    async def total(self, first: int, last: int) -> int:
        """What the accounts with ids from `first` to `last` have together, at one moment."""
        ((total,),) = await self._fetch(SUM_BALANCES, first, last)
        return int(total)

    async def set_minimum_balance(self, user_id: int, minimum_balance: int) -> tuple[Account, bool] | None:
        """The account, and whether its minimum could be set; None if there is no such user."""
        rows = await self._fetch(SET_MINIMUM_BALANCE, user_id, minimum_balance)
        return (Account(user_id, *rows[0][:5]), rows[0]["changed"]) if rows else None

    async def changes(self, user_id: int, before: int | None, count_max: int) -> list[JournalRow]:
        """The newest `count_max` applied changes with a version below `before`, newest first, the opening the last.

        Empty if there is no such user.
        """
        return [_journal_row(row) for row in await self._fetch(READ_CHANGES, user_id, before, count_max)]

    async def changes_after(self, user_id: int, version: int, count_max: int) -> list[JournalRow]:
        """The oldest `count_max` applied changes with a version above `version`, oldest first."""
        return [_journal_row(row) for row in await self._fetch(READ_CHANGES_AFTER, user_id, version, count_max)]

    async def change(self, user_id: int, idempotency_key: str) -> JournalRow | None:
        """The change, applied or refused, that is bound to a key; None if none is."""
        rows = await self._fetch(READ_CHANGE, user_id, idempotency_key)
        return _journal_row(rows[0]) if rows else None

    async def feed(self, after: FeedPlace, count_max: int) -> list[tuple[FeedPlace, JournalRow]]:
        """The first `count_max` applied changes of all accounts after a place, each with its own place.

        None that comes later has a place among them or before them.
        """
        return [(FeedPlace(*row[:3]), _journal_row(row[2:])) for row in await self._fetch(READ_FEED, *after, count_max)]

    async def feed_head(self) -> FeedHead:
        """How far the feed goes."""
        ((position, lag_seconds),) = await self._fetch(READ_FEED_HEAD)
        return FeedHead(position, lag_seconds)

    async def keep_feed_ascending(self) -> None:
        """See to it that positions of the feed go on rising, if the server is another one than before."""
        await self._fetch(KEEP_FEED_ASCENDING)

    async def placed_holds(self, asked: Sequence[tuple[int, str]]) -> list[Hold | None]:
        """The holds with these (user id, hold id), as they were placed: their settlements are not looked for.

        None where none was placed, or it was refused.
        """
        rows = await self._fetch(
            self._holds_statement, [user_id for user_id, _ in asked], [hold_id for _, hold_id in asked]
        )
        holds: list[Hold | None] = [None] * len(asked)
        for position, _, amount, reference, _, expires_at, overdue, _ in rows:
            if amount and amount > 0:
                user_id, hold_id = asked[position - 1]
                holds[position - 1] = Hold(user_id, hold_id, amount, reference, expires_at, HoldStatus.HELD, overdue)
        return holds

    async def hold(self, user_id: int, hold_id: str) -> Hold | None:
        """A hold as it is now; None if none was placed, or it was refused."""
        rows = await self._fetch(self._holds_statement, [user_id, user_id], [hold_id, settlement_key(hold_id)])
        placed, settled = ([row for row in rows if row["position"] == position] for position in (1, 2))
        if not placed or (placed[0]["hold_amount"] or 0) <= 0:
            return None
        _, _, amount, reference, _, expires_at, overdue, _ = placed[0]
        if not settled:
            return Hold(user_id, hold_id, amount, reference, expires_at, HoldStatus.HELD, overdue)
        _, moved, _, _, balance, expiry, _, payees = settled[0]
        status = HoldStatus.CAPTURED if moved else HoldStatus.EXPIRED if expiry else HoldStatus.RELEASED
        paid = credits_from(payees)
        return Hold(user_id, hold_id, amount, reference, expires_at, status, overdue, -moved, balance, paid)

    async def open_holds(self, user_id: int, after: str, count_max: int) -> list[Hold]:
        """The first `count_max` open holds of an account with an id above `after`, by id."""
        return [
            Hold(user_id, hold_id, amount, reference, expires_at, HoldStatus.HELD)
            for hold_id, amount, reference, expires_at in await self._fetch(READ_OPEN_HOLDS, user_id, after, count_max)
        ]

    async def take_expiry_turn(self, holder: str) -> bool:
        """Whether it is the turn of `holder`, a name of one process alone, to settle what has expired."""
        return bool(await self._fetch(TAKE_EXPIRY_TURN, holder))

    async def expired_holds(
        self, after: ExpiredHold | None, without: Collection[int], count_max: int
    ) -> list[ExpiredHold]:
        """Open holds that have expired, from the first that did or from `after` on, not those of users in `without`."""
        place = (after.expires_at, after.user_id, after.hold_id) if after else _BEFORE_ALL
        return [ExpiredHold(*row) for row in await self._fetch(EXPIRED_HOLDS, *place, list(without), count_max)]

    async def count_open_holds(self) -> tuple[int, float]:
        """How many holds are open, and what they hold together. It reads the whole list of them."""
        ((count, held),) = await self._fetch(COUNT_OPEN_HOLDS)
        return count, held

    async def count_overdue_holds(self, count_max: int) -> int:
        """How many open holds expired over a second ago; counted up to `count_max`."""
        ((count,),) = await self._fetch(COUNT_OVERDUE_HOLDS, count_max)
        return int(count)

    async def missing_migrations(self) -> list[str]:
        """The migrations that the database lacks, in order."""
        try:
            rows = await self._fetch(APPLIED_MIGRATIONS)
        except asyncpg.UndefinedTableError:
            rows = []
        return missing_migrations((row["migration_id"] for row in rows), self._settings.citus)

    async def _fetch(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        statement = in_schema(statement, self._settings.database_schema)
        seconds = self._settings.statement_seconds
        try:
            async with self._pool.acquire(timeout=self._settings.connect_seconds + seconds) as connection:
                try:
                    rows: list[asyncpg.Record] = await connection.fetch(statement, *arguments, timeout=seconds)
                except asyncio.CancelledError:
                    # Or the pool would wait for a server that may never answer, and fail with that instead.
                    connection.terminate()
                    raise
                except Exception as error:
                    if failure_of(error, self._settings.citus) in (Failure.UNKNOWN, Failure.CANNOT_WRITE):
                        with contextlib.suppress(
                            asyncpg.InterfaceError
                        ):  # the pool has seen it close, and let go of it
                            connection.terminate()
                    raise
                return rows
        except UnreachableError:
            raise
        except Exception as error:
            if failure_of(error, self._settings.citus) is Failure.REJECTED:
                raise
            raise UnreachableError from error


def _journal_row(row: Sequence[Any]) -> JournalRow:
    version, amount, hold_amount, balance, key, reference, created_at, refusal, payees, payer = row
    reason = Refusal(refusal) if refusal else None
    paid = credits_from(payees)
    return JournalRow(version, amount, hold_amount or 0, balance, key, reference, created_at, reason, paid, payer)
