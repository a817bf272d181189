"""The command line: it says what it can do, and what is wrong in one line."""

import socket
import sys
from pathlib import Path

import pytest

from tests.processes import run

COMMAND = (sys.executable, "-m", "atomic_balance")


async def test_help_names_every_command(tmp_path: Path) -> None:
    status, output = await run(*COMMAND, "--help", directory=tmp_path)
    assert status == 0
    assert [line.split()[0] for line in output.splitlines() if line.startswith("    ")] == [
        "serve",
        "migrate",
        "verify",
        "open",
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
        (("open", "1", "much"), "argument balance: expected an integer from minimumBalance"),
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
