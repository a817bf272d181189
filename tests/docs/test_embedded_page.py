"""docs/embedded.md: its commands, run as pasted."""

from pathlib import Path

import pytest

from atomic_balance.postgres.embedded import embedded_postgres
from tests.client import balance, opened, session, transfer, withdraw
from tests.database import Database
from tests.docs.pasting import bash, blocks
from tests.processes import ROOT, running_service

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "embedded.md").read_text()
OLDER = sorted(Path("/usr/lib/postgresql").glob("1[4-6]/bin"))
PROVED = "2 accounts, 4 changes: every balance is what the journal says"


async def test_the_embedded_database_is_looked_into_backed_up_restored_and_moved(
    tmp_path: Path, empty_database_url: str
) -> None:
    look, back_up, restore, move = (text for language, text in blocks(PAGE) if language == "bash")
    (table,) = PAGE.split("```\n\n```\n")[1:2]
    moving, _, serving = move.rpartition("\n")[0].rpartition("\n")
    assert serving == "atomic-balance serve"
    async with running_service({}, tmp_path) as service, session() as caller:
        await opened(caller, url=service.url)
        assert [line.rstrip() for line in (await bash(look, tmp_path)).splitlines() if line] == (
            table.partition("```")[0].splitlines()
        )
        await opened(caller, 0, user_id=2, url=service.url)
        for _ in range(2):
            await withdraw(caller, service.url, "once")
        await withdraw(caller, service.url)
        assert (await transfer(caller, 1, {2: 96}, url=service.url)).status == 200
        await bash(back_up, tmp_path)
        assert PROVED in await bash(restore, tmp_path)
        await withdraw(caller, service.url)  # after the backup
    printed = await bash(moving, tmp_path, {"NEW_DATABASE_URL": empty_database_url})
    assert PROVED.replace("4", "5") in printed
    with Database(empty_database_url) as database:
        assert database.balance(1) == 10_000 - 3 * 2 - 96
    async with running_service({"DATABASE_URL": empty_database_url}, tmp_path) as service, session() as caller:
        await withdraw(caller, service.url, "once")
        assert await balance(caller, service.url) == 10_000 - 3 * 2 - 96


@pytest.mark.skipif(not OLDER, reason="no PostgreSQL before 17 is installed (apt-get install postgresql)")
async def test_a_move_to_an_older_server(tmp_path: Path) -> None:
    """It does not know all that is in the dump of a new one."""
    move = [text for language, text in blocks(PAGE) if language == "bash"][3]
    with embedded_postgres(tmp_path / "older", OLDER[0]) as url:
        moving = move.replace("atomic-balance serve\n", "")
        script = f"atomic-balance open 1 10000 > /dev/null\n{moving}atomic-balance migrate\n"
        printed = (await bash(script, tmp_path, {"NEW_DATABASE_URL": url})).splitlines()
    assert printed[-2:] == ["1 accounts, 0 changes: every balance is what the journal says", "the schema is current"]


async def test_a_schema_of_its_own_is_all_that_is_dumped_and_looked_into(database: Database, tmp_path: Path) -> None:
    environment = {"DATABASE_URL": database.url, "DATABASE_SCHEMA": "balances"}
    printed = await bash(
        "atomic-balance migrate > /dev/null; atomic-balance open 7 5 > /dev/null\n"
        "atomic-balance psql --tuples-only --no-align --command 'SELECT id, balance FROM users'\n"
        "atomic-balance pg_dump | grep -c 'CREATE TABLE public' || true\n"
        "atomic-balance pg_dump | grep -c 'CREATE TABLE balances.users'\n",
        tmp_path,
        environment,
    )
    assert printed == "7|5\n0\n1\n"


async def test_the_status_of_the_program_is_handed_on(database: Database, tmp_path: Path) -> None:
    script = "atomic-balance psql --set ON_ERROR_STOP=1 --command 'SELECT nothing' 2> /dev/null || echo $?"
    assert await bash(script, tmp_path, {"DATABASE_URL": database.url}) == "1\n"
