"""What is promised when processes are killed: the database's and the service's own, in the middle of the race."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from atomic_balance.postgres.verify import verify
from tests.client import APPLIED, REFUSED, opened, persistently, session, withdraw
from tests.fault_proxy import FaultProxy
from tests.killable import KillableServer, killable_server
from tests.processes import running_service

pytestmark = pytest.mark.slow

RACE = 10_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[KillableServer]:
    """A PostgreSQL server to be killed."""
    with killable_server(tmp_path / "data") as running:
        yield running


def applied_in_journal(url: str) -> tuple[int, int]:
    """The balance, and how many changes the journal says were applied."""
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT balance, (SELECT count(*) FROM balance_changes WHERE user_id = 1 AND version IS NOT NULL)"
            "  FROM users WHERE id = 1"
        ).fetchone()
    assert row
    return row[0], row[1]


@pytest.mark.over_both_statements
async def test_the_database_dies_in_the_middle_of_the_race(server: KillableServer, tmp_path: Path) -> None:
    """Without a single retry by a client: 5,000 and 5,000, as long as an outage is shorter than the deadline."""
    async with (
        running_service({"DATABASE_URL": server.url, "DEADLINE_SECONDS": "15"}, tmp_path) as service,
        session() as client,
    ):
        await opened(client, url=service.url)
        race = asyncio.gather(*(withdraw(client, service.url) for _ in range(RACE)))
        deaths = 0
        while deaths < 4:
            await asyncio.sleep(0.15)
            assert not race.done(), f"the race was over after {deaths} deaths"
            if deaths % 2:
                await server.kill_backend()
            else:
                server.kill()
                server.start()
            deaths += 1
        assert Counter(await race) == {APPLIED: 5_000, REFUSED: 5_000}
    assert applied_in_journal(server.url) == (0, 5_000)
    assert verify(server.url).differences == []


async def test_an_outage_longer_than_the_deadline(server: KillableServer, tmp_path: Path) -> None:
    """503 says that this request changed nothing; 504 is unknown, and settled by asking again with the key."""
    environment = {"DATABASE_URL": server.url, "DEADLINE_SECONDS": "1", "STATEMENT_SECONDS": "0.5"}
    async with running_service(environment, tmp_path) as service, session() as client:
        await opened(client, url=service.url)
        keys = [f"k{number}" for number in range(4_000)]
        asked = [asyncio.create_task(withdraw(client, service.url, key)) for key in keys]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        server.kill()
        answers = dict(zip(keys, await asyncio.gather(*asked), strict=True))
        server.start()
        statuses = Counter(status for status, _ in answers.values())
        assert set(statuses) <= {200, 503, 504}
        assert statuses[200]
        assert statuses[503]
        with psycopg.connect(server.url) as connection:
            rows = connection.execute("SELECT idempotency_key FROM balance_changes WHERE user_id = 1").fetchall()
        applied = {key for (key,) in rows}
        assert {key for key, (status, _) in answers.items() if status == 200} <= applied
        assert not {key for key, (status, _) in answers.items() if status == 503} & applied
        outcomes = await asyncio.gather(*(persistently(client, [service.url], key, again=(503, 504)) for key in keys))
        assert set(outcomes) == {APPLIED}
    assert applied_in_journal(server.url) == (RACE - 8_000, 4_000)


@pytest.mark.over_both_statements
async def test_the_service_dies_in_the_middle_of_the_race(server: KillableServer, tmp_path: Path) -> None:
    """Callers ask again, with their keys, a second service and the first one restarted: each withdrawal counts once."""
    environment = {"DATABASE_URL": server.url}
    async with running_service(environment, tmp_path) as other, session() as client:
        async with running_service(environment, tmp_path) as service:
            await opened(client, url=service.url)
            urls = [service.url, other.url]
            keys = [f"k{number}" for number in range(RACE)]
            race = asyncio.gather(*(persistently(client, urls, key, again=(503, 504)) for key in keys))
            await asyncio.sleep(0.4)
            assert not race.done()
            service.process.send_signal(signal.SIGKILL)
            await service.process.wait()
        port = service.url.rsplit(":", 1)[1]
        async with running_service({**environment, "PORT": port}, tmp_path):
            assert Counter(await race) == {APPLIED: 5_000, REFUSED: 5_000}
    assert applied_in_journal(server.url) == (0, 5_000)
    assert verify(server.url).differences == []


async def test_stopping_answers_what_was_accepted(database_url: str, tmp_path: Path) -> None:
    """SIGTERM: readiness turns red while requests are still accepted; then all of them are answered, and exit 0."""
    environment = {"DATABASE_URL": database_url, "DRAIN_SECONDS": "1"}
    async with running_service(environment, tmp_path) as service, session(connections_max=0) as client:
        await opened(client, url=service.url)
        with psycopg.connect(database_url) as blocker:
            blocker.execute("UPDATE users SET balance = balance WHERE id = 1")
            waiting = [asyncio.create_task(withdraw(client, service.url)) for _ in range(100)]
            await asyncio.sleep(0.3)
            service.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(1):
                while True:
                    async with aiohttp.request("GET", f"{service.url}/readyz") as answer:
                        if answer.status == 503:
                            assert (await answer.json())["checks"]["stopping"] == "yes"
                            break
            late = asyncio.create_task(withdraw(client, service.url))
            await asyncio.sleep(1.5)
            async with session() as too_late:
                with pytest.raises(aiohttp.ClientConnectionError):
                    await withdraw(too_late, service.url)
            blocker.rollback()
        assert set(await asyncio.gather(*waiting, late)) == {APPLIED}
        assert await service.process.wait() == 0
    assert applied_in_journal(database_url) == (RACE - 202, 101)


async def test_stopping_ends_by_its_deadline(database_url: str, tmp_path: Path) -> None:
    """A change that is blocked for good is answered 503 at its deadline, and does not keep the service from ending."""
    environment = {"DATABASE_URL": database_url, "DEADLINE_SECONDS": "1", "STATEMENT_SECONDS": "0.5"}
    async with running_service(environment, tmp_path) as service, session() as client:
        await opened(client, url=service.url)
        with psycopg.connect(database_url) as blocker:
            blocker.execute("UPDATE users SET balance = balance WHERE id = 1")
            waiting = asyncio.create_task(withdraw(client, service.url))
            await asyncio.sleep(0.2)
            started = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            assert (await waiting)[0] == 503
            assert await service.process.wait() == 0
            assert time.monotonic() - started < 10
    assert applied_in_journal(database_url) == (RACE, 0)


async def test_stopping_does_not_wait_for_connections_that_are_half_open(database_url: str, tmp_path: Path) -> None:
    socket = Path(str(conninfo_to_dict(database_url)["host"])) / ".s.PGSQL.5432"
    async with FaultProxy(socket).running() as proxy, session() as client:
        name = conninfo_to_dict(database_url)["dbname"]
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{name}?sslmode=disable"
        async with running_service({"DATABASE_URL": url}, tmp_path) as service:
            await opened(client, url=service.url)
            assert await withdraw(client, service.url) == APPLIED
            for link in proxy.links:
                link.swallow()
            service.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                assert await service.process.wait() == 0
