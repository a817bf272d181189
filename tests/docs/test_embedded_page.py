"""docs/embedded.md: its commands work as pasted, with a service running or not, and lose nothing."""

import re
import sys
from pathlib import Path

import psycopg
import pytest

from atomic_balance.postgres.embedded import embedded_postgres
from tests.client import session, update
from tests.docs.pasting import bash, blocks
from tests.processes import ROOT, run, running_service

PAGE = (ROOT / "docs" / "embedded.md").read_text()
LOOK, BACK_UP, RESTORE, DUMP, MOVE = [code for language, code in blocks(PAGE) if language == "bash"]
LOOKED, RESTORED, MOVED = [code for language, code in blocks(PAGE) if language == "text"]
ELSEWHERE = "postgresql://user:password@localhost:5432/balances"
# Of a major version before the one that is embedded, where a system has one.
OLDER = sorted(Path("/usr/lib/postgresql").glob("1[4-7]/bin"))

pytestmark = pytest.mark.slow


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory where the service was installed."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def stripped(text: str) -> str:
    """`text` without the space at the ends of its lines, which psql fills up, and the empty line after a table."""
    return re.sub(r" +$", "", text, flags=re.MULTILINE).strip()


async def test_the_commands_work_as_pasted_and_print_what_the_page_says(
    directory: Path, empty_database_url: str
) -> None:
    assert stripped(await bash(LOOK + BACK_UP, directory)) == stripped(LOOKED)
    assert await bash(RESTORE, directory) == RESTORED
    printed = await bash(DUMP + MOVE.replace(ELSEWHERE, f"'{empty_database_url}'"), directory)
    assert printed == MOVED
    with psycopg.connect(empty_database_url) as elsewhere:
        assert elsewhere.execute("SELECT id, balance FROM users").fetchall() == [(1, 10_000)]


async def test_a_restore_takes_back_what_came_after_the_backup_and_a_move_takes_all(
    directory: Path, empty_database_url: str
) -> None:
    """With changes, keys and a hold; backed up while a service runs."""
    async with running_service({}, directory) as service, session() as caller:
        await bash(LOOK, directory)
        assert (await update(caller, 1, url=service.url, headers={"Idempotency-Key": "first"}))[0] == 200
        hold = f"{service.url}/api/users/1/holds/order-1"
        async with caller.put(hold, json={"amount": 500}) as answer:
            assert answer.status == 201
        await bash(BACK_UP, directory)
        assert (await update(caller, 1, url=service.url, headers={"Idempotency-Key": "second"}))[0] == 200
    await bash(RESTORE, directory)
    await bash(DUMP + MOVE.replace(ELSEWHERE, f"'{empty_database_url}'"), directory)
    for environment in ({}, {"DATABASE_URL": empty_database_url}):
        async with running_service(environment, directory) as service, session() as caller:
            async with caller.get(f"{service.url}/api/users/1") as answer:
                account = await answer.json()
            assert (account["balance"], account["held"], account["version"]) == (10_001, 500, 2)
            for key, replayed in (("first", "true"), ("second", None)):
                async with caller.post(
                    f"{service.url}/api/balance/update",
                    json={"userId": 1, "amount": 1},
                    headers={"Idempotency-Key": key},
                ) as answer:
                    assert (answer.status, answer.headers.get("Idempotent-Replayed")) == (200, replayed)
            async with caller.post(f"{service.url}/api/users/1/holds/order-1/capture") as answer:
                assert (await answer.json())["newBalance"] == 9_502


async def test_a_restore_that_fails_changes_nothing(directory: Path) -> None:
    await bash(LOOK + BACK_UP, directory)
    with (directory / "backup.sql").open("a") as backup:
        backup.write("SELECT 1/0;\n")
    status, output = await run("bash", "-ec", RESTORE, directory=directory)
    assert (status, "division by zero" in output) == (3, True), output
    status, output = await run(".venv/bin/atomic-balance", "verify", directory=directory)
    assert (status, output) == (0, RESTORED)


@pytest.mark.skipif(not OLDER, reason="no older PostgreSQL is installed (apt-get install postgresql-15)")
async def test_a_move_to_an_older_server(directory: Path) -> None:
    await bash(LOOK + DUMP, directory)
    with embedded_postgres(directory / "older", OLDER[0]) as url:
        assert await bash(MOVE.replace(ELSEWHERE, f"'{url}'"), directory) == MOVED
        status, output = await run(
            ".venv/bin/atomic-balance", "migrate", directory=directory, environment={"DATABASE_URL": url}
        )
        assert (status, output) == (0, "the schema is current\n")


async def test_another_program_connects_as_the_page_says(directory: Path) -> None:
    (shown,) = re.findall(r'psql "(postgresql:[^"]+)"', PAGE)
    async with (
        running_service({}, directory),
        await psycopg.AsyncConnection.connect(shown.replace("$PWD", str(directory))) as connection,
    ):
        assert connection.info.dbname == "postgres"
