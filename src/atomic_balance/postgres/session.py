"""A connection that applies batches: the SQL on the way of a change."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import asyncpg

from atomic_balance.changes import Change, Credit, Refusal, credit_key
from atomic_balance.postgres.connections import FAULTS, open_connection
from atomic_balance.postgres.failures import StatementError, UnreachableError, failure_of, is_reported
from atomic_balance.postgres.shards import Shards
from atomic_balance.postgres.statements import (
    APPLY_CHANGES,
    APPLY_SHARD_CHANGES,
    APPLY_TRANSFERS,
    APPLY_TRANSFERS_BETWEEN_SHARDS,
    BLOCKED_ACCOUNTS,
    KEEP_FEED_ASCENDING,
    READ_SHARDS,
    RECORD_REFUSALS,
    in_schema,
)
from atomic_balance.settings import Settings


class Recorded(NamedTuple):
    """What the journal holds for a change: the change itself, the balance after it; `refusal` None if it was applied.

    A newer version may know other refusals. `payee_balances`: of a transfer that was applied.
    """

    change: Change
    balance: int
    refusal: str | None
    payee_balances: Mapping[int, int] | None = None


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


class Unpaid(NamedTuple):
    """A payee that kept a transfer from being applied: it does not exist, or had no room for all that the batch brings.

    `balance`: of the payee, as it is; None if there is none.
    """

    user_id: int
    balance: int | None


class Answers(NamedTuple):
    """The answer to a batch: by index of the change, and by user id.

    `accounts` lacks one that does not exist, or whose changes are all in `recorded` or name a payee that does not
    exist. `credited`: of a transfer that was applied, the balances of its payees right after it. `unpaid`: the payees
    for whose sake nothing of a transfer's account was applied; or nothing of the transfer, where one does not exist.
    """

    recorded: Mapping[int, Recorded]
    accounts: Mapping[int, AccountResult]
    credited: Mapping[int, Mapping[int, int]] = {}
    unpaid: Mapping[int, Sequence[Unpaid]] = {}


class RefusalRecord(NamedTuple):
    """A refusal to be bound to its key: the change, under its key, and the balance that could not cover it."""

    change: Change
    key: str
    balance: int
    refusal: Refusal


class Session:
    """A connection of one owner's, which applies batches. The methods that send a statement raise StatementError.

    With Citus a batch goes to functions that do the same on its shards. `shards`: how accounts were spread when the
    connection was opened.
    """

    def __init__(self, connection: asyncpg.Connection, settings: Settings, shards: Shards) -> None:
        self.shards = shards
        self._connection = connection
        self._changes_statement, self._transfers_statement = (
            (APPLY_SHARD_CHANGES, APPLY_TRANSFERS_BETWEEN_SHARDS)
            if settings.citus
            else (APPLY_CHANGES, APPLY_TRANSFERS)
        )
        self._statement_seconds = settings.statement_seconds
        self._citus = settings.citus
        self._schema = settings.database_schema

    @property
    def closed(self) -> bool:
        """Whether the connection is known to be gone."""
        return bool(self._connection.is_closed())

    async def apply(
        self, changes: Sequence[Change], keys: Sequence[str], repeatable: Sequence[bool], lock_seconds: float
    ) -> Answers:
        """Apply changes, an account's in arrival order, under `keys`: of each account all or none.

        There may be up to 1,000, each payee of a transfer counted as one more; no account pays, or is changed
        otherwise, and is credited by others. Without a transfer all accounts lie on one shard. `repeatable`: which of
        them the journal may already hold. `lock_seconds`: the longest that it waits for a row.
        """
        if any(change.payees for change in changes):
            return await self._apply_transfers(changes, keys, repeatable, lock_seconds)
        user_ids = [change.user_id for change in changes]
        rows = await self._fetch(
            self._changes_statement,
            user_ids[0],
            user_ids,
            keys,
            [change.amount for change in changes],
            *_of_holds(changes),
            _unless_all(None, [change.reference for change in changes]),
            _unless_all(False, repeatable),
            _milliseconds(lock_seconds),
        )
        recorded = {}
        accounts = {}
        for row in rows:
            position, user_id = row[0], row[1]
            if position is None:
                accounts[user_id] = AccountResult(row[2], row[3], row[4], row[5], row[6])
            else:
                recorded[position - 1] = _recorded(user_id, row[3], *row[7:])
        return Answers(recorded, accounts)

    async def _apply_transfers(
        self, changes: Sequence[Change], keys: Sequence[str], repeatable: Sequence[bool], lock_seconds: float
    ) -> Answers:
        legs = [
            leg
            for number, (change, key, may_be_held) in enumerate(zip(changes, keys, repeatable, strict=True), 1)
            for leg in _legs(number, change, key, may_be_held)
        ]
        sets, owners, accounts_moved, leg_keys, amounts, *of_holds, references, payees, repeatables = zip(
            *legs, strict=True
        )
        holding = any(change.hold_amount for change in changes)
        rows = await self._fetch(
            self._transfers_statement,
            sets,
            owners,
            accounts_moved,
            leg_keys,
            amounts,
            *(of_holds if holding else (None, None, None)),
            _unless_all(None, references),
            payees,
            _unless_all(False, repeatables),
            _milliseconds(lock_seconds),
        )
        recorded: dict[int, Recorded] = {}
        accounts: dict[int, AccountResult] = {}
        credited: dict[int, dict[int, int]] = {}
        unpaid: dict[int, list[Unpaid]] = {}
        for number, user_id, verdict, balance, held, minimum_balance, decided_at, *of_change in rows:
            match verdict:
                case "applied" | "not applied":
                    accounts[user_id] = AccountResult(verdict == "applied", balance, held, minimum_balance, decided_at)
                case "credited":
                    credited.setdefault(number - 1, {})[user_id] = balance
                case "replayed":
                    recorded[number - 1] = _recorded(user_id, balance, *of_change)
                case _:
                    unpaid.setdefault(number - 1, []).append(Unpaid(user_id, balance))
        for index, found in recorded.items():
            if found.change.payees:
                recorded[index] = found._replace(payee_balances=credited.get(index))
        return Answers(recorded, accounts, credited, unpaid)

    async def record_refusals(self, refusals: Sequence[RefusalRecord], lock_seconds: float) -> set[tuple[int, str]]:
        """Bind refusals to their keys; gives the (user id, key) of those that were not taken meanwhile."""
        rows = await self._fetch(
            RECORD_REFUSALS,
            [refused.change.user_id for refused in refusals],
            [refused.key for refused in refusals],
            [refused.change.amount for refused in refusals],
            [refused.change.hold_amount or None for refused in refusals],
            [refused.change.reference for refused in refusals],
            [_as_text(refused.change.payees) for refused in refusals],
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
                in_schema(statement, self._schema), *arguments, timeout=self._statement_seconds
            )
        except Exception as error:
            raise StatementError(failure_of(error, self._citus), is_reported(error)) from error
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


def _legs(number: int, change: Change, key: str, repeatable: bool) -> list[tuple[object, ...]]:
    """What a change moves, an element for each account, as apply_transfers takes it; `number`: of its set."""
    owner, reference = change.user_id, change.reference
    own = (
        change.hold_amount or None,
        change.hold_id,
        change.lasting_seconds,
        reference,
        _as_text(change.payees),
        repeatable,
    )
    return [
        (number, owner, owner, key, change.amount, *own),
        *(
            (number, owner, payee, credit_key(owner, key), amount, None, None, None, reference, None, False)
            for payee, amount in change.payees
        ),
    ]


def credits_from(payees: Sequence[int] | None) -> tuple[Credit, ...]:
    """The credits of a transfer, from what the journal has of its payees."""
    return tuple(map(Credit, payees[::2], payees[1::2])) if payees else ()


def _as_text(payees: Sequence[Credit]) -> str | None:
    """What the journal has of the payees of a transfer, as PostgreSQL writes an array; None if there are none."""
    return f"{{{','.join(f'{user_id},{amount}' for user_id, amount in payees)}}}" if payees else None


def _unless_all(usual: object, values: Sequence[object]) -> Sequence[object] | None:
    """`values`, or null if each is the `usual` one: an array that says nothing need not be sent, nor read."""
    return None if values.count(usual) == len(values) else values


def _recorded(
    user_id: int,
    balance: int,
    amount: int,
    hold_amount: int | None,
    expires_at: datetime | None,
    payees: Sequence[int] | None,
    reference: str | None,
    refusal: str | None,
) -> Recorded:
    is_expiry = expires_at is not None and (hold_amount or 0) < 0
    lasting_seconds = 0 if is_expiry else None
    change = Change(user_id, amount, None, reference, hold_amount or 0, None, lasting_seconds, credits_from(payees))
    return Recorded(change, balance, refusal)


def _milliseconds(seconds: float) -> str:
    """A time as lock_timeout takes it; 0 would be no limit at all."""
    return f"{max(1, round(1000 * seconds))}ms"


async def connect(settings: Settings) -> Session:
    """A session of its own, whose changes come in the feed after all earlier ones. Raises UnreachableError.

    It also does so where the server is a standby: what a session wrote that outlasts the promotion would have positions
    from before it.
    """
    connection = await open_connection(settings)
    try:
        if settings.citus:  # which has no feed
            return Session(connection, settings, await _shards(connection, settings))
        keep = in_schema(KEEP_FEED_ASCENDING, settings.database_schema)
        if await connection.fetchval(keep, timeout=settings.statement_seconds):
            raise asyncpg.ReadOnlySQLTransactionError("the server is a standby")
        return Session(connection, settings, Shards())
    except BaseException as error:
        connection.terminate()
        if isinstance(error, Exception):
            raise UnreachableError from error
        raise


async def _shards(connection: asyncpg.Connection, settings: Settings) -> Shards:
    rows = await connection.fetch(in_schema(READ_SHARDS, settings.database_schema), timeout=settings.statement_seconds)
    return Shards(tuple(least for (least,) in rows[1:]))
