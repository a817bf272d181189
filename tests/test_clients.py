"""Clients that misbehave, and very many of them: nobody else notices."""

import asyncio
import resource
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psycopg
import pytest

from atomic_balance.verify import verify
from tests.processes import Service, running_service

pytestmark = pytest.mark.slow

SOCKETS = 10_000
SPARE_FILES = 500


def request(user_id: int = 1, amount: int = -2) -> bytes:
    body = f'{{"userId":{user_id},"amount":{amount}}}'.encode()
    head = b"POST /api/balance/update HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def connected(service: Service) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(service.url)
    return await asyncio.open_connection(address.hostname, address.port)


async def answered(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)


async def opened(service: Service, balance: int) -> None:
    async with aiohttp.request("PUT", f"{service.url}/api/users/1", json={"balance": balance}) as answer:
        assert answer.status == 201


async def test_ten_thousand_sockets_at_once(database_url: str, tmp_path: Path) -> None:
    """All open together, then all ask: the reference race, each request on a connection of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(SOCKETS, (hard - SPARE_FILES) // 2 * 2)
    environment = {"DATABASE_URL": database_url, "DEADLINE_SECONDS": "30", "SHUTDOWN_SECONDS": "40"}
    try:
        async with running_service(environment, tmp_path) as service:
            await opened(service, count)
            sockets = await asyncio.gather(*(connected(service) for _ in range(count)))
            for _, writer in sockets:
                writer.write(request())
            answers = Counter(await asyncio.gather(*(answered(reader) for reader, _ in sockets)))
            for _, writer in sockets:
                writer.close()
            expected = {(200, b'{"userId":1,"newBalance":%d}' % left): 1 for left in range(0, count, 2)}
            assert answers == expected | {(400, b'{"error":"Insufficient funds"}'): count // 2}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_clients_that_pipeline_get_their_answers_in_order(database_url: str, tmp_path: Path) -> None:
    async with running_service({"DATABASE_URL": database_url}, tmp_path) as service:
        await opened(service, 1_000)
        reader, writer = await connected(service)
        writer.write(request() * 200)
        answers = [await answered(reader) for _ in range(200)]
        assert answers == [(200, b'{"userId":1,"newBalance":%d}' % (1_000 - 2 * n)) for n in range(1, 201)]
        writer.close()


async def test_clients_that_dawdle_or_stall(database_url: str, tmp_path: Path) -> None:
    """A byte at a time is fine; a body that does not arrive by the deadline is 408; nobody else waits for either."""
    environment = {"DATABASE_URL": database_url, "DEADLINE_SECONDS": "2", "STATEMENT_SECONDS": "1"}
    async with running_service(environment, tmp_path) as service:
        await opened(service, 1_000)
        slow = [await connected(service) for _ in range(50)]
        stalled = [await connected(service) for _ in range(50)]
        for _, writer in stalled:
            writer.write(request()[:-5])
        for byte in request():
            for _, writer in slow:
                writer.write(bytes([byte]))
            await asyncio.sleep(0.005)
        reader, writer = await connected(service)
        writer.write(request())
        async with asyncio.timeout(1):
            assert (await answered(reader))[0] == 200
        assert {(await answered(reader))[0] for reader, _ in slow} == {200}
        async with asyncio.timeout(10):
            assert {(await answered(reader))[0] for reader, _ in stalled} == {408}
        async with aiohttp.request("GET", f"{service.url}/api/users/1") as answer:
            assert (await answer.json())["balance"] == 1_000 - 2 * 51
        for _, each in (*slow, *stalled, (reader, writer)):
            each.close()


async def test_clients_that_vanish_while_they_wait(database_url: str, tmp_path: Path) -> None:
    """Their changes are applied, once, or not at all; those of others are not disturbed."""
    async with running_service({"DATABASE_URL": database_url}, tmp_path) as service:
        await opened(service, 10_000)
        with psycopg.connect(database_url) as blocker:
            blocker.execute("UPDATE users SET balance = balance WHERE id = 1")
            vanishing = [await connected(service) for _ in range(300)]
            staying = [await connected(service) for _ in range(300)]
            for (_, one), (_, other) in zip(vanishing, staying, strict=True):
                one.write(request())
                other.write(request())
            await asyncio.sleep(0.5)
            for _, writer in vanishing:
                writer.transport.abort()
            await asyncio.sleep(0.2)
            blocker.rollback()
        assert {(await answered(reader))[0] for reader, _ in staying} == {200}
        for _, writer in staying:
            writer.close()
        async with aiohttp.request("GET", f"{service.url}/api/users/1") as answer:
            account = await answer.json()
        assert 300 <= account["version"] <= 600
        assert account["balance"] == 10_000 - 2 * account["version"]
        assert "Traceback" not in "".join(service.log)
    assert verify(database_url).differences == []
