"""A connection that applies batches: the SQL on the way of a change."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import asyncpg

from atomic_balance.changes import Change, Refusal
from atomic_balance.postgres.connections import FAULTS, open_connection
from atomic_balance.postgres.failures import StatementError, failure_of
from atomic_balance.postgres.statements import APPLY_ACCOUNT, APPLY_CHANGES, BLOCKED_ACCOUNTS, RECORD_REFUSALS
from atomic_balance.settings import Settings


class Recorded(NamedTuple):
    """What the journal holds for a change: the change itself, the balance after it; `refusal` None if it was applied.

    A newer version may know other refusals. `expires_at`: of a hold.
    """

    change: Change
    balance: int
    refusal: str | None
    expires_at: datetime | None


class AccountResult(NamedTuple):
    """What became of an account's changes that were not recorded yet: all of them applied, or none.

    `balance` and `held` are those before them, or as they are now. `decided_at`: when they were applied, by the
    database's clock; None if they were not, or if the batch had no hold.
    """

    applied: bool
    balance: int
    held: int
    minimum_balance: int
    decided_at: datetime | None

    def expiry_of(self, change: Change) -> datetime | None:
        """Until when `change`, which was applied, holds; None if it is no hold."""
        if self.decided_at is None or not change.lasting_seconds:
            return None
        return self.decided_at + timedelta(seconds=change.lasting_seconds)


class Answers(NamedTuple):
    """The answer to a batch: by index of the change, and by user id.

    `accounts` lacks one that does not exist, or whose changes are all in `recorded`.
    """

    recorded: Mapping[int, Recorded]
    accounts: Mapping[int, AccountResult]


class RefusalRecord(NamedTuple):
    """A refusal to be bound to its key: the change, under its key, and the balance that could not cover it."""

    change: Change
    key: str
    balance: int
    refusal: Refusal


class Session:
    """A connection of one owner's, which applies batches. The methods that send a statement raise StatementError."""

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
        of_each = (
            keys,
            [change.amount for change in changes],
            *_of_holds(changes),
            _unless_all(None, [change.reference for change in changes]),
            _unless_all(False, repeatable),
        )
        if self._citus and len(set(user_ids)) == 1:
            rows = await self._fetch(APPLY_ACCOUNT, user_ids[0], *of_each, _milliseconds(lock_seconds))
        else:
            rows = await self._fetch(APPLY_CHANGES, user_ids[0], user_ids, *of_each, _milliseconds(lock_seconds))
        recorded = {}
        accounts = {}
        for row in rows:
            position, user_id = row[0], row[1]
            if position is None:
                accounts[user_id] = AccountResult(row[2], row[3], row[4], row[5], row[6])
            else:
                recorded[position - 1] = _recorded(user_id, row[3], *row[7:])
        return Answers(recorded, accounts)

    async def record_refusals(self, refusals: Sequence[RefusalRecord], lock_seconds: float) -> set[tuple[int, str]]:
        """Bind refusals to their keys; gives the (user id, key) of those that were not taken meanwhile."""
        rows = await self._fetch(
            RECORD_REFUSALS,
            [refused.change.user_id for refused in refusals],
            [refused.key for refused in refusals],
            [refused.change.amount for refused in refusals],
            [refused.change.hold_amount or None for refused in refusals],
            [refused.change.reference for refused in refusals],
            [refused.balance for refused in refusals],
            [refused.refusal for refused in refusals],
            _milliseconds(lock_seconds),
        )
        return {(user_id, key) for user_id, key in rows}

    async def blocked_accounts(self, user_ids: Sequence[int]) -> set[int]:
        """Those accounts whose row is held by a transaction that has not ended, as far as the row tells."""
        return {user_id for (user_id,) in await self._fetch(BLOCKED_ACCOUNTS, user_ids)}

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
            raise StatementError(failure_of(error, self._citus)) from error
        return rows


def _of_holds(changes: Sequence[Change]) -> tuple[object, object, object]:
    """The hold_amounts, hold_ids and seconds of a batch; nulls where it has nothing to do with holds."""
    if not any(change.hold_amount for change in changes):
        return None, None, None
    return (
        [change.hold_amount or None for change in changes],
        [change.hold_id for change in changes],
        [change.lasting_seconds for change in changes],
    )


def _unless_all(usual: object, values: Sequence[object]) -> Sequence[object] | None:
    """`values`, or null if each is the `usual` one: an array that says nothing need not be sent, nor read."""
    return None if values.count(usual) == len(values) else values


def _recorded(
    user_id: int,
    balance: int,
    amount: int,
    hold_amount: int | None,
    expires_at: datetime | None,
    reference: str | None,
    refusal: str | None,
) -> Recorded:
    is_expiry = expires_at is not None and (hold_amount or 0) < 0
    change = Change(user_id, amount, None, reference, hold_amount or 0, lasting_seconds=0 if is_expiry else None)
    return Recorded(change, balance, refusal, None if is_expiry else expires_at)


def _milliseconds(seconds: float) -> str:
    """A time as lock_timeout takes it; 0 would be no limit at all."""
    return f"{max(1, round(1000 * seconds))}ms"


async def connect(settings: Settings) -> Session:
    """A session of its own. Raises UnreachableError."""
    return Session(await open_connection(settings), settings)
