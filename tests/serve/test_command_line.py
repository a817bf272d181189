"""The command line: it says what it can do, and what is wrong in one line."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.database import Database
from tests.processes import bare_environment, run

COMMAND = (sys.executable, "-m", "atomic_balance")


async def test_help_names_every_command(tmp_path: Path) -> None:
    status, output = await run(*COMMAND, "--help", directory=tmp_path)
    assert status == 0
    assert [line.split()[0] for line in output.splitlines() if line.startswith("    ")] == [
        "serve",
        "migrate",
        "verify",
        "open",
        "psql",
        "pg_dump",
    ]
    assert "Exit status: 0 done; 1 failed" in output


async def test_the_version(tmp_path: Path) -> None:
    status, output = await run(*COMMAND, "--version", directory=tmp_path)
    assert (status, output.startswith("atomic-balance ")) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sevre",), "invalid choice: 'sevre'"),
        (("open", "0", "5"), "argument user_id: expected an integer from 1 to 9007199254740991"),
        (("open", "1", "much"), "argument balance: expected an integer from 0 to 9007199254740991"),
        (("open", "1", "-5"), "argument balance: expected an integer from 0 to 9007199254740991"),
    ],
)
async def test_a_wrong_argument_is_named(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    status, output = await run(*COMMAND, *arguments, directory=tmp_path)
    assert (status, said in output) == (2, True), output


@pytest.fixture
def taken_port(unused_tcp_port: int) -> Iterator[int]:
    """A port on which no service can listen, so that one that should not have come so far ends."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", unused_tcp_port))
        taken.listen()
        yield unused_tcp_port


async def test_the_port_is_taken(database_url: str, tmp_path: Path, taken_port: int) -> None:
    environment = {"DATABASE_URL": database_url, "PORT": str(taken_port)}
    status, output = await run(*COMMAND, directory=tmp_path, environment=environment)
    expected = f"atomic-balance: can't listen on 127.0.0.1:{taken_port}: Address already in use\n"
    assert (status, output) == (1, expected)


async def test_commands_on_a_database(database_url: str, tmp_path: Path) -> None:
    environment = {"DATABASE_URL": database_url}
    for arguments, expected in (
        (("migrate",), "the schema is current\n"),
        (("open", "1", "10"), "user 1 opened, balance 10\n"),
        (("open", "1", "99"), "user 1 exists already, balance 10\n"),
        (
            ("verify",),
            "money: 10 in all accounts; 10 at their openings, +0 from outside since: none was made or lost\n"
            "1 accounts, 0 changes: every balance is what the journal says\n",
        ),
    ):
        result = await run(*COMMAND, *arguments, directory=tmp_path, environment=environment)
        assert result == (0, expected)


async def test_what_is_missing_is_said_in_one_line(empty_database_url: str, tmp_path: Path, taken_port: int) -> None:
    expected = "atomic-balance: the schema is behind, without 0001-users, "
    for arguments in (("open", "1", "10"), ("serve",)):
        status, output = await run(
            *COMMAND,
            *arguments,
            directory=tmp_path,
            environment={"DATABASE_URL": empty_database_url, "PORT": str(taken_port)},
        )
        assert (status, output.startswith(expected), output.count("\n")) == (1, True, 1), output


@pytest.fixture
def stranger_url(database: Database) -> Iterator[str]:
    """The URL of the database for a role without a grant."""
    role = f"stranger_of_{database.name}"
    database.execute(f"CREATE ROLE {role} LOGIN")
    yield database.url.replace("postgres@", f"{role}@")
    database.execute(f"DROP ROLE {role}")


async def test_a_role_without_a_grant_is_told_in_one_line(stranger_url: str, tmp_path: Path, taken_port: int) -> None:
    for arguments in (("open", "1", "10"), ("serve",)):
        result = await run(
            *COMMAND,
            *arguments,
            directory=tmp_path,
            environment={"DATABASE_URL": stranger_url, "PORT": str(taken_port)},
        )
        assert result == (
            1,
            "atomic-balance: database: permission denied for table _yoyo_migration: "
            "the service's role needs the grants that README.md lists\n",
        )


async def test_a_role_that_may_not_open_accounts_is_told_in_one_line(
    database: Database, stranger_url: str, tmp_path: Path
) -> None:
    database.execute(f"GRANT SELECT ON _yoyo_migration TO stranger_of_{database.name}")
    try:
        result = await run(*COMMAND, "open", "1", "10", directory=tmp_path, environment={"DATABASE_URL": stranger_url})
    finally:
        database.execute(f"REVOKE ALL ON _yoyo_migration FROM stranger_of_{database.name}")
    assert result == (1, "atomic-balance: database: permission denied for table users\n")


@pytest.mark.parametrize(("what", "told"), [("database", 'database "nowhere"'), ("role", 'role "nobody"')])
async def test_a_database_that_refuses_the_connection_is_not_waited_for(
    database: Database, tmp_path: Path, taken_port: int, what: str, told: str
) -> None:
    urls = {
        "database": database.url.replace(f"/{database.name}?", "/nowhere?"),
        "role": database.url.replace("postgres@", "nobody@"),
    }
    status, output = await run(
        *COMMAND, directory=tmp_path, environment={"DATABASE_URL": urls[what], "PORT": str(taken_port)}
    )
    assert (status, output) == (1, f"atomic-balance: database: {told} does not exist\n")


async def test_psql_and_pg_dump_work_on_the_database_and_pass_on_arguments_and_status(
    database: Database, tmp_path: Path
) -> None:
    database.open({1: 10})
    environment = {"DATABASE_URL": database.url, "PSQLRC": "/dev/null"}
    for arguments, expected in (
        (("psql", "-At", "-c", "SELECT id, balance FROM users"), (0, "1|10\n")),
        (("psql", "-v", "ON_ERROR_STOP=1", "-qc", "SELECT 1/0"), (1, "ERROR:  division by zero\n")),
        (("psql", "--no-such-option"), (1, "")),
        (("pg_dump", "--data-only", "--table", "users", "--no-comments"), (0, "")),
        (("pg_dump", "--help"), (0, "")),
    ):
        status, output = await run(*COMMAND, *arguments, directory=tmp_path, environment=environment)
        assert (status, expected[1] in output) == (expected[0], True), output
    status, output = await run(*COMMAND, "pg_dump", directory=tmp_path, environment=environment)
    assert "COPY public.users" in output
    assert "CREATE FUNCTION public.apply_changes" in output


async def test_ctrl_c_is_for_psql_which_cancels_its_query(database: Database, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, "psql", "-X", "-At", "-c", "SELECT pg_sleep(60)"),
        cwd=tmp_path,
        env={**bare_environment(), "DATABASE_URL": database.url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    sleeping = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    async with asyncio.timeout(60):
        while not database.execute(sleeping):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        output, _ = await process.communicate()
    assert (process.returncode, output.splitlines()[-1]) == (1, b"ERROR:  canceling statement due to user request")


async def test_a_program_that_is_not_there_is_named(database_url: str, tmp_path: Path) -> None:
    environment = {"DATABASE_URL": database_url, "POSTGRES_BIN_DIR": str(tmp_path)}
    result = await run(*COMMAND, "psql", directory=tmp_path, environment=environment)
    assert result == (1, f"atomic-balance: POSTGRES_BIN_DIR: expected the program psql in {tmp_path}\n")
