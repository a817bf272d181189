"""Accounts from a file and to a file: all or none, and nothing but what the file says."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from atomic_balance.changes import BALANCE_LIMIT
from atomic_balance.postgres.accounts_csv import WRONG_LINES_MAX, Import, import_accounts
from atomic_balance.postgres.verify import verify
from tests.client import Client, hold, opened, update
from tests.database import Database
from tests.processes import bare_environment, run

COMMAND = (sys.executable, "-m", "atomic_balance")
BALANCE = f"balance: expected an integer from minimumBalance (0 unless given) to {BALANCE_LIMIT}"


def imported(database: Database, text: str) -> Import:
    return import_accounts(database.url, text.splitlines(keepends=True), lambda count: None)


def accounts(database: Database) -> list[tuple[int, ...]]:
    return database.execute(
        "SELECT id, balance, opening_balance, minimum_balance, opening_minimum_balance FROM users ORDER BY id"
    )


def test_accounts_are_opened(database: Database) -> None:
    text = "userId,balance,minimumBalance\n7,100,0\n1,-5,-10\n9007199254740991,9007199254740991,0\n"
    assert imported(database, text) == Import(3, 0, [])
    top = BALANCE_LIMIT
    assert accounts(database) == [(1, -5, -5, -10, -10), (7, 100, 100, 0, 0), (top, top, top, 0, 0)]
    assert database.execute("SELECT count(*) FROM users WHERE opened_at IS NULL") == [(0,)]
    assert database.execute("SELECT reltuples FROM pg_class WHERE relname = 'users'") == [(3,)]
    assert verify(database.url).differences == []


def test_without_a_minimum_it_is_0_and_windows_ends_its_lines_otherwise(database: Database) -> None:
    assert imported(database, 'userId,balance\r\n"1","5"\r\n2,6') == Import(2, 0, [])
    assert [row[:2] for row in accounts(database)] == [(1, 5), (2, 6)]


async def test_what_is_open_with_the_same_values_is_fine(client: Client, database: Database) -> None:
    await opened(client, 100)
    await update(client, -30)
    assert imported(database, "userId,balance\n1,100\n2,7\n2,7\n") == Import(1, 2, [])
    assert imported(database, "userId,balance\n1,100\n2,7\n2,7\n") == Import(0, 3, [])
    assert [row[:3] for row in accounts(database)] == [(1, 70, 100), (2, 7, 7)]


def test_what_was_opened_otherwise_is_named_and_nothing_is_changed(database: Database) -> None:
    database.open({1: 100, 2: 7})
    before = accounts(database)
    found = imported(database, "userId,balance,minimumBalance\n3,5,0\n2,7,-1\n1,99,0\n4,1,0\n4,2,0\n")
    assert found.wrong == [
        f"line {line}: user {user} was opened with other values" for line, user in ((3, 2), (4, 1), (6, 4))
    ]
    assert accounts(database) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0,1", "userId: expected an integer from 1 to 9007199254740991"),
        ("x,1", "userId: expected an integer from 1 to 9007199254740991"),
        ("9007199254740992,1", "userId: expected an integer from 1 to 9007199254740991"),
        ("1,", BALANCE),
        ("1,-1", BALANCE),
        ("1,1.50", BALANCE),
        ("1,9007199254740992", BALANCE),
        ("1", "expected 2 values"),
        ("", "expected 2 values"),
        ("1,2,3", "expected 2 values"),
        ("1;2", "expected 2 values"),
        ('1,"2', "unexpected end of data"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_opened(database: Database, line: str, said: str) -> None:
    found = imported(database, f"userId,balance\n5,1\n{line}\n")
    assert found == Import(0, 0, [f"line 3: {said}"])
    assert accounts(database) == []


def test_a_minimum_above_the_balance_is_wrong(database: Database) -> None:
    found = imported(database, "userId,balance,minimumBalance\n1,5,6\n2,5,a\n")
    assert found.wrong == [
        f"line 2: {BALANCE}",
        f"line 3: minimumBalance: expected an integer from -{BALANCE_LIMIT} to {BALANCE_LIMIT}",
    ]


@pytest.mark.parametrize("head", ["", "1,100", "userid,balance", "balance,userId", "userId;balance"])
def test_the_first_line_names_the_columns(database: Database, head: str) -> None:
    wrong = ["line 1: expected userId,balance or userId,balance,minimumBalance"]
    assert imported(database, f"{head}\n1,100\n").wrong == wrong


def test_wrong_lines_are_counted_up_to_a_bound(database: Database) -> None:
    found = imported(database, "userId,balance\n" + "0,0\n" * 1_000)
    assert len(found.wrong) == WRONG_LINES_MAX


async def test_accounts_that_others_open_meanwhile_are_like_those_from_before(
    client: Client, database: Database
) -> None:
    text = "userId,balance\n" + "".join(f"{user_id},5\n" for user_id in range(1, 20_001))
    importing = asyncio.create_task(asyncio.to_thread(imported, database, text))
    user_id, answers = 20_000, set()
    while not importing.done():
        async with client.put(f"/api/users/{user_id}", json={"balance": 5}) as answer:
            answers.add(answer.status)
        user_id -= 1
    assert answers <= {200, 201, 503}
    found = await importing
    assert found.wrong == []
    assert found.opened + found.open_already == 20_000
    assert database.execute("SELECT count(*), sum(balance) FROM users") == [(20_000, 100_000)]


async def test_the_commands_from_one_database_to_another(
    client: Client, database: Database, empty_database_url: str, tmp_path: Path
) -> None:
    await opened(client, 100)
    await opened(client, 3, user_id=2)
    await update(client, -30)
    await client.patch("/api/users/1", json={"minimumBalance": -9})
    await hold(client, "h", 20)
    old = {"DATABASE_URL": database.url}
    status, output = await run(*COMMAND, "export", "accounts.csv", directory=tmp_path, environment=old)
    assert (status, output) == (0, "not in the file: 1 open holds, which hold 20 of the balances\n")
    text = "userId,balance,minimumBalance\n1,70,-9\n2,3,0\n"
    assert (tmp_path / "accounts.csv").read_text() == text
    new = {"DATABASE_URL": empty_database_url, "DATABASE_SCHEMA": "elsewhere"}
    assert (await run(*COMMAND, "migrate", directory=tmp_path, environment=new))[0] == 0
    result = await run(*COMMAND, "import", "accounts.csv", directory=tmp_path, environment=new)
    assert result == (0, "2 accounts opened, 0 were open already\n")
    assert await run(*COMMAND, "export", directory=tmp_path, environment=new) == (0, text)


async def test_the_command_says_what_is_wrong(database: Database, tmp_path: Path) -> None:
    environment = {"DATABASE_URL": database.url}
    (tmp_path / "bad.csv").write_text("userId,balance\n1,5\n0,5\n")
    status, output = await run(*COMMAND, "import", "bad.csv", directory=tmp_path, environment=environment)
    wrong = "line 3: userId: expected an integer from 1 to 9007199254740991\n"
    assert (status, sorted(output.splitlines(keepends=True))) == (
        1,
        sorted([wrong, "atomic-balance: nothing was imported: 1 lines are wrong\n"]),
    )
    result = await run(*COMMAND, "import", "none.csv", directory=tmp_path, environment=environment)
    assert result == (1, "atomic-balance: none.csv: No such file or directory\n")
    (tmp_path / "latin1.csv").write_bytes(b"userId,balance\n1,5\n2,\xe9\n")
    status, output = await run(*COMMAND, "import", "latin1.csv", directory=tmp_path, environment=environment)
    assert (status, "expected text in UTF-8" in output) == (1, True)
    assert accounts(database) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_memory_does_not_grow_with_the_file(database: Database, tmp_path: Path) -> None:
    """Read from standard input, so that nothing else can hold it; VmHWM is the most that was resident, in kB."""

    def kilobytes(count: int) -> int:
        database.execute("TRUNCATE users")
        text = "userId,balance\n" + "".join(f"{user_id},5\n" for user_id in range(1, count + 1))
        program = (
            "import re, sys; sys.argv = ['atomic-balance', 'import', '-']\n"
            "from atomic_balance.__main__ import main\n"
            "try: main()\n"
            "finally: print(re.search('VmHWM:.*', open('/proc/self/status').read())[0])\n"
        )
        printed = subprocess.run(
            [sys.executable, "-c", program],
            input=text,
            cwd=tmp_path,
            env={**bare_environment(), "DATABASE_URL": database.url},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        assert f"{count:,} accounts opened" in printed
        return int(re.findall(r"\d+", printed)[-1])

    small, large = kilobytes(20_000), kilobytes(400_000)
    assert large < small + 10_000


def test_an_import_that_dies_has_opened_nothing(database: Database) -> None:
    def lines() -> object:
        yield "userId,balance\n"
        yield from ("1,5\n" for _ in range(50_000))
        raise ConnectionError("the file's disk has gone")

    with pytest.raises(ConnectionError):
        import_accounts(database.url, lines(), lambda count: None)  # type: ignore[arg-type]
    assert accounts(database) == []
    with psycopg.connect(database.url) as connection:
        assert connection.execute("SELECT to_regclass('imported_accounts')").fetchone() == (None,)
