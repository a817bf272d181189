"""docs/adopting.md: its steps, run as pasted, while the application goes on."""

import asyncio
import itertools
import random
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest

from atomic_balance.postgres.verify import verify
from tests.database import Database
from tests.docs.pasting import bash, blocks
from tests.processes import ROOT, running_service

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("psql") is None, reason="psql is not installed (apt-get install postgresql-client)"
    ),
]

PAGE = (ROOT / "docs" / "adopting.md").read_text()
USERS, WRITERS = 40, 4
CENTS = 5_000
SLOW = """
CREATE FUNCTION take_a_while() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.3); RETURN NEW; END $$;
CREATE TRIGGER take_a_while BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION take_a_while();
"""


class Application:
    """The application of the page: threads that store payments and apply them, also those that were left open."""

    def __init__(self, url: str, code: Path) -> None:
        self.url = url
        self.faults: list[BaseException] = []
        self.open_seen = 0
        self._code = code
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(number,)) for number in range(WRITERS)]

    def __enter__(self) -> "Application":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _write(self, writer: int) -> None:
        names: dict[str, Any] = {}
        exec(compile(self._code.read_text(), "apply.py", "exec"), names)
        chance = random.Random(writer)
        waiting: list[str] = []
        try:
            with psycopg.connect(self.url, autocommit=True) as connection:
                users = [user for (user,) in connection.execute("SELECT id FROM users ORDER BY id")]
                for number in itertools.count():
                    if self._stopping.is_set() and not waiting:
                        return
                    if not self._stopping.is_set():
                        key = f"{writer}-{number}"
                        payment = [key, chance.choice(users), chance.choice((-3_000, -700, 500, 2_000))]
                        connection.execute("INSERT INTO payments (key, user_id, cents) VALUES (%s, %s, %s)", payment)
                        waiting.append(key)
                    waiting = [key for key in waiting if names["apply"](connection, key) == "open"]
                    self.open_seen += len(waiting)
                    self._stopping.wait(0.01)
        except BaseException as fault:  # noqa: BLE001 - shown by the test
            self.faults.append(fault)


def by_language(language: str) -> list[str]:
    return [text for of, text in blocks(PAGE) if of == language]


async def test_users_move_to_the_service_and_back_while_payments_go_on(
    empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Database(empty_database_url) as database:
        users, accounts, payments = by_language("sql")
        install, move, check, back = by_language("bash")
        (code,) = by_language("python")
        (tmp_path / "apply.py").write_text(code)
        database.execute(users)
        database.execute(
            f"INSERT INTO users (name, balance) SELECT name, {CENTS / 100} FROM generate_series(1, {USERS}) name"
        )
        database.execute(SLOW)  # so that users move while a change of theirs is under way
        environment = {"DATABASE_URL": empty_database_url, "DATABASE_SCHEMA": "balances"}

        async def pasted(script: str) -> str:
            return await bash(script, tmp_path, environment)

        await pasted(install)
        database.execute(accounts)
        database.execute(payments)

        def applied() -> int:
            return int(database.execute("SELECT count(*) FROM payments WHERE state = 'applied'")[0][0])

        async def more() -> None:
            """Wait until the application has gone on."""
            wanted = applied() + 20
            async with asyncio.timeout(60):
                while True:
                    if applied() >= wanted:
                        break
                    await asyncio.sleep(0.05)

        async with running_service(environment, tmp_path) as service:
            monkeypatch.setenv("BALANCE_URL", service.url)
            with Application(empty_database_url, tmp_path / "apply.py") as application:
                await more()
                assert "40 accounts opened, 0 were open already" in await pasted(move)
                database.execute("DROP TRIGGER take_a_while ON users")
                await more()
                zero, verified = (await pasted(check)).split("\n", 1)
                assert (zero, "every balance is what the journal says" in verified) == ("0", True)
                await pasted(back)
                await more()
            assert application.faults == []
        assert application.open_seen > 0  # some came while their users moved
        assert database.execute("SELECT count(*) FROM payments WHERE state = 'open'") == [(0,)]
        assert database.execute("SELECT DISTINCT home FROM accounts") == [("table",)]
        wrong = database.execute(
            "SELECT id, (balance * 100)::bigint, sum(cents) FILTER (WHERE state = 'applied') FROM users"
            " LEFT JOIN payments ON user_id = id GROUP BY id"
            f" HAVING (balance * 100)::bigint <> {CENTS} + coalesce(sum(cents) FILTER (WHERE state = 'applied'), 0)"
        )
        assert wrong == []
        found = verify(empty_database_url, schema="balances")
        assert (found.differences, found.changes >= 20) == ([], True)


async def test_a_move_that_stopped_half_way_is_gone_on_with(empty_database_url: str, tmp_path: Path) -> None:
    """Each step can be done again."""
    with Database(empty_database_url) as database:
        for script in by_language("sql")[:1]:
            database.execute(script)
        database.execute("INSERT INTO users (name, balance) VALUES ('Ada', 12.5), ('Bo', 0)")
        environment = {"DATABASE_URL": empty_database_url, "DATABASE_SCHEMA": "balances"}
        install, move, check, _ = by_language("bash")
        await bash(install, tmp_path, environment)
        database.execute(by_language("sql")[1])
        steps = re.split(r"(?m)^(?=psql|atomic-balance)", move)[1:]
        assert len(steps) == 4
        printed = await bash("".join(step for step in steps for _ in range(2)), tmp_path, environment)
        assert printed == "2 accounts opened, 0 were open already\n0 accounts opened, 2 were open already\n"
        assert (await bash(check, tmp_path, environment)).startswith("0\n")
        assert database.execute("SELECT balance FROM balances.users ORDER BY 1") == [(0,), (1250,)]
