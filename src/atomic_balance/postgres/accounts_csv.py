"""Accounts as CSV: opened from a file, all or none, and written to one."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import psycopg
from msgspec import Struct, json

from atomic_balance.changes import Balance, MinimumBalance, UserId
from atomic_balance.postgres.statements import (
    COUNT_IMPORTED_ACCOUNTS,
    COUNT_OPEN_HOLDS,
    EXPORT_ACCOUNTS,
    IMPORT_ACCOUNTS,
    IMPORT_DIFFERENCES,
    IMPORT_LINES,
    IMPORT_TABLE,
    in_schema,
)

log = logging.getLogger("atomic_balance")

WRONG_LINES_MAX = 10
_SHAPES: dict[str, Any] = {"userId": UserId, "balance": Balance, "minimumBalance": MinimumBalance}
_HEADERS = ("userId,balance", "userId,balance,minimumBalance")
_LINES_AT_ONCE = 1_000
_QUOTED = re.compile(rb'(?<![^,])"(-?\d+)"(?![^,\r\n])')
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _OpenedAccount(Struct, frozen=True, gc=False, array_like=True, forbid_unknown_fields=True):
    """What a line says. Between brackets it is JSON: so a number is here what it is in a request, and 1.00 is none."""

    user_id: UserId
    balance: Balance
    minimum_balance: MinimumBalance = 0

    def __post_init__(self) -> None:
        if self.balance < self.minimum_balance:
            raise ValueError


class Import(NamedTuple):
    """How many accounts were opened, and how many were open already; or what is wrong, a line each.

    If anything is wrong nothing was opened. `wrong`: the first `WRONG_LINES_MAX`; `wrong_in_all`: how many there are.
    """

    opened: int
    open_already: int
    wrong: list[str]
    wrong_in_all: int


def import_accounts(
    database_url: str, lines: Iterable[bytes], progress: Callable[[int, bool], None], schema: str | None = None
) -> Import:
    """Open the accounts of a CSV file in one transaction. `lines`: with their ends; the first one names the columns.

    An account that is open already is fine if it was opened with the same values. The database may be in use; who opens
    an account of the file while the accounts are being opened waits for the end. `progress` is told how many lines have
    been read, and whether these are all. Raises psycopg.Error.
    """
    with psycopg.connect(database_url, prepare_threshold=None) as connection:
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED  # to see what others have opened meanwhile
        connection.add_notice_handler(lambda notice: log.warning("the database says: %s", notice.message_primary))
        connection.execute(IMPORT_TABLE.encode())
        wrong = _WrongLines()
        count = 0
        with connection.cursor() as cursor, cursor.copy(IMPORT_LINES.encode()) as copy:
            for some in _accounts(lines, wrong, progress):
                copy.write(b"".join(some))
                count += len(some)
        opened = open_already = 0
        if not wrong.count:
            opened = connection.execute(in_schema(IMPORT_ACCOUNTS, schema).encode()).rowcount
        if opened < count:
            wrong.add_differences(connection, schema)
        if wrong.count:
            connection.rollback()
            return Import(0, 0, wrong.first(), wrong.count)
        if opened < count:
            ((accounts,),) = connection.execute(COUNT_IMPORTED_ACCOUNTS.encode())
            open_already = accounts - opened
        connection.commit()
        connection.execute(in_schema("ANALYZE {schema}users", schema).encode())
    return Import(opened, open_already, [], 0)


class _WrongLines:
    """The lines that are wrong: how many, and what is wrong with the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[tuple[int, str]] = []

    def add(self, line: int, fault: str) -> None:
        """A line is wrong, by itself."""
        self.count += 1
        if len(self._first) < WRONG_LINES_MAX:
            self._first.append((line, fault))

    def add_differences(self, connection: psycopg.Connection, schema: str | None) -> None:
        """Lines that contradict an earlier one, or an account that is open."""
        statement = in_schema(IMPORT_DIFFERENCES, schema).encode()
        rows = psycopg.RawCursor(connection).execute(statement, [WRONG_LINES_MAX]).fetchall()
        for line, user_id, earlier, balance, minimum_balance, _ in rows:
            before = f"was opened with balance {balance}, minimumBalance {minimum_balance}"
            self._first.append((line, f"user {user_id} {f'has other values in line {earlier}' if earlier else before}"))
        self.count += rows[0][-1] if rows else 0

    def first(self) -> list[str]:
        """What is wrong, a line each, in the order of the file."""
        return [f"line {line}: {fault}" for line, fault in sorted(self._first)[:WRONG_LINES_MAX]]


def _accounts(
    lines: Iterable[bytes], wrong: _WrongLines, progress: Callable[[int, bool], None]
) -> Iterator[list[bytes]]:
    """The lines that are right, with their numbers, as COPY takes them, many at a time; tells `wrong` of the others."""
    rest = iter(lines)
    header = next(rest, b"").removeprefix(_BYTE_ORDER_MARK).replace(b'"', b"").rstrip().decode(errors="replace")
    if header not in _HEADERS:
        wrong.add(1, f"expected {' or '.join(_HEADERS)}")
        return
    names = header.split(",")
    commas = len(names) - 1
    decode = json.Decoder(_OpenedAccount).decode
    number = 1
    some: list[bytes] = []
    for number, line in enumerate(rest, 2):
        if b'"' in line:
            line = _QUOTED.sub(rb"\1", line)
        try:
            account = decode(b"[%b]" % line)
        except ValueError:
            wrong.add(number, _fault(line, names))
            continue
        if line.count(b",") != commas:
            wrong.add(number, _fault(line, names))
            continue
        some.append(b"%d\t%d\t%d\t%d\n" % (number, account.user_id, account.balance, account.minimum_balance))
        if len(some) == _LINES_AT_ONCE:
            yield some
            progress(number, False)
            some = []
    yield some
    progress(number, True)


def _fault(line: bytes, names: list[str]) -> str:
    """What is wrong with a line that is wrong."""
    values = line.split(b",")
    if len(values) != len(names):
        return f"expected {len(names)} values, found {len(values)}"
    for name, value in zip(names, values, strict=True):
        try:
            json.decode(value, type=_SHAPES[name])
        except ValueError:
            return _expected(name)
    return _expected("balance")  # which is below the minimum


def _expected(name: str) -> str:
    return f"{name}: expected {_SHAPES[name].__metadata__[0].description}"


def export_accounts(database_url: str, file: BinaryIO, schema: str | None = None) -> tuple[int, int]:
    """Write all accounts, as they are at one moment, to `file`; gives how many holds are open, and what they hold.

    What is held is in the balances; the holds themselves are not in the file. Raises psycopg.Error or OSError.
    """
    with psycopg.connect(database_url, prepare_threshold=None) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        with connection.cursor() as cursor, cursor.copy(in_schema(EXPORT_ACCOUNTS, schema).encode()) as copy:
            file.writelines(copy)
        file.flush()
        ((count, held),) = connection.execute(in_schema(COUNT_OPEN_HOLDS, schema).encode())
    return count, int(held)
