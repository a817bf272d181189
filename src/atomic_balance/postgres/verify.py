"""The audit: recomputes every account from the journal, in one streaming pass over one snapshot."""

import heapq
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import psycopg

from atomic_balance.changes import BALANCE_LIMIT, Refusal
from atomic_balance.postgres.statements import VERIFY_ACCOUNTS, VERIFY_CHANGES

DIFFERENCES_MAX = 10
_ROWS_PER_FETCH = 10_000

AccountRow = tuple[int, int, int, int]
"""user id, opening balance, balance, version"""
ChangeRow = tuple[int, int | None, int, int, str | None]
"""user id, version, amount, balance after it, None; if refused None for a version, the balance before it, refusal"""


class Summary(NamedTuple):
    """What an audit saw: how many accounts and applied changes, and the first differences, a line each."""

    accounts: int
    changes: int
    differences: list[str]


def verify(database_url: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Summary:
    """Audit the database; ends early when it has found `DIFFERENCES_MAX` differences.

    It reads in one snapshot, so the database may be in use. `progress` is told, from time to time, how many changes
    have been read and how many there are. Raises psycopg.Error.
    """
    with psycopg.connect(database_url, prepare_threshold=None) as connection:  # poolers lose what is prepared
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        total = _total(connection)
        with connection.cursor("accounts") as accounts, connection.cursor("changes") as changes:
            accounts.itersize = changes.itersize = _ROWS_PER_FETCH
            accounts.execute(VERIFY_ACCOUNTS.encode())
            changes.execute(VERIFY_CHANGES.encode())
            return _audit(accounts, _counted(changes, lambda done: progress(done, total)))


def _total(connection: psycopg.Connection) -> int:
    row = connection.execute("SELECT coalesce(sum(version), 0)::bigint FROM users").fetchone()
    return int(row[0]) if row else 0


def _counted(changes: Iterable[ChangeRow], progress: Callable[[int], None]) -> Iterator[ChangeRow]:
    done = 0
    for change in changes:
        yield change
        done += change[1] is not None
        if done % _ROWS_PER_FETCH == 0:
            progress(done)
    progress(done)


def _audit(accounts: Iterable[AccountRow], changes: Iterable[ChangeRow]) -> Summary:
    """Merge the two streams, both in order of user id: of each user the account, then its changes."""
    account_count = change_count = 0
    differences: list[str] = []
    merged: Iterable[tuple[int, int, Any]]  # a row of either stream
    merged = heapq.merge(((row[0], 0, row) for row in accounts), ((row[0], 1, row) for row in changes))
    for user_id, rows in groupby(merged, itemgetter(0)):
        _, is_change, account = next(rows)
        if is_change:
            difference: str | None = "has changes in the journal, but no account"
        else:
            account_count += 1
            count, difference = _recompute(account, (row for _, _, row in rows))
            change_count += count
        if difference:
            differences.append(f"user {user_id}: {difference}")
            if len(differences) == DIFFERENCES_MAX:
                break
    return Summary(account_count, change_count, differences)


def _recompute(account: AccountRow, changes: Iterator[ChangeRow]) -> tuple[int, str | None]:
    """How many applied changes of an account were read, and the first difference; None if there is none."""
    _, balance, balance_now, version_now = account
    version = 0
    for _, found_version, amount, found_balance, refusal in changes:
        if found_version is None:
            if not _can_be(refusal, amount, found_balance):
                return (
                    version,
                    f"a change by {amount} at a balance of {found_balance} can't have been refused for {refusal}",
                )
            continue
        version += 1
        balance += amount
        if found_version != version:
            return version, f"after version {version - 1} the journal goes on with version {found_version}"
        if found_balance != balance:
            return version, f"version {version}: the balance after it is {balance}, the journal says {found_balance}"
    if version != version_now:
        return version, f"the journal ends with version {version}, the account is at {version_now}"
    if balance != balance_now:
        return version, f"the balance by the journal is {balance}, the account says {balance_now}"
    return version, None


def _can_be(refusal: str | None, amount: int, balance: int) -> bool:
    """Whether a change by `amount` at `balance` can have been refused for `refusal`.

    The minimum balance at that time is not known, but it was not above the balance.
    """
    if refusal == Refusal.BALANCE_LIMIT_EXCEEDED:
        return balance + amount > BALANCE_LIMIT
    return refusal == Refusal.INSUFFICIENT_FUNDS and amount < 0


def progress_bar(done: int, total: int) -> None:
    """Draw how far the audit is, where standard error is a terminal."""
    if sys.stderr.isatty():
        share = done / total if total else 1
        bar = "#" * int(40 * share)
        end = "\n" if done == total else ""
        print(f"\rverify [{bar:40}] {done:,} of {total:,} changes", end=end, file=sys.stderr, flush=True)
