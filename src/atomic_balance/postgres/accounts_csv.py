"""Accounts as CSV: opened from a file, all or none, and written to one."""

import csv
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

import msgspec
import psycopg

from atomic_balance.changes import Balance, MinimumBalance, UserId
from atomic_balance.expectations import explain
from atomic_balance.postgres.statements import (
    COUNT_OPEN_HOLDS,
    EXPORT_ACCOUNTS,
    IMPORT_ACCOUNTS,
    IMPORT_DIFFERENCES,
    IMPORT_TABLE,
    in_schema,
)

WRONG_LINES_MAX = 10
COLUMNS = ("userId", "balance", "minimumBalance")
_LINES_AT_ONCE = 10_000


class OpenedAccount(msgspec.Struct, rename="camel", frozen=True, gc=False):
    """What a line says: an account, and what it is opened with."""

    user_id: UserId
    balance: Balance
    minimum_balance: MinimumBalance = 0

    def __post_init__(self) -> None:
        if self.balance < self.minimum_balance:
            raise ValueError("balance")


class Import(NamedTuple):
    """How many accounts were opened, and how many lines found theirs open; or what is wrong, a line each.

    If anything is wrong nothing was opened. There may be more wrong than `WRONG_LINES_MAX` lines.
    """

    opened: int
    open_already: int
    wrong: list[str]


def import_accounts(
    database_url: str, lines: Iterable[str], progress: Callable[[int], None], schema: str | None = None
) -> Import:
    """Open the accounts of a CSV file in one transaction. `lines`: with their ends; the first one names the columns.

    An account that is open already is fine if it was opened with the same values. `progress` is told how many lines
    have been read. Raises psycopg.Error.
    """
    with psycopg.connect(database_url, prepare_threshold=None) as connection:
        wrong: list[str] = []
        accounts = _accounts(lines, wrong)
        connection.execute(IMPORT_TABLE.encode())
        count = 0
        with connection.cursor() as cursor, cursor.copy(b"COPY imported_accounts FROM STDIN") as copy:
            while some := list(islice(accounts, _LINES_AT_ONCE)):
                if not wrong:
                    copy.write("".join(some))
                count += len(some)
                progress(count)
        opened = 0
        if not wrong:
            opened = connection.execute(in_schema(IMPORT_ACCOUNTS, schema).encode()).rowcount
            if opened < count:
                wrong = _differences(connection, schema)
        if wrong:
            connection.rollback()
            return Import(0, 0, wrong)
        connection.commit()
        connection.execute(in_schema("ANALYZE {schema}users", schema).encode())
    return Import(opened, count - opened, [])


def _accounts(lines: Iterable[str], wrong: list[str]) -> Iterator[str]:
    """The lines that are right, with their numbers, as COPY takes them; puts what is wrong with others in `wrong`."""
    rows = csv.reader(lines, strict=True)
    try:
        names = next(rows, [])
        if tuple(names) not in (COLUMNS[:2], COLUMNS):
            wrong.append(f"line 1: expected {','.join(COLUMNS[:2])} or {','.join(COLUMNS)}")
            return
        for row in rows:
            try:
                account = msgspec.convert(dict(zip(names, row, strict=True)), OpenedAccount, strict=False)
            except msgspec.ValidationError as error:
                wrong.append(f"line {rows.line_num}: {explain(error, OpenedAccount)}")
            except ValueError:
                wrong.append(f"line {rows.line_num}: expected {len(names)} values")
            else:
                numbers = (account.user_id, account.balance, account.minimum_balance)
                if ",".join(map(str, numbers[: len(row)])) != ",".join(row):
                    wrong.append(f"line {rows.line_num}: expected numbers of plain digits")
                    continue
                yield f"{rows.line_num}\t{account.user_id}\t{account.balance}\t{account.minimum_balance}\n"
            if len(wrong) == WRONG_LINES_MAX:
                return
    except csv.Error as error:
        wrong.append(f"line {rows.line_num}: {error}")
    except UnicodeDecodeError:
        wrong.append(f"after line {rows.line_num}: expected text in UTF-8")


def _differences(connection: psycopg.Connection, schema: str | None) -> list[str]:
    rows = psycopg.RawCursor(connection).execute(in_schema(IMPORT_DIFFERENCES, schema).encode(), [WRONG_LINES_MAX])
    return [f"line {line}: user {user_id} was opened with other values" for line, user_id in rows]


def export_accounts(database_url: str, file: BinaryIO, schema: str | None = None) -> tuple[int, int]:
    """Write all accounts, as they are at one moment, to `file`; gives how many holds are open, and what they hold.

    What is held is in the balances; the holds themselves are not in the file. Raises psycopg.Error.
    """
    with psycopg.connect(database_url, prepare_threshold=None) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        with connection.cursor() as cursor, cursor.copy(in_schema(EXPORT_ACCOUNTS, schema).encode()) as copy:
            file.writelines(copy)
        ((count, held),) = connection.execute(in_schema(COUNT_OPEN_HOLDS, schema).encode())
    return count, int(held)
