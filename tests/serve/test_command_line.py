"""The command line: it says what it can do, and what is wrong in one line."""

import re
import socket
import sys
from pathlib import Path

import pytest

from tests.database import Database
from tests.processes import run

_NO_GRANT = "permission denied for table _yoyo_migration: the service's role needs the grants that README.md lists"
COMMAND = (sys.executable, "-m", "atomic_balance")


async def test_help_names_every_command(tmp_path: Path) -> None:
    status, output = await run(*COMMAND, "--help", directory=tmp_path)
    assert status == 0
    assert [line.split()[0] for line in output.splitlines() if line.startswith("    ")] == [
        "serve",
        "migrate",
        "verify",
        "open",
        "import",
        "export",
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
        (("open", "1", "10.00"), "argument balance: expected an integer from 0 to 9007199254740991"),
        (("open", "1", "-5"), "argument balance: expected an integer from 0 to 9007199254740991"),
    ],
)
async def test_a_wrong_argument_is_named(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    status, output = await run(*COMMAND, *arguments, directory=tmp_path)
    assert (status, said in output) == (2, True), output


async def test_the_port_is_taken(database_url: str, tmp_path: Path, unused_tcp_port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", unused_tcp_port))
        taken.listen()
        environment = {"DATABASE_URL": database_url, "PORT": str(unused_tcp_port)}
        status, output = await run(*COMMAND, directory=tmp_path, environment=environment)
    expected = f"atomic-balance: can't listen on 127.0.0.1:{unused_tcp_port}: Address already in use\n"
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


@pytest.mark.parametrize("command", [("open", "1", "10"), ("verify",), ("serve",)])
async def test_a_schema_that_is_not_there_is_one_line(
    empty_database_url: str, tmp_path: Path, command: tuple[str, ...]
) -> None:
    environment = {"DATABASE_URL": empty_database_url}
    status, output = await run(*COMMAND, *command, directory=tmp_path, environment=environment)
    assert status == 1
    assert re.fullmatch(r"atomic-balance: the schema is behind, without 0001-users, .*: run .* migrate\n", output)


@pytest.mark.parametrize("command", [("open", "1", "10"), ("verify",), ("serve",)])
async def test_a_role_without_a_grant_is_one_line(database: Database, tmp_path: Path, command: tuple[str, ...]) -> None:
    role = f"poor_{database.name}"
    database.execute(f"CREATE ROLE {role} LOGIN")
    try:
        url = database.url.replace("postgres@", f"{role}@")
        assert url != database.url
        status, output = await run(*COMMAND, *command, directory=tmp_path, environment={"DATABASE_URL": url})
        assert (status, output) == (1, f"atomic-balance: database: {_NO_GRANT}\n")
    finally:
        database.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize(("part", "said"), [("/{name}", "does not exist"), ("//postgres@", "nobody")])
async def test_a_database_that_will_never_do_ends_the_start(
    database: Database, tmp_path: Path, part: str, said: str
) -> None:
    """It is not waited for: its name, or the role."""
    part = part.format(name=database.name)
    assert part in database.url
    url = database.url.replace(part, part.replace("postgres@", "nobody@").replace(f"{database.name}", "no_such"))
    status, output = await run(*COMMAND, "serve", directory=tmp_path, environment={"DATABASE_URL": url})
    assert (status, said in output, len(output.splitlines())) == (1, True, 1), output
