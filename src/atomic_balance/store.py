"""The only module that talks to PostgreSQL on the way of a request: it runs the statements and names their outcomes."""

from importlib import resources
from typing import NamedTuple

import asyncpg

from atomic_balance.changes import BALANCE_LIMIT, Applied, Change, NoSuchUser, Outcome, Refusal, Refused
from atomic_balance.migrations import missing_migrations


def _statement(name: str) -> str:
    return resources.files("atomic_balance.statements").joinpath(f"{name}.sql").read_text()


UPDATE_BALANCE = _statement("update_balance")
OPEN_ACCOUNT = _statement("open_account")
READ_ACCOUNT = _statement("read_account")
APPLIED_MIGRATIONS = _statement("applied_migrations")

_CERTAINLY_ROLLED_BACK = {
    "55P03",  # lock_not_available
    "40P01",  # deadlock_detected
    "40001",  # serialization_failure
    "57014",  # query_canceled
    "25006",  # read_only_sql_transaction
}


class UnavailableError(Exception):
    """PostgreSQL could not be reached in time, or rolled back: nothing was changed."""


class OutcomeUnknownError(Exception):
    """The connection was lost, or the time was up, with a statement under way: it may have been committed."""


class Opening(NamedTuple):
    """What came of opening an account: its balance now, the one it was opened with, and whether this call opened it."""

    balance: int
    opening_balance: int
    opened: bool


class Store:
    """The statements over a pool of connections. Every method raises UnavailableError or OutcomeUnknownError."""

    def __init__(self, pool: asyncpg.Pool, acquire_seconds: float, statement_seconds: float) -> None:
        self._pool = pool
        self._acquire_seconds = acquire_seconds
        self._statement_seconds = statement_seconds

    async def update(self, change: Change) -> Outcome:
        """Apply one change, if the balance allows it."""
        while True:
            rows = await self._fetch(UPDATE_BALANCE, change.user_id, change.amount)
            if not rows:
                return NoSuchUser()
            balance, applied = rows[0]
            if applied:
                return Applied(balance)
            if balance + change.amount < 0:
                return Refused(Refusal.INSUFFICIENT_FUNDS)
            if balance + change.amount > BALANCE_LIMIT:
                return Refused(Refusal.BALANCE_LIMIT_EXCEEDED)
            # The snapshot is older than the balance that made the condition fail, and does not justify a refusal.

    async def open_account(self, user_id: int, balance: int) -> Opening:
        """Open an account with `balance`, unless there is one."""
        while True:
            rows = await self._fetch(OPEN_ACCOUNT, user_id, balance)
            if rows:
                return Opening(*rows[0])

    async def balance(self, user_id: int) -> int | None:
        """The balance of an account; None if there is no such user."""
        rows = await self._fetch(READ_ACCOUNT, user_id)
        return rows[0]["balance"] if rows else None

    async def missing_migrations(self) -> list[str]:
        """The migrations that the database lacks, in order."""
        try:
            rows = await self._fetch(APPLIED_MIGRATIONS)
        except asyncpg.UndefinedTableError:
            rows = []
        return missing_migrations(row["migration_id"] for row in rows)

    async def _fetch(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        try:
            connection = await self._pool.acquire(timeout=self._acquire_seconds)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise UnavailableError from error
        try:
            rows: list[asyncpg.Record] = await connection.fetch(statement, *arguments, timeout=self._statement_seconds)
            return rows
        except asyncpg.PostgresError as error:
            state = error.sqlstate or ""
            if state in _CERTAINLY_ROLLED_BACK or state.startswith("53"):
                raise UnavailableError from error
            if state.startswith(("08", "57P")) or error.severity_en in ("FATAL", "PANIC"):
                raise OutcomeUnknownError from error
            raise
        except (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            connection.terminate()
            raise OutcomeUnknownError from error
        finally:
            await self._pool.release(connection, timeout=self._statement_seconds)
