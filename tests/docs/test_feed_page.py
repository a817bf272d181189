"""docs/feed.md: its command, its consumer and its subscription work as pasted."""

import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest

from atomic_balance.http.errors import PROBLEMS
from atomic_balance.postgres.embedded import embedded_postgres
from tests.client import UPDATE, opened
from tests.database import Database, until
from tests.docs.pasting import blocks
from tests.killable import killable_server, sockets_for_the_servers_user
from tests.processes import ROOT, bare_environment, run, running_service
from tests.restoring import dump, restore

PAGE = (ROOT / "docs" / "feed.md").read_text()
BLOCKS = blocks(PAGE)
CONSUMERS_TABLES, PUBLICATION, SUBSCRIPTION = (code for language, code in BLOCKS if language == "sql")
(CONSUMER,) = (code for language, code in BLOCKS if language == "python")
USERS = range(1, 11)
COUNTED = "SELECT user_id, changes, amount FROM turnover ORDER BY 1"
TO_COUNT = "SELECT user_id, count(*), sum(abs(amount)) FROM balance_changes GROUP BY 1 ORDER BY 1"
COPIED = "SELECT user_id, version, amount, created_at FROM balance_changes WHERE version IS NOT NULL ORDER BY 1, 2"


async def test_the_command_prints_what_the_page_says(
    database: Database, tmp_path: Path, caller: aiohttp.ClientSession
) -> None:
    (command,) = (code for language, code in BLOCKS if language == "bash" and code.startswith("curl"))
    (shown,) = (json.loads(code) for language, code in BLOCKS if language == "json")
    async with running_service({"DATABASE_URL": database.url}, tmp_path) as service:
        await opened(caller, url=service.url)
        change = {"userId": 1, "amount": -2, "reference": "order 4711"}
        headers = {"Idempotency-Key": "4711-1"}
        async with caller.post(service.url + UPDATE, json=change, headers=headers) as answer:
            assert answer.status == 200
        status, printed = await run(
            *("bash", "-c", command.replace("curl", "curl --silent")),
            directory=tmp_path,
            environment={"BALANCE_URL": service.url},
        )
        found = json.loads(printed)
    assert status == 0
    assert re.fullmatch(r"\d{16}\.1\.1", found["next"])
    assert re.fullmatch(r"\d{16}\.1\.1", shown["next"])
    for each in (found, shown):
        del each["next"], each["changes"][0]["createdAt"]
    assert found == shown


@contextlib.asynccontextmanager
async def consuming(url: str, database_url: str, directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the page's consumer."""
    (directory / "consumer.py").write_text(CONSUMER)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "consumer.py"),
        cwd=directory,
        env={**bare_environment(), "BALANCE_URL": url, "CONSUMER_DATABASE_URL": database_url},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def write(caller: aiohttp.ClientSession, url: str, writer: int, count: int) -> None:
    """Change balances, each with a key, and ask again until it is done."""
    chance = random.Random(writer)
    for number in range(count):
        change = {"userId": chance.choice(USERS), "amount": chance.choice([-2, 1, 3])}
        headers = {"Idempotency-Key": f"{writer}-{number}"}
        while True:
            try:
                async with caller.post(url + UPDATE, json=change, headers=headers) as answer:
                    if answer.status == 200:
                        break
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_the_consumer_counts_each_change_once_while_everything_is_killed_and_restored(
    database: Database, tmp_path: Path, caller: aiohttp.ClientSession
) -> None:
    """Writers write; the service and the consumer are killed; the data move to a younger server; nothing is missed."""
    database.execute(CONSUMERS_TABLES)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    def has_moved(before: list[Any], writing: asyncio.Future[Any]) -> bool:
        return writing.done() or database.execute(COUNTED) != before

    async def round_with_kills(database_url: str, first_writer: int) -> None:
        environment = {"DATABASE_URL": database_url, "PORT": str(port)}
        writing = asyncio.gather(*(write(caller, url, writer, 100) for writer in range(first_writer, first_writer + 6)))
        for kill_service in (True, False, True, False):
            async with (
                running_service(environment, tmp_path) as service,
                consuming(url, database.url, tmp_path) as consumer,
            ):
                before = database.execute(COUNTED)
                await until(partial(has_moved, before, writing))
                (service.process if kill_service else consumer).send_signal(signal.SIGKILL)
        async with running_service(environment, tmp_path), consuming(url, database.url, tmp_path):
            await writing
            with psycopg.connect(database_url, autocommit=True) as journal:
                await until(lambda: database.execute(COUNTED) == journal.execute(TO_COUNT).fetchall())

    with killable_server(tmp_path / "old") as old, embedded_postgres(tmp_path / "new") as new_url:
        with Database(old.url) as accounts:
            accounts.open(dict.fromkeys(USERS, 10_000))
            accounts.execute("DO $$ BEGIN FOR n IN 1..2000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$")
        await round_with_kills(old.url, 0)
        restore(dump(old.url), new_url)
        await round_with_kills(new_url, 100)
    assert sum(changes for _, changes, _ in database.execute(COUNTED)) == 2 * 6 * 100


@pytest.mark.slow
async def test_a_subscriber_gets_every_applied_change(tmp_path: Path, caller: aiohttp.ClientSession) -> None:
    """Those from before it subscribed, those that come, and those that came while it was away."""
    with killable_server(tmp_path / "publisher") as publisher:
        with psycopg.connect(publisher.url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET wal_level = logical")
        publisher.stop()
        publisher.start()
        with psycopg.connect(publisher.url, autocommit=True) as connection:
            connection.execute(PUBLICATION.encode())
        with embedded_postgres(tmp_path / "subscriber") as subscriber_url:
            address = f"host={sockets_for_the_servers_user(publisher.url)} dbname=postgres user=postgres"

            async def changed(key: str, amount: int) -> None:
                headers = {"Idempotency-Key": key}
                async with caller.post(
                    service.url + UPDATE, json={"userId": 1, "amount": amount}, headers=headers
                ) as answer:
                    assert answer.status == (400 if amount < -100 else 200)

            with Database(publisher.url) as source, Database(subscriber_url) as target:

                async def is_copied() -> None:
                    await until(lambda: target.execute(COPIED) == source.execute(COPIED))

                async with running_service({"DATABASE_URL": publisher.url}, tmp_path) as service:
                    await opened(caller, 100, url=service.url)
                    await changed("before", 1)
                    await changed("refused", -500)
                    table, subscribe, _ = re.split(r"(?<=;)\n", SUBSCRIPTION)
                    target.execute(table)
                    target.execute(subscribe.replace("host=... dbname=... user=...", address))
                    await is_copied()
                    await changed("after", 2)
                    await is_copied()
                    target.execute("ALTER SUBSCRIPTION balance_changes DISABLE")
                    await changed("away", 3)
                    target.execute("ALTER SUBSCRIPTION balance_changes ENABLE")
                    await is_copied()
                    assert len(target.execute(COPIED)) == 3
                target.execute("DROP SUBSCRIPTION balance_changes")


def test_the_table_has_the_errors_of_the_feed() -> None:
    table = PAGE[PAGE.index("| answer |") : PAGE.index("\n\n", PAGE.index("| answer |"))]
    statuses = set(map(int, re.findall(r"^\| (\d{3})", table, re.MULTILINE)))
    assert statuses == {200} | {
        PROBLEMS[code].status for code in ("invalid_request", "feed_not_offered", "unavailable")
    }
