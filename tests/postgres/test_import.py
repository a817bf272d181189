"""Accounts from a file and to a file: all or none, and nothing but what the file says."""

import asyncio
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from atomic_balance.changes import BALANCE_LIMIT
from atomic_balance.postgres.accounts_csv import WRONG_LINES_MAX, Import, import_accounts
from atomic_balance.postgres.verify import verify
from tests.client import Client, hold, opened, update
from tests.database import Database, until
from tests.processes import bare_environment, run

COMMAND = (sys.executable, "-m", "atomic_balance")
USER = f"userId: expected an integer from 1 to {BALANCE_LIMIT}"
BALANCE = f"balance: expected an integer from minimumBalance (0 unless given) to {BALANCE_LIMIT}"


def imported(database: Database, text: str | bytes) -> Import:
    file = io.BytesIO(text.encode() if isinstance(text, str) else text)
    return import_accounts(database.url, file, lambda lines, ended: None)


def done(opened: int, open_already: int = 0) -> Import:
    return Import(opened, open_already, [], 0)


def otherwise(*wrong: str) -> Import:
    return Import(0, 0, list(wrong), len(wrong))


def accounts(database: Database) -> list[tuple[int, ...]]:
    return database.execute(
        "SELECT id, balance, opening_balance, minimum_balance, opening_minimum_balance FROM users ORDER BY id"
    )


def test_accounts_are_opened(database: Database) -> None:
    text = "userId,balance,minimumBalance\n7,100,0\n1,-5,-10\n9007199254740991,9007199254740991,0\n"
    assert imported(database, text) == done(3)
    top = BALANCE_LIMIT
    assert accounts(database) == [(1, -5, -5, -10, -10), (7, 100, 100, 0, 0), (top, top, top, 0, 0)]
    assert database.execute("SELECT count(*) FROM users WHERE opened_at IS NULL") == [(0,)]
    assert database.execute("SELECT reltuples FROM pg_class WHERE relname = 'users'") == [(3,)]
    assert verify(database.url).differences == []


def test_without_a_minimum_it_is_0_and_windows_ends_its_lines_otherwise(database: Database) -> None:
    for text in (b"userId,balance\r\n1,5\r\n2,6", b'\xef\xbb\xbf"userId","balance"\n"1","5"\n"2", 6\n'):
        database.execute("DELETE FROM users")
        assert imported(database, text) == done(2)
        assert [row[:2] for row in accounts(database)] == [(1, 5), (2, 6)]


def test_no_accounts_are_none(database: Database) -> None:
    assert imported(database, "userId,balance\n") == done(0)


async def test_what_is_open_with_the_same_values_is_fine(client: Client, database: Database) -> None:
    await opened(client, 100)
    await update(client, -30)
    assert imported(database, "userId,balance\n1,100\n2,7\n2,7\n") == done(1, open_already=1)
    assert imported(database, "userId,balance\n1,100\n2,7\n2,7\n") == done(0, open_already=2)
    assert [row[:3] for row in accounts(database)] == [(1, 70, 100), (2, 7, 7)]


def test_what_was_opened_otherwise_is_named_and_nothing_is_changed(database: Database) -> None:
    database.open({1: 100, 2: 7})
    before = accounts(database)
    right = "userId,balance,minimumBalance\n3,5,0\n2,7,-1\n1,99,0\n4,1,0\n4,2,0\n"
    different = (
        "line 3: user 2 was opened with balance 7, minimumBalance 0",
        "line 4: user 1 was opened with balance 100, minimumBalance 0",
        "line 6: user 4 has other values in line 5",
    )
    assert imported(database, right) == otherwise(*different)
    assert imported(database, right + "x,1,0\n") == otherwise(*different, f"line 7: {USER}")
    assert accounts(database) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0,1", USER),
        ("-1,1", USER),
        ("x,1", USER),
        ("01,1", USER),
        (",1", USER),
        ("\xff,1", USER),
        ("\0,1", USER),
        ("9007199254740992,1", USER),
        ("1,", BALANCE),
        ("1,-1", BALANCE),
        ("1,+1", BALANCE),
        ("1,1.50", BALANCE),
        ("1,1.00", BALANCE),
        ("1,1e3", BALANCE),
        ("1,true", BALANCE),
        ("1,9007199254740992", BALANCE),
        (f"1,{'[' * 100_000}", BALANCE),
        ('1,"2', BALANCE),
        ('1,"1"2', BALANCE),
        ('2"1",1', USER),
        ("1", "expected 2 values, found 1"),
        ("", "expected 2 values, found 1"),
        ("1,2,", "expected 2 values, found 3"),
        ("1,2,3", "expected 2 values, found 3"),
        ("1;2", "expected 2 values, found 1"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_opened(database: Database, line: str, said: str) -> None:
    text = f"userId,balance\n5,1\n{line}\n6,1\n".encode("latin1")
    assert imported(database, text) == otherwise(f"line 3: {said}")
    assert accounts(database) == []


def test_a_minimum_above_the_balance_is_wrong(database: Database) -> None:
    found = imported(database, "userId,balance,minimumBalance\n1,5,6\n2,5,a\n3,5\n4,5,\n")
    assert found == otherwise(
        f"line 2: {BALANCE}",
        f"line 3: minimumBalance: expected an integer from -{BALANCE_LIMIT} to {BALANCE_LIMIT}",
        "line 4: expected 3 values, found 2",
        f"line 5: minimumBalance: expected an integer from -{BALANCE_LIMIT} to {BALANCE_LIMIT}",
    )


@pytest.mark.parametrize("head", ["", "1,100", "userid,balance", "balance,userId", "userId;balance"])
def test_the_first_line_names_the_columns(database: Database, head: str) -> None:
    wrong = ["line 1: expected userId,balance or userId,balance,minimumBalance"]
    assert imported(database, f"{head}\n1,100\n").wrong == wrong


def test_of_many_wrong_lines_the_first_are_named(database: Database) -> None:
    """Whether they are wrong by themselves, as every second is, or differ from what is open."""
    database.open(dict.fromkeys(range(1, 101), 0))
    lines = "".join(f"{number},{'x' if number % 2 else 1}\n" for number in range(1, 101))
    found = imported(database, f"userId,balance\n{lines}")
    assert [wrong.partition(":")[0] for wrong in found.wrong] == [f"line {n}" for n in range(2, 2 + WRONG_LINES_MAX)]
    assert found.wrong_in_all == 100


async def test_who_opens_an_account_first_is_heard(database: Database) -> None:
    """With the same values the import goes on, with others it undoes all; until it is known, it waits."""
    for balance, expected in (
        (20, done(2, open_already=1)),
        (21, otherwise("line 3: user 2 was opened with balance 21, minimumBalance 0")),
    ):
        database.execute("DELETE FROM users")
        insert = f"INSERT INTO users (id, balance, opening_balance) VALUES (2, {balance}, {balance})"
        with database.session(insert) as other:
            task = asyncio.create_task(asyncio.to_thread(imported, database, "userId,balance\n1,10\n2,20\n3,30\n"))
            await until(lambda: waits(database))
            other.commit()
        assert await task == expected
        there = [(1, 10), (2, 20), (3, 30)] if balance == 20 else [(2, 21)]
        assert [row[:2] for row in accounts(database)] == there


def waits(database: Database) -> bool:
    """Whether somebody waits for a lock."""
    statement = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(database.execute(statement))


async def test_other_accounts_change_and_are_opened_while_it_waits(client: Client, database: Database) -> None:
    database.open({1: 100})
    with database.session("INSERT INTO users (id, balance, opening_balance) VALUES (3, 30, 30)") as other:
        task = asyncio.create_task(asyncio.to_thread(imported, database, "userId,balance\n2,20\n3,30\n4,40\n"))
        await until(lambda: waits(database))
        changed = await client.post("/api/balance/update", json={"userId": 1, "amount": -2})
        made = await client.put("/api/users/5", json={"balance": 50})
        assert (changed.status, made.status) == (200, 201)
        assert (await client.get("/api/users/2")).status == 404
        other.commit()
    assert await task == done(2, open_already=1)
    assert database.accounts() == {1: (1, 98), 2: (0, 20), 3: (0, 30), 4: (0, 40), 5: (0, 50)}


async def test_imports_of_the_same_accounts_do_not_deadlock(database: Database) -> None:
    ids = range(1, 5_001)
    up, down = ("userId,balance\n" + "".join(f"{n},{n}\n" for n in order) for order in (ids, reversed(ids)))
    found = await asyncio.gather(*(asyncio.to_thread(imported, database, text) for text in (up, down, up, down)))
    assert sorted(found) == [done(0, open_already=5_000)] * 3 + [done(5_000)]
    assert database.accounts() == {n: (0, n) for n in ids}


def test_a_role_that_may_not_analyze_is_told(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    role = f"{database.name}_role"
    database.execute(f"CREATE ROLE {role} LOGIN")
    try:
        database.execute(f"GRANT SELECT, INSERT, UPDATE ON users TO {role}")
        url = database.url.replace("//postgres@", f"//{role}@")
        assert import_accounts(url, [b"userId,balance\n", b"1,10\n"], lambda lines, ended: None) == done(1)
        assert "users" in caplog.text
    finally:
        database.execute(f"DROP OWNED BY {role}")
        database.execute(f"DROP ROLE {role}")


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
    result = await run(*COMMAND, "export", "/dev/full", directory=tmp_path, environment=environment)
    assert result == (1, "atomic-balance: /dev/full: No space left on device\n")
    (tmp_path / "latin1.csv").write_bytes(b"userId,balance\n1,5\n2,\xe9\n")
    status, output = await run(*COMMAND, "import", "latin1.csv", directory=tmp_path, environment=environment)
    assert (status, f"line 3: {BALANCE}" in output) == (1, True)
    (tmp_path / "many.csv").write_text("userId,balance\n" + "0,5\n" * 1_234)
    status, output = await run(*COMMAND, "import", "many.csv", directory=tmp_path, environment=environment)
    assert (status, "and 1,224 more\n" in output, "1,234 lines are wrong" in output) == (1, True, True)
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
    def lines() -> Iterator[bytes]:
        yield b"userId,balance\n"
        yield from (b"%d,5\n" % user_id for user_id in range(1, 50_000))
        raise ConnectionError("the file's disk has gone")

    with pytest.raises(ConnectionError):
        import_accounts(database.url, lines(), lambda lines, ended: None)
    assert accounts(database) == []
    with psycopg.connect(database.url) as connection:
        assert connection.execute("SELECT to_regclass('imported_accounts')").fetchone() == (None,)
