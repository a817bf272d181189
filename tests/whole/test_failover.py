"""A primary dies, and its streaming standby is promoted: what is kept, and what can be lost."""

import asyncio
import socket
from collections import Counter
from pathlib import Path

import psycopg
import pytest

from atomic_balance.changes import Applied, Change
from atomic_balance.postgres.connections import open_connection
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.client import APPLIED, REFUSED, opened, session, withdraw
from tests.committing import committing
from tests.database import Database, until
from tests.processes import running_service
from tests.replicated import replicated

pytestmark = pytest.mark.slow

RACE = 10_000


def changes_and_balance(url: str) -> tuple[int, int]:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT version, balance FROM users WHERE id = 1").fetchone()
    assert row
    return row[0], row[1]


async def test_the_standby_is_promoted_in_the_middle_of_the_race(tmp_path: Path) -> None:
    """With synchronous replication nothing is lost: 5,000 and 5,000, without a single retry by a client."""
    with replicated(tmp_path, synchronous=True) as pair:
        environment = {"DATABASE_URL": pair.url, "DEADLINE_SECONDS": "15"}
        async with (
            running_service(environment, tmp_path) as service,
            session() as client,
        ):
            await opened(client, url=service.url)
            race = asyncio.gather(*(withdraw(client, service.url) for _ in range(RACE)))
            await until(lambda: changes_and_balance(pair.primary.url)[0] > 0)
            assert not race.done()
            assert changes_and_balance(pair.primary.url)[0] < 5_000
            pair.promote()
            assert Counter(await race) == {APPLIED: 5_000, REFUSED: 5_000}
            async with client.get(f"{service.url}/readyz") as answer:
                assert answer.status == 200
        assert changes_and_balance(pair.standby_url) == (5_000, 0)
        assert verify(pair.url).differences == []


async def test_what_asynchronous_replication_can_lose(tmp_path: Path) -> None:
    """The newest changes, each of them whole, with their keys: whoever asks again applies them anew."""
    with replicated(tmp_path, synchronous=False) as pair:
        async with committing(Settings(database_url=pair.url)) as committer:
            with Database(pair.primary.url) as database:
                database.open({1: 10})
                assert await committer.submit(Change(1, -1, "kept")) == Applied(9)
                database.execute("SELECT pg_switch_wal()")
            with psycopg.connect(pair.standby_url, autocommit=True) as standby:
                await until(lambda: standby.execute("SELECT version FROM users").fetchone() == (1,))
                standby.execute("ALTER SYSTEM SET primary_conninfo = ''")  # what comes now does not get there
                standby.execute("SELECT pg_reload_conf()")
                await until(lambda: not standby.execute("SELECT pid FROM pg_stat_wal_receiver").fetchone())
            assert await committer.submit(Change(1, -1, "lost")) == Applied(8)
            pair.promote()
            assert changes_and_balance(pair.standby_url) == (1, 9)
            # The first one notices that the connection is gone, and so can't tell that it was applied before.
            assert await committer.submit(Change(1, -1, "kept")) == Applied(9)
            assert await committer.submit(Change(1, -1, "kept")) == Applied(9, replayed=True)
            assert await committer.submit(Change(1, -1, "lost")) == Applied(8)
        assert verify(pair.standby_url).differences == []


async def test_a_host_that_does_not_answer_holds_up_no_other(database_url: str) -> None:
    with Database(database_url) as database, socket.create_server(("127.0.0.1", 0)) as mute:
        async with database.proxied() as (_, url):
            hosts = f"127.0.0.1:{mute.getsockname()[1]},127.0.0.1:"
            settings = Settings(database_url=url.replace("127.0.0.1:", hosts), connect_seconds=30)
            assert len(settings.host_urls) == 2
            async with asyncio.timeout(5):
                connection = await open_connection(settings)
                assert await connection.fetchval("SELECT 1") == 1
                await connection.close()


@pytest.mark.parametrize("attributes", ["", "&target_session_attrs=any"])
async def test_connections_that_were_not_chosen_are_closed(database_url: str, attributes: str) -> None:
    with Database(database_url) as database:
        twice = database_url.replace("host=", f"host={database_url.split('host=')[1]},") + attributes
        for _ in range(5):
            connection = await open_connection(Settings(database_url=twice))
            await connection.close()
        await until(lambda: not database.connected())
