"""What the database has at the end: the journal, the accounts, and what should not be there any more."""

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

import psycopg

from atomic_balance.changes import settlement_key

SETTLEMENT = settlement_key("")
"""What the key of a hold's settlement begins with, before the hold's id."""


class Row(NamedTuple):
    """A row of the journal; `version` None if the change was refused."""

    user_id: int
    version: int | None
    amount: int
    balance: int
    key: str
    reference: str | None
    hold_amount: int | None
    expires_at: datetime | None
    payees: list[int] | None
    payer: int | None
    created_at: datetime
    feed_position: int


class Account(NamedTuple):
    """What an account was opened with, and when."""

    opening_balance: int
    minimum_balance: int
    opened_at: datetime


class Journal(NamedTuple):
    """All rows, all accounts by user id, and how many holds have expired and are still open."""

    rows: list[Row]
    accounts: dict[int, Account]
    overdue: int

    def by_account(self) -> dict[int, list[Row]]:
        """The applied changes of each account, by version."""
        found: dict[int, list[Row]] = defaultdict(list)
        for row in sorted((row for row in self.rows if row.version is not None), key=lambda row: row.version or 0):
            found[row.user_id].append(row)
        return found


def read_journal(url: str) -> Journal:
    """Read all of it in one snapshot."""
    with psycopg.connect(url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        rows: Iterable[tuple[object, ...]] = connection.execute(
            "SELECT user_id, version, amount, balance, idempotency_key, reference, hold_amount, expires_at, payees,"
            "       payer, created_at, feed_position FROM balance_changes"
        )
        found = [Row._make(row) for row in rows]
        accounts = {
            user_id: Account(*values)
            for user_id, *values in connection.execute(
                "SELECT id, opening_balance, opening_minimum_balance, opened_at FROM users"
            )
        }
        ((overdue,),) = connection.execute("SELECT count(*) FROM open_holds WHERE expires_at < clock_timestamp()")
    return Journal(found, accounts, overdue)
