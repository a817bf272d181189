"""Opens and reads accounts, sets their minimum balance, and reads the journal."""

from datetime import datetime
from typing import NamedTuple

import asyncpg

from atomic_balance.changes import Account, Refusal
from atomic_balance.postgres.failures import Failure, UnreachableError, failure_of
from atomic_balance.postgres.migrations import missing_migrations
from atomic_balance.postgres.statements import (
    APPLIED_MIGRATIONS,
    OPEN_ACCOUNT,
    READ_ACCOUNT,
    READ_CHANGE,
    READ_CHANGES,
    SET_MINIMUM_BALANCE,
)
from atomic_balance.settings import Settings


class Opening(NamedTuple):
    """The account as it is now, the values that it was opened with, and whether this call opened it."""

    account: Account
    opening_balance: int
    opening_minimum_balance: int
    opened: bool


class JournalRow(NamedTuple):
    """A row of the journal. `version` is None, and `refusal` is not, if the change was refused."""

    version: int | None
    amount: int
    balance: int
    idempotency_key: str
    reference: str | None
    created_at: datetime
    refusal: Refusal | None


class Accounts:
    """Everything that is asked of the database but to apply changes. Every method may raise UnreachableError.

    Every method can be repeated without harm, so it need not tell a lost answer from a statement that was never run.
    """

    def __init__(self, pool: asyncpg.Pool, settings: Settings) -> None:
        self._pool = pool
        self._settings = settings

    async def open_account(self, user_id: int, balance: int, minimum_balance: int) -> Opening:
        """Open an account with `balance` and `minimum_balance`, unless there is one."""
        while True:
            rows = await self._fetch(OPEN_ACCOUNT, user_id, balance, minimum_balance)
            if rows:
                account, opening = rows[0][:3], rows[0][3:]
                return Opening(Account(user_id, *account), *opening)

    async def account(self, user_id: int) -> Account | None:
        """The account of a user; None if there is no such user."""
        rows = await self._fetch(READ_ACCOUNT, user_id)
        return Account(user_id, *rows[0]) if rows else None

    async def set_minimum_balance(self, user_id: int, minimum_balance: int) -> tuple[Account, bool] | None:
        """The account, and whether its minimum could be set; None if there is no such user."""
        rows = await self._fetch(SET_MINIMUM_BALANCE, user_id, minimum_balance)
        return (Account(user_id, *rows[0][:3]), rows[0]["changed"]) if rows else None

    async def changes(self, user_id: int, before: int | None, count_max: int) -> list[JournalRow]:
        """The newest `count_max` applied changes with a version below `before`, newest first."""
        return [_journal_row(row) for row in await self._fetch(READ_CHANGES, user_id, before, count_max)]

    async def change(self, user_id: int, idempotency_key: str) -> JournalRow | None:
        """The change, applied or refused, that is bound to a key; None if none is."""
        rows = await self._fetch(READ_CHANGE, user_id, idempotency_key)
        return _journal_row(rows[0]) if rows else None

    async def missing_migrations(self) -> list[str]:
        """The migrations that the database lacks, in order."""
        try:
            rows = await self._fetch(APPLIED_MIGRATIONS)
        except asyncpg.UndefinedTableError:
            rows = []
        return missing_migrations((row["migration_id"] for row in rows), self._settings.citus)

    async def _fetch(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        seconds = self._settings.statement_seconds
        try:
            async with self._pool.acquire(timeout=self._settings.connect_seconds + seconds) as connection:
                try:
                    rows: list[asyncpg.Record] = await connection.fetch(statement, *arguments, timeout=seconds)
                except Exception as error:
                    if failure_of(error, self._settings.citus) in (Failure.UNKNOWN, Failure.CANNOT_WRITE):
                        connection.terminate()
                    raise
                return rows
        except UnreachableError:
            raise
        except Exception as error:
            if failure_of(error, self._settings.citus) is Failure.REJECTED:
                raise
            raise UnreachableError from error


def _journal_row(row: asyncpg.Record) -> JournalRow:
    version, amount, balance, key, reference, created_at, refusal = row
    return JournalRow(version, amount, balance, key, reference, created_at, Refusal(refusal) if refusal else None)
