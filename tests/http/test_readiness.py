"""Readiness means "send me changes": red when they would be turned away, and not before."""

import asyncio
import json

import pytest
from msgspec import structs
from pytest_aiohttp import AiohttpClient

from atomic_balance.http.app import make_app
from atomic_balance.settings import Settings
from tests.client import UPDATE, Client, update
from tests.database import Database, until
from tests.fault_proxy import Link

DEADLINE_SECONDS = 3.0


@pytest.fixture
def database(database: Database) -> Database:
    """With an account."""
    database.open({1: 10})
    return database


def impatient(url: str) -> Settings:
    return Settings(database_url=url, deadline_seconds=DEADLINE_SECONDS, statement_seconds=0.5)


async def readiness(client: Client) -> tuple[int, dict[str, str]]:
    async with client.get("/readyz") as answer:
        return answer.status, json.loads(await answer.read())["checks"]


async def status_of_a_change(client: Client) -> int:
    return (await update(client, 1))[0]


async def becomes(client: Client, wanted: int) -> dict[str, str]:
    """Ask until readiness is `wanted`; gives its checks."""
    async with asyncio.timeout(20):
        while True:
            status, checks = await readiness(client)
            if status == wanted:
                return checks
            await asyncio.sleep(0.05)


async def test_a_short_outage_is_no_reason_to_send_changes_elsewhere(
    aiohttp_client: AiohttpClient, database: Database
) -> None:
    async with database.proxied() as (proxy, url):
        client = await aiohttp_client(make_app(structs.replace(impatient(url), deadline_seconds=20)))
        assert (await readiness(client))[0] == 200
        proxy.greet = Link.cut
        proxy.cut()
        change = asyncio.create_task(status_of_a_change(client))
        for _ in range(5):
            status, checks = await readiness(client)
            assert status == 200
            assert checks["database"].startswith("has not answered for ")
        proxy.greet = None
        assert await change == 200
        assert set((await readiness(client))[1].values()) == {"ok"}


@pytest.mark.parametrize("fault", [Link.cut, Link.swallow])
async def test_a_database_that_stays_away_turns_readiness_red_until_it_is_back(
    aiohttp_client: AiohttpClient, database: Database, fault: object
) -> None:
    """With no change to be carried too: who asks for readiness is who finds out."""
    async with database.proxied() as (proxy, url):
        client = await aiohttp_client(make_app(impatient(url)))
        assert (await readiness(client))[0] == 200
        proxy.greet = fault  # type: ignore[assignment]
        proxy.cut()
        began = asyncio.get_running_loop().time()
        checks = await becomes(client, 503)
        assert asyncio.get_running_loop().time() - began >= DEADLINE_SECONDS
        assert (checks["schema"], checks["commits"]) == ("ok", "ok")
        proxy.greet = None
        proxy.cut()
        assert set((await becomes(client, 200)).values()) == {"ok"}


async def test_a_server_that_cannot_write_turns_readiness_red_until_a_change_is_committed(
    aiohttp_client: AiohttpClient, database: Database
) -> None:
    """As a full disk does: reads are answered, and nothing can be committed."""
    database.fail("true", "53100")
    client = await aiohttp_client(make_app(impatient(database.url)))
    asked = [asyncio.create_task(status_of_a_change(client)) for _ in range(3)]
    while (await readiness(client))[0] == 200:
        asked.append(asyncio.create_task(status_of_a_change(client)))
        await asyncio.sleep(0.1)
    status, checks = await readiness(client)
    assert (status, checks["database"], checks["schema"]) == (503, "ok", "ok")
    assert checks["commits"].startswith("none has succeeded for ")
    database.heal()
    await becomes(client, 200)
    assert set(await asyncio.gather(*asked)) <= {200, 503}
    assert await status_of_a_change(client) == 200


async def test_without_changes_a_server_that_could_not_write_is_tried_again(
    aiohttp_client: AiohttpClient, database: Database
) -> None:
    """A process that is sent nothing because it is red could never find out that the disk has room again."""
    database.fail("true", "53100")
    client = await aiohttp_client(make_app(structs.replace(impatient(database.url), deadline_seconds=1)))
    while (await readiness(client))[0] == 200:
        await asyncio.gather(*(status_of_a_change(client) for _ in range(2)))
    assert set((await becomes(client, 200)).values()) == {"ok"}


async def test_a_change_at_fault_and_a_blocked_row_leave_readiness_green(
    aiohttp_client: AiohttpClient, database: Database
) -> None:
    database.open({2: 10})
    database.fail("NEW.user_id = 2", "P0001")
    client = await aiohttp_client(make_app(structs.replace(impatient(database.url), deadline_seconds=1)))
    with database.holding(1):
        for _ in range(3):
            async with client.post(UPDATE, json={"userId": 2, "amount": 1}) as answer:
                assert answer.status == 500
            assert await status_of_a_change(client) == 503
            assert (await readiness(client))[0] == 200


async def test_who_asks_does_not_wait_for_a_database_that_is_mute(
    aiohttp_client: AiohttpClient, database: Database
) -> None:
    async with database.proxied() as (proxy, url):
        client = await aiohttp_client(make_app(Settings(database_url=url, statement_seconds=9, connect_seconds=9)))
        assert (await readiness(client))[0] == 200
        await until(lambda: proxy.links)
        proxy.greet = Link.swallow
        for link in proxy.links:
            link.swallow()
        async with asyncio.timeout(5):
            status, checks = await readiness(client)
        assert status == 200
        assert checks["database"] != "ok"
