"""The audit, on one snapshot: recomputes every account from the journal, in one streaming pass.

What lies across accounts - the legs of transfers, and all money - the server compares, on disk if it is too much.
"""

import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import psycopg

from atomic_balance.changes import BALANCE_LIMIT, Refusal, settlement_key
from atomic_balance.postgres.statements import (
    VERIFY_ACCOUNTS,
    VERIFY_CHANGES,
    VERIFY_MONEY,
    VERIFY_OPEN_HOLDS,
    VERIFY_TRANSFERS,
    in_schema,
)

DIFFERENCES_MAX = 10
_ROWS_PER_FETCH = 10_000


class AccountRow(NamedTuple):
    """A row of `users`."""

    user_id: int
    opening_balance: int
    balance: int
    held: int
    version: int


class ChangeRow(NamedTuple):
    """A row of the journal. A refused one has no version; its balance is the one that could not cover it.

    `payees`: of a transfer, each payee's id and amount, by id.
    """

    user_id: int
    version: int | None
    amount: int
    balance: int
    refusal: str | None
    hold_amount: int | None
    key: str
    expires_at: float | None
    payees: list[int | None] | None


class OpenHoldRow(NamedTuple):
    """A row of the list of open holds."""

    user_id: int
    hold_id: str
    amount: int
    expires_at: float


class _Hold(NamedTuple):
    amount: int
    expires_at: float


class Money(NamedTuple):
    """What all accounts have together, what they were opened with, and what was added by changes but transfers.

    Transfers and captures that pay somebody move money between accounts: they are not in `added`.
    """

    balances: int
    openings: int
    added: int

    @property
    def made(self) -> int:
        """How much there is that came from nowhere; below 0: how much is lost."""
        return self.balances - self.openings - self.added


class Summary(NamedTuple):
    """What an audit saw: how many accounts and applied changes, all money, and the first differences, a line each."""

    accounts: int
    changes: int
    money: Money
    differences: list[str]


def verify(
    database_url: str, progress: Callable[[int, int], None] = lambda done, total: None, schema: str | None = None
) -> Summary:
    """Audit the database, or `schema` in it; ends early when it has found `DIFFERENCES_MAX` differences.

    It reads in one snapshot, so the database may be in use. `progress` is told, from time to time, how many changes
    have been read and how many there are. Raises psycopg.Error.
    """
    with psycopg.connect(database_url, prepare_threshold=None) as connection:  # poolers lose what is prepared
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        money, total = _money(connection, schema)
        with (
            _stream(connection, "accounts", in_schema(VERIFY_ACCOUNTS, schema)) as accounts,
            _stream(connection, "changes", in_schema(VERIFY_CHANGES, schema)) as changes,
            _stream(connection, "open_holds", in_schema(VERIFY_OPEN_HOLDS, schema)) as open_holds,
        ):
            account_count, change_count, differences = _audit(
                itertools.starmap(AccountRow, accounts),
                _counted(itertools.starmap(ChangeRow, changes), lambda done: progress(done, total)),
                itertools.starmap(OpenHoldRow, open_holds),
            )
        if len(differences) < DIFFERENCES_MAX:
            differences += _unpaired_legs(connection, schema, DIFFERENCES_MAX - len(differences))
        return Summary(account_count, change_count, money, differences)


@contextlib.contextmanager
def _stream(connection: psycopg.Connection, name: str, statement: str) -> Iterator[Iterable[tuple[Any, ...]]]:
    with connection.cursor(name) as cursor:
        cursor.itersize = _ROWS_PER_FETCH
        cursor.execute(statement.encode())
        yield cursor


def _money(connection: psycopg.Connection, schema: str | None) -> tuple[Money, int]:
    """All money, and how many changes were applied."""
    (row,) = connection.execute(in_schema(VERIFY_MONEY, schema).encode())
    *money, changes = map(int, row)
    return Money(*money), changes


def _unpaired_legs(connection: psycopg.Connection, schema: str | None, count_max: int) -> list[str]:
    """Credits that applied transfers owe and nobody has, and those that none of them owes."""
    rows = psycopg.RawCursor(connection).execute(in_schema(VERIFY_TRANSFERS, schema).encode(), [count_max])
    return [
        f"user {payer}: version {version}: it pays {amount} to user {payee}, and the journal has no such credit"
        if owed
        else f"user {payee}: {_place_of(version)}: a credit of {amount} by user {payer}, who has no such transfer"
        for owed, payer, payee, amount, version in rows
    ]


def _place_of(version: int | None) -> str:
    return "refused" if version is None else f"version {version}"


def _counted(changes: Iterable[ChangeRow], progress: Callable[[int], None]) -> Iterator[ChangeRow]:
    done = 0
    for change in changes:
        yield change
        done += change.version is not None
        if done % _ROWS_PER_FETCH == 0:
            progress(done)
    progress(done)


def _audit(
    accounts: Iterable[AccountRow], changes: Iterable[ChangeRow], open_holds: Iterable[OpenHoldRow]
) -> tuple[int, int, list[str]]:
    """How many accounts and applied changes there are, and the first differences.

    It merges the streams, all in order of user id: of each user the account, then its changes, then its open holds.
    """
    account_count = change_count = 0
    differences: list[str] = []
    streams: Iterable[Iterable[Any]] = (accounts, changes, open_holds)
    merged = heapq.merge(
        *((((row.user_id, place), row) for row in rows) for place, rows in enumerate(streams)), key=_place
    )
    for user_id, rows in groupby((row for _, row in merged), attrgetter("user_id")):
        audit, difference = _audit_user(rows)
        account_count += audit is not None
        change_count += audit.version if audit else 0
        if difference:
            differences.append(f"user {user_id}: {difference}")
            if len(differences) == DIFFERENCES_MAX:
                break
    return account_count, change_count, differences


_place = itemgetter(0)


def _audit_user(rows: Iterator[Any]) -> tuple["_Audit | None", str | None]:
    """The audit of one user, None if there is no account; and the first difference, None if there is none."""
    first = next(rows)
    if isinstance(first, ChangeRow):
        return None, "has changes in the journal, but no account"
    if isinstance(first, OpenHoldRow):
        return None, "has open holds, but no account"
    audit = _Audit(first)
    return audit, next(filter(None, map(audit.read, rows)), None) or audit.end()


class _Audit:
    """An account, recomputed from what is read of it."""

    def __init__(self, account: AccountRow) -> None:
        self.version = 0
        self._account = account
        self._balance = account.opening_balance
        self._held = 0
        self._open: dict[str, _Hold] = {}  # by the key that would settle it
        self._listed: dict[str, _Hold] = {}

    def read(self, row: ChangeRow | OpenHoldRow) -> str | None:
        """Go on with the next row; gives what is wrong with it."""
        if isinstance(row, OpenHoldRow):
            self._listed[settlement_key(row.hold_id)] = _Hold(row.amount, row.expires_at)
            return None
        if row.version is None:
            return _wrong_refusal(row)
        if row.version != self.version + 1:
            return f"after version {self.version} the journal goes on with version {row.version}"
        self.version += 1
        self._balance += row.amount
        self._held += row.hold_amount or 0
        if row.balance != self._balance:
            return f"version {row.version}: the balance after it is {self._balance}, the journal says {row.balance}"
        wrong = _wrong_payees(row) if row.payees is not None else None
        if wrong is None and row.hold_amount is not None:
            wrong = self._place(row) if row.hold_amount > 0 else self._settle(row)
        return f"version {row.version}: {wrong}" if wrong else None

    def _place(self, row: ChangeRow) -> str | None:
        if row.expires_at is None:
            return "a hold has no end"
        self._open[settlement_key(row.key)] = _Hold(row.hold_amount or 0, row.expires_at)
        return f"a hold moves the balance by {row.amount}" if row.amount else None

    def _settle(self, row: ChangeRow) -> str | None:
        hold = self._open.pop(row.key, None)
        if hold is None or hold.amount != -(row.hold_amount or 0):
            return f"it settles {-(row.hold_amount or 0)}, and there is no such open hold"
        if not -hold.amount <= row.amount <= 0:
            return "it captures more than was held"
        if row.expires_at is not None and row.amount:
            return "the expiry of a hold moves the balance"
        return None

    def end(self) -> str | None:
        """What is wrong with the account after its last row."""
        account = self._account
        if self.version != account.version:
            return f"the journal ends with version {self.version}, the account is at {account.version}"
        if self._balance != account.balance:
            return f"the balance by the journal is {self._balance}, the account says {account.balance}"
        if self._held != account.held:
            return f"what is held by the journal is {self._held}, the account says {account.held}"
        if self._open != self._listed:
            return (
                f"the journal has {len(self._open)} open holds, the list of them {len(self._listed)}, and they differ"
            )
        return None


def _wrong_refusal(row: ChangeRow) -> str | None:
    """Why a change can't have been refused so, whatever the minimum balance was; it is never above the balance."""
    if row.payees is not None and (wrong := _wrong_payees(row)):
        return f"a refused transfer: {wrong}"
    if row.refusal == Refusal.BALANCE_LIMIT_EXCEEDED:
        # A transfer's payee may have been full, and what that had is not recorded.
        can_be = row.payees is not None or row.balance + row.amount > BALANCE_LIMIT
    else:
        can_be = row.refusal == Refusal.INSUFFICIENT_FUNDS and row.amount < (row.hold_amount or 0)
    if can_be:
        return None
    return f"a change by {row.amount} at a balance of {row.balance} can't have been refused for {row.refusal}"


def _wrong_payees(row: ChangeRow) -> str | None:
    """What is wrong with whom a transfer pays, seen by itself."""
    known = [part for part in row.payees or () if part is not None]
    user_ids, amounts = known[::2], known[1::2]
    others_by_id = sorted({*user_ids} - {row.user_id})
    if known != row.payees or len(known) % 2 or user_ids != others_by_id or min(amounts, default=0) < 1:
        return "its payees are no list of other users, by id, with what each gets"
    if sum(amounts) != -row.amount:
        return f"it takes {-row.amount} and pays {sum(amounts)}"
    return None
