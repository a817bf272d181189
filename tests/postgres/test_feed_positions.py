"""Positions of the feed go on rising whatever happens to the server: a restore into a younger one, a fail-over."""

import asyncio
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from pytest_aiohttp import AiohttpClient

from atomic_balance.changes import Applied, Change, Undecided
from atomic_balance.http.app import make_app
from atomic_balance.postgres.embedded import embedded_postgres
from atomic_balance.postgres.failures import UnreachableError
from atomic_balance.postgres.session import connect
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.client import Client, opened, update
from tests.committing import committing
from tests.database import Database, until
from tests.feed import Reader
from tests.killable import killable_server
from tests.replicated import replicated
from tests.restoring import dump, restore
from tests.schema import make_schema

OFFSET = "SELECT feed_offset()"
KEEP = "SELECT keep_feed_ascending()"
APPLY = "SELECT FROM apply_changes({user}, ARRAY[{user}], ARRAY['k'], ARRAY[1], NULL, NULL, NULL, NULL, NULL, '9s')"
NEXT = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"


def grow_old(database: Database) -> None:
    """Let a server's transactions be many more than those of one that has just been made."""
    database.execute("DO $$ BEGIN FOR n IN 1..2000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$")


async def test_a_restore_into_a_younger_server_hides_nothing(
    database: Database, tmp_path: Path, aiohttp_client: AiohttpClient
) -> None:
    """A reader goes on where it was, though transactions have smaller numbers there; twice, from the same backup."""
    grow_old(database)
    client = await aiohttp_client(make_app(Settings(database_url=database.url)))
    await opened(client)
    reader = Reader(client)
    await update(client, 1)
    backup = dump(database.url)
    await update(client, 2)  # which the backup does not have
    await reader.read_all()
    for turn in (1, 2):
        with embedded_postgres(tmp_path / str(turn)) as url:
            restore(backup, url)
            with Database(url) as younger:
                assert younger.execute(NEXT) < database.execute(NEXT)
            client = await aiohttp_client(make_app(Settings(database_url=url)))
            following = Reader(client)
            following.after = reader.after
            await update(client, 10 * turn)
            assert [change["amount"] for change in await following.page(wait=20)] == [10 * turn]
            await update(client, 10 * turn + 1)
            assert [change["amount"] for change in await following.page(wait=20)] == [10 * turn + 1]
            reader.after = following.after
            everything = Reader(client)
            await everything.read_all()
            assert [change["amount"] for change in everything.changes] == [1, 10 * turn, 10 * turn + 1]
            assert verify(url).differences == []
            await client.close()


async def test_a_copy_of_a_servers_files_that_is_just_started_hides_nothing(
    tmp_path: Path, aiohttp_client: AiohttpClient
) -> None:
    """As a snapshot of its disk is: it has the same name, and numbers its transactions from an earlier one."""
    with embedded_postgres(tmp_path / "server") as url:
        make_schema(url)
        async with committing(Settings(database_url=url)) as committer:
            with Database(url) as database:
                database.open({1: 10_000})
            assert await committer.submit(Change(1, 1)) == Applied(10_001)
    copying = await asyncio.create_subprocess_exec("cp", "-a", tmp_path / "server", tmp_path / "copy")
    assert await copying.wait() == 0
    with embedded_postgres(tmp_path / "server") as url:
        with Database(url) as database:
            grow_old(database)
        client = await aiohttp_client(make_app(Settings(database_url=url)))
        await update(client, 2)  # which the copy does not have
        reader = Reader(client)
        await reader.read_all()
        assert len(reader.changes) == 2
        await client.close()
    with embedded_postgres(tmp_path / "copy") as url:
        client = await aiohttp_client(make_app(Settings(database_url=url)))
        following = Reader(client)
        following.after = reader.after
        await update(client, 10)
        assert [change["amount"] for change in await following.page(wait=20)] == [10]
        await client.close()


@pytest.mark.slow
async def test_a_standby_gets_no_session_to_write_with(tmp_path: Path) -> None:
    """It would outlast the promotion, and give positions from before it."""
    with replicated(tmp_path, synchronous=False) as pair:
        settings = Settings(database_url=pair.standby_url)
        with pytest.raises(UnreachableError):
            await connect(settings)
        pair.promote()
        async with committing(settings) as committer:
            assert await committer.submit(Change(1, 1)) is Undecided.NO_SUCH_USER


def test_beside_others_who_write_nothing_changes(database: Database) -> None:
    """What is written while it looks is no reason to begin anew."""
    database.execute(KEEP)
    before = database.execute(OFFSET)
    insert = (
        "INSERT INTO balance_changes (user_id, amount, balance, version, idempotency_key) VALUES (%s, 0, 0, %s, %s)"
    )
    database.open({1: 0, 2: 0})
    enough = threading.Event()

    def write(user_id: int) -> None:
        with Database(database.url) as own:
            for version in itertools.count(1):
                own.execute(insert, user_id, version, str(version))
                if enough.is_set():
                    return

    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(write, user_id) for user_id in (1, 2)]
        for _ in range(150):
            with Database(database.url) as fresh:  # which has no plans yet, and so takes its time
                fresh.execute(KEEP)
        enough.set()
        for one in writing:
            one.result(timeout=20)
    assert database.execute(OFFSET) == before


def test_on_the_same_server_nothing_changes(database: Database) -> None:
    database.execute(KEEP)  # which finds a copy of another database
    before = database.execute(OFFSET)
    for _ in range(3):
        database.execute(KEEP)
    assert database.execute(OFFSET) == before


def test_no_table_of_a_callers_own_is_asked(database: Database) -> None:
    database.execute(KEEP)
    before = database.execute(OFFSET)
    database.execute("CREATE TEMP TABLE feed_server (name text)")
    database.execute("CREATE TEMP TABLE balance_changes AS SELECT 9223372036854775806 AS feed_position, 1 AS version")
    database.execute(KEEP)
    assert database.execute(OFFSET) == before


def test_positions_are_never_ahead_of_the_clock(database: Database) -> None:
    """So that who begins later begins higher."""
    clock = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
    position = "SELECT feed_offset() + pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
    ((now,),), ((given,),) = database.execute(clock), database.execute(position)
    assert now - 3_600 * 1_000_000 < given < now


@pytest.mark.parametrize("name", ["another server", "not known"])
def test_another_server_begins_above_what_the_journal_has(database: Database, name: str) -> None:
    """Whatever its clock says; one that does not tell who it is, by what the journal has alone."""
    far = 2**53
    database.open({1: 0})
    database.execute(
        "INSERT INTO balance_changes (user_id, version, amount, balance, idempotency_key, feed_position)"
        " VALUES (1, 1, 0, 0, 'k', %s)",
        far,
    )
    database.execute("UPDATE feed_server SET name = %s", name)
    database.execute(KEEP)
    database.execute(
        "INSERT INTO balance_changes (user_id, version, amount, balance, idempotency_key) VALUES (1, 2, 0, 0, 'l')"
    )
    assert database.execute("SELECT feed_position > %s FROM balance_changes WHERE version = 2", far) == [(True,)]


@pytest.mark.slow
async def test_a_fail_over_that_loses_changes_hides_none(tmp_path: Path, aiohttp_client: AiohttpClient) -> None:
    """The standby gives the numbers of the transactions that it never got to others; a reader has seen them already."""
    with replicated(tmp_path, synchronous=False) as pair:
        settings = Settings(database_url=pair.url)
        async with committing(settings) as committer:
            client = await aiohttp_client(make_app(settings))
            reader = Reader(client)
            await opened(client)
            with Database(pair.primary.url) as database:
                assert await committer.submit(Change(1, 1, "kept")) == Applied(10_001)
                database.execute("SELECT pg_switch_wal()")
            with psycopg.connect(pair.standby_url, autocommit=True) as standby:
                await until(lambda: standby.execute("SELECT version FROM users").fetchone() == (1,))
                standby.execute("ALTER SYSTEM SET primary_conninfo = ''")  # what comes now does not get there
                standby.execute("SELECT pg_reload_conf()")
                await until(lambda: not standby.execute("SELECT pid FROM pg_stat_wal_receiver").fetchone())
            for number in range(50):
                assert await committer.submit(Change(1, 1, f"lost-{number}")) == Applied(10_002 + number)
            await reader.read_all()
            assert len(reader.changes) == 51
            pair.promote()
            for number in range(3):
                assert await committer.submit(Change(1, 7, f"new-{number}")) == Applied(10_008 + 7 * number)
                assert [change["idempotencyKey"] for change in await reader.page(wait=20)] == [f"new-{number}"]


@pytest.mark.slow
async def test_a_lane_begins_anew_before_its_first_change(database: Database, tmp_path: Path) -> None:
    """Without anybody who looks at the feed."""
    grow_old(database)
    database.open({1: 10})
    last = "SELECT max(feed_position) FROM balance_changes"
    async with committing(Settings(database_url=database.url)) as committer:
        assert await committer.submit(Change(1, 1)) == Applied(11)
    ((before,),) = database.execute(last)
    with embedded_postgres(tmp_path) as url:
        restore(dump(database.url), url)
        async with committing(Settings(database_url=url)) as committer:
            assert await committer.submit(Change(1, 1)) == Applied(12)
        with Database(url) as younger:
            assert younger.execute(last)[0][0] > before


@pytest.mark.slow
def test_one_of_many_connections_begins_anew_and_the_others_find_it(tmp_path: Path) -> None:
    with killable_server(tmp_path) as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("UPDATE feed_server SET name = 'another'")
        sessions = [psycopg.connect(server.url, autocommit=True) for _ in range(20)]
        before = sessions[0].execute(OFFSET).fetchone()
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda session: session.execute(KEEP), sessions))
        found = {session.execute(OFFSET).fetchone() for session in sessions}
        assert len(found) == 1
        assert found != {before}
        for session in sessions:
            session.close()


async def test_what_is_being_written_when_they_begin_anew_comes_before(database: Database, client: Client) -> None:
    """A change whose transaction began on the old count holds up the new one, and no reader passes it."""
    database.execute(KEEP)
    database.open({1: 0, 2: 0})
    reader = Reader(client)
    with database.session(APPLY.format(user=1)) as writer, ThreadPoolExecutor(1) as pool:
        database.execute("UPDATE feed_server SET name = 'another'")
        anew = pool.submit(database.execute, KEEP)
        with Database(database.url) as observer:
            await until(lambda: observer.execute("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        assert await reader.page() == []
        writer.commit()
        anew.result(timeout=20)
    database.execute(APPLY.format(user=2))
    await reader.read_all()
    assert reader.read() == [(1, 1), (2, 1)]
