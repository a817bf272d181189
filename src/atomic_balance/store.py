"""The only module that talks to PostgreSQL on the way of a request: it runs the statements, and names what they did."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum, auto
from importlib import resources
from typing import NamedTuple

import asyncpg

from atomic_balance.changes import Change, Refusal
from atomic_balance.connections import FAULTS, UnreachableError, open_connection
from atomic_balance.migrations import missing_migrations
from atomic_balance.settings import Settings


def _statement(name: str) -> str:
    return resources.files("atomic_balance.statements").joinpath(f"{name}.sql").read_text()


APPLIED_MIGRATIONS = _statement("applied_migrations")
APPLY_ACCOUNT = _statement("apply_account")
APPLY_CHANGES = _statement("apply_changes")
HELD_ACCOUNTS = _statement("held_accounts")
OPEN_ACCOUNT = _statement("open_account")
READ_ACCOUNT = _statement("read_account")
READ_CHANGE = _statement("read_change")
READ_CHANGES = _statement("read_changes")
RECORD_REFUSALS = _statement("record_refusals")
SET_MINIMUM_BALANCE = _statement("set_minimum_balance")
VERIFY_ACCOUNTS = _statement("verify_accounts")
VERIFY_CHANGES = _statement("verify_changes")

_JOURNAL_KEY = re.compile(
    r"balance_changes\w*_pkey(_\d+)?"
)  # a partition's has its name; Citus appends the shard's number


class State(Enum):
    """What a failed statement leaves behind."""

    CONTENDED = auto()
    """Rolled back, because of another transaction."""
    CANNOT_WRITE = auto()
    """Rolled back, because this server can't write now - read-only, or full: connect anew."""
    KEY_TAKEN = auto()
    """Rolled back: another transaction has just bound a key of this batch."""
    REJECTED = auto()
    """Rolled back, for what is in it."""
    UNKNOWN = auto()
    """It may have been committed, or may be yet; the connection is not to be used again."""


_ROLLED_BACK = {
    "55P03": State.CONTENDED,  # lock_not_available
    "40P01": State.CONTENDED,  # deadlock_detected
    "40001": State.CONTENDED,  # serialization_failure
    "57014": State.CONTENDED,  # query_canceled
    "25006": State.CANNOT_WRITE,  # read_only_sql_transaction
    "53": State.CANNOT_WRITE,  # insufficient_resources
}
_UNKNOWN = ("08", "57P01", "57P02", "40003")


def state_after(error: BaseException, citus: bool = False) -> State:
    """What `error`, raised by a statement, says of it. What is not surely rolled back is unknown.

    `citus`: the statement may have gone to other servers, and their failures come as internal errors.
    Decided on SQLSTATE (https://www.postgresql.org/docs/current/errcodes-appendix.html) and on the severity, because
    after a FATAL nobody told us whether the transaction had ended.
    """
    if not isinstance(error, asyncpg.PostgresError) or (error.severity_en or error.severity) != "ERROR":
        return State.UNKNOWN
    code = error.sqlstate or ""
    if not code or code.startswith(_UNKNOWN):
        return State.UNKNOWN
    if code == "23505" and _JOURNAL_KEY.fullmatch(error.constraint_name or ""):
        return State.KEY_TAKEN
    if citus and code == "XX000":
        return State.KEY_TAKEN if _JOURNAL_KEY.search(error.message or "") else State.UNKNOWN
    return _ROLLED_BACK.get(code) or _ROLLED_BACK.get(code[:2], State.REJECTED)


class StatementError(Exception):
    """A statement of a session failed, and left `state` behind."""

    def __init__(self, state: State) -> None:
        super().__init__(state.name)
        self.state = state


class Recorded(NamedTuple):
    """What the journal holds for a change: `refusal` None if it was applied."""

    balance: int
    amount: int
    reference: str | None
    refusal: Refusal | None


class Judged(NamedTuple):
    """What became of an account's changes that were not recorded yet: all of them applied, or none.

    `balance` is the one before them, or that of the statement's snapshot.
    """

    applied: bool
    balance: int
    minimum_balance: int


class Answers(NamedTuple):
    """The answer to a batch: by index of the change, and by user id. An account that is missing does not exist."""

    recorded: Mapping[int, Recorded]
    judged: Mapping[int, Judged]


class Refusing(NamedTuple):
    """A refusal to be bound to its key: the change, under its key, and the balance that could not cover it."""

    change: Change
    key: str
    balance: int
    refusal: Refusal


class Session:
    """A connection of one owner's, which applies batches. Every method raises StatementError."""

    def __init__(self, connection: asyncpg.Connection, settings: Settings) -> None:
        self._connection = connection
        self._statement_seconds = settings.statement_seconds
        self._citus = settings.citus

    @property
    def closed(self) -> bool:
        """Whether the connection is known to be gone."""
        return bool(self._connection.is_closed())

    async def apply(
        self, changes: Sequence[Change], keys: Sequence[str], repeatable: Sequence[bool], lock_seconds: float
    ) -> Answers:
        """Apply up to 1,000 changes, an account's in arrival order, under `keys`: of each account all or none.

        `repeatable`: which of them the journal may already hold. `lock_seconds`: the longest that it waits for a row.
        """
        user_ids = [change.user_id for change in changes]
        one_account = self._citus and len(set(user_ids)) == 1
        rows = await self._fetch(
            APPLY_ACCOUNT if one_account else APPLY_CHANGES,
            user_ids[0] if one_account else user_ids,
            keys,
            [change.amount for change in changes],
            [change.reference for change in changes],
            repeatable,
            _milliseconds(lock_seconds),
        )
        recorded = {}
        judged = {}
        for position, user_id, applied, balance, minimum_balance, amount, reference, refusal in rows:
            if position is None:
                judged[user_id] = Judged(applied, balance, minimum_balance)
            else:
                recorded[position - 1] = Recorded(balance, amount, reference, Refusal(refusal) if refusal else None)
        return Answers(recorded, judged)

    async def record_refusals(self, refusals: Sequence[Refusing], lock_seconds: float) -> set[tuple[int, str]]:
        """Bind refusals to their keys; gives the (user id, key) of those that were not taken meanwhile."""
        rows = await self._fetch(
            RECORD_REFUSALS,
            [refused.change.user_id for refused in refusals],
            [refused.key for refused in refusals],
            [refused.change.amount for refused in refusals],
            [refused.change.reference for refused in refusals],
            [refused.balance for refused in refusals],
            [refused.refusal for refused in refusals],
            _milliseconds(lock_seconds),
        )
        return {(user_id, key) for user_id, key in rows}

    async def held_accounts(self, user_ids: Sequence[int]) -> set[int]:
        """Those accounts whose row is held by a transaction that has not ended, as far as the row tells."""
        return {user_id for (user_id,) in await self._fetch(HELD_ACCOUNTS, user_ids)}

    async def close(self) -> None:
        """End the connection, in an orderly way if the server answers."""
        try:
            await self._connection.close(timeout=self._statement_seconds)
        except FAULTS:
            self._connection.terminate()

    def terminate(self) -> None:
        """Drop the connection at once."""
        self._connection.terminate()

    async def _fetch(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        try:
            rows: list[asyncpg.Record] = await self._connection.fetch(
                statement, *arguments, timeout=self._statement_seconds
            )
        except Exception as error:
            raise StatementError(state_after(error, self._citus)) from error
        return rows


def _milliseconds(seconds: float) -> str:
    """A time as lock_timeout takes it; 0 would be no limit at all."""
    return f"{max(1, round(1000 * seconds))}ms"


class Account(NamedTuple):
    """An account as it is now."""

    balance: int
    minimum_balance: int
    version: int


class Opening(NamedTuple):
    """What came of opening an account: as it is, as it was opened, and whether this call opened it."""

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


class Store:
    """Everything but changes, over a pool of connections. Every method raises UnreachableError.

    All of it can be repeated without harm, so a lost answer is the same to the caller as none.
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
                return Opening(Account(*account), *opening)

    async def account(self, user_id: int) -> Account | None:
        """An account; None if there is no such user."""
        rows = await self._fetch(READ_ACCOUNT, user_id)
        return Account(*rows[0]) if rows else None

    async def set_minimum_balance(self, user_id: int, minimum_balance: int) -> tuple[Account, bool] | None:
        """The account, and whether its minimum could be set; None if there is no such user."""
        rows = await self._fetch(SET_MINIMUM_BALANCE, user_id, minimum_balance)
        return (Account(*rows[0][:3]), rows[0]["changed"]) if rows else None

    async def changes(self, user_id: int, before: int | None, count_max: int) -> list[JournalRow]:
        """The newest `count_max` applied changes with a version below `before`, newest first."""
        return [_journal_row(row) for row in await self._fetch(READ_CHANGES, user_id, before, count_max)]

    async def change(self, user_id: int, idempotency_key: str) -> JournalRow | None:
        """What is bound to a key; None if nothing is."""
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
                    if state_after(error, self._settings.citus) in (State.UNKNOWN, State.CANNOT_WRITE):
                        connection.terminate()
                    raise
                return rows
        except UnreachableError:
            raise
        except Exception as error:
            if state_after(error, self._settings.citus) is State.REJECTED:
                raise
            raise UnreachableError from error


def _journal_row(row: asyncpg.Record) -> JournalRow:
    version, amount, balance, key, reference, created_at, refusal = row
    return JournalRow(version, amount, balance, key, reference, created_at, Refusal(refusal) if refusal else None)


async def connect(settings: Settings) -> Session:
    """A session of its own. Raises UnreachableError."""
    return Session(await open_connection(settings), settings)
