"""Migrations: applied, rolled back and applied again, by our command, by yoyo's own, and by several at once."""

import asyncio
import os
import re
import sys
from pathlib import Path

import psycopg
import pytest

from atomic_balance.postgres.embedded.programs import find_programs
from atomic_balance.postgres.migrations import migrate, migrations_dir, missing_migrations
from tests.processes import ROOT, run
from tests.schema import make_schema

ALL = missing_migrations([])


def columns(url: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(
            "SELECT table_name, column_name, data_type FROM information_schema.columns"
            " WHERE table_schema = 'public' AND table_name !~ 'yoyo' ORDER BY 1, 2"
        ).fetchall()


def psycopg_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


async def test_migrations_apply_roll_back_and_apply_again(empty_database_url: str) -> None:
    environment = {"DATABASE_URL": psycopg_url(empty_database_url)}
    yoyo = str(Path(sys.executable).with_name("yoyo"))
    assert migrate(empty_database_url) == ALL
    schema = columns(empty_database_url)
    status, output = await run(yoyo, "rollback", "--all", directory=ROOT, environment=environment)
    assert status == 0, output
    assert columns(empty_database_url) == []
    status, output = await run(yoyo, "apply", directory=ROOT, environment=environment)
    assert status == 0, output
    assert columns(empty_database_url) == schema
    assert migrate(psycopg_url(empty_database_url)) == []


async def test_migrating_prints_nothing_of_what_the_statements_give(
    empty_database_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(make_schema(empty_database_url)) > len(ALL)
    assert capfd.readouterr() == ("", "")


def test_every_migration_has_a_rollback() -> None:
    assert [name for name in ALL if not (migrations_dir() / f"{name}.rollback.sql").is_file()] == []


async def test_several_processes_migrate_at_once(empty_database_url: str) -> None:
    results = await asyncio.gather(*(asyncio.to_thread(migrate, empty_database_url) for _ in range(5)))
    assert sorted(results) == [[], [], [], [], ALL]


async def test_a_lock_that_a_killed_migration_left_is_broken(empty_database_url: str) -> None:
    migrate(empty_database_url)
    with psycopg.connect(empty_database_url) as connection:
        connection.execute("INSERT INTO yoyo_lock (locked, ctime, pid) VALUES (1, now(), 1)")
        connection.execute("DELETE FROM _yoyo_migration")
        connection.execute("DROP TABLE users, balance_changes, open_holds, expiry_turn, feed_server")
        connection.execute("DROP FUNCTION apply_changes, apply_transfers, read_feed, read_feed_head")
        connection.execute("DROP FUNCTION keep_feed_ascending, feed_offset, feed_server_name")
    assert migrate(empty_database_url) == ALL


async def test_accounts_from_before_the_journal_open_with_what_they_hold(empty_database_url: str) -> None:
    environment = {"DATABASE_URL": psycopg_url(empty_database_url)}
    yoyo = str(Path(sys.executable).with_name("yoyo"))
    first = await run(yoyo, "apply", "--revision", "0001-users", directory=ROOT, environment=environment)
    assert first[0] == 0, first
    with psycopg.connect(empty_database_url) as connection:
        connection.execute("INSERT INTO users (id, balance, opening_balance) VALUES (1, 7, 10), (2, 0, 0)")
    assert migrate(empty_database_url) == [name for name in ALL if name > "0001-users"]
    with psycopg.connect(empty_database_url) as connection:
        rows = connection.execute("SELECT id, balance, opening_balance, version FROM users ORDER BY id").fetchall()
    assert rows == [(1, 7, 7, 0), (2, 0, 0, 0)]


@pytest.mark.parametrize("command", ["migrate", "serve", "open"])
async def test_a_database_with_another_encoding_is_refused(
    command: str, latin1_database_url: str, tmp_path: Path
) -> None:
    arguments = (command, "1", "10") if command == "open" else (command,)
    environment = {"DATABASE_URL": latin1_database_url, "PORT": "0"}
    result = await run(sys.executable, "-m", "atomic_balance", *arguments, directory=tmp_path, environment=environment)
    assert result == (1, "atomic-balance: database: its encoding is LATIN1, expected UTF8\n")
    assert columns(latin1_database_url) == []


async def test_a_service_that_finds_the_schema_behind_says_what_to_run(empty_database_url: str, tmp_path: Path) -> None:
    command = sys.executable, "-m", "atomic_balance"
    environment = {"DATABASE_URL": empty_database_url, "PORT": "0"}
    status, output = await run(*command, directory=tmp_path, environment=environment)
    assert (status, len(output.splitlines())) == (1, 1)
    assert "0001-users" in output
    assert output.endswith("run python -m atomic_balance migrate\n")
    assert await run(*command, "migrate", directory=tmp_path, environment=environment) == (
        0,
        "".join(f"applied {name}\n" for name in ALL),
    )
    assert (await run(*command, "migrate", directory=tmp_path, environment=environment))[0] == 0


async def test_behind_a_transaction_it_gives_up_and_can_be_repeated(empty_database_url: str) -> None:
    environment = {"DATABASE_URL": psycopg_url(empty_database_url)}
    yoyo = str(Path(sys.executable).with_name("yoyo"))
    before = await run(yoyo, "apply", "--revision", "0002-journal", directory=ROOT, environment=environment)
    assert before[0] == 0, before
    schema = columns(empty_database_url)
    with psycopg.connect(empty_database_url) as holder:
        holder.execute("SELECT FROM users")
        with pytest.raises(TimeoutError, match="a transaction holds its table; migrate again"):
            migrate(empty_database_url)
    assert columns(empty_database_url) == schema
    assert migrate(empty_database_url) == [name for name in ALL if name > "0002-journal"]


def valid_indexes(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE indisvalid"
        ).fetchall()
    return {name for (name,) in rows}


async def test_an_index_whose_making_was_interrupted_is_made_anew(empty_database_url: str) -> None:
    url = empty_database_url
    environment = {"DATABASE_URL": psycopg_url(url)}
    yoyo = str(Path(sys.executable).with_name("yoyo"))
    before = await run(yoyo, "apply", "--revision", "0007-feed", directory=ROOT, environment=environment)
    assert before[0] == 0, before
    with psycopg.connect(url) as holder:
        holder.execute("LOCK TABLE balance_changes IN ROW EXCLUSIVE MODE")
        with psycopg.connect(url, autocommit=True) as interrupted:
            interrupted.execute("SET lock_timeout = '100ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                interrupted.execute("CREATE INDEX CONCURRENTLY balance_changes_feed ON balance_changes (feed_position)")
    assert "balance_changes_feed" not in valid_indexes(url)
    assert migrate(url) == ALL[ALL.index("0008-feed-index") :]
    assert {"balance_changes_feed", "balance_changes_before_feed"} <= valid_indexes(url)


async def test_the_feed_of_a_partitioned_journal_gets_its_indexes_as_the_page_says(
    empty_database_url: str,
) -> None:
    url = empty_database_url
    environment = {"DATABASE_URL": psycopg_url(url)}
    page = (ROOT / "docs" / "scaling.md").read_text()
    yoyo = str(Path(sys.executable).with_name("yoyo"))
    before = await run(yoyo, "apply", "--revision", "0005-transfers", directory=ROOT, environment=environment)
    assert before[0] == 0, before
    (partition,) = re.findall(r"```sql\n(BEGIN;\n.*?)```", page, re.DOTALL)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(partition.encode())
    with pytest.raises(psycopg.errors.RaiseException, match=r"docs/scaling\.md"):
        migrate(url)
    (recipe,) = re.findall(r"```bash\n(psql [^`]*yoyo mark[^`]*)```", page)
    programs = f"{find_programs(None)}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    recipe = recipe.replace('psql "$DATABASE_URL"', f'psql --no-psqlrc --set ON_ERROR_STOP=1 "{url}"')
    command = ("bash", "-euo", "pipefail", "-c", recipe)
    status, output = await run(*command, directory=ROOT, environment={**environment, "PATH": programs})
    assert status == 0, output
    assert migrate(url) == ALL[ALL.index("0009-own-schema") :]
    assert {"balance_changes_feed", "balance_changes_before_feed", "balance_changes_7_feed"} <= valid_indexes(url)
