"""Clients that misbehave, and very many of them: nobody else notices."""

import asyncio
import itertools
import json
import resource
import socket
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil
import psycopg
import pytest

from atomic_balance.http import live
from atomic_balance.observe.counting import Numbers
from atomic_balance.postgres.verify import verify
from tests.client import Client
from tests.database import Database
from tests.processes import Service, running_service

pytestmark = pytest.mark.slow

SOCKETS = 10_000
SPARE_FILES = 500
LIVE = b"GET /live/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def request(user_id: int = 1, amount: int = -2) -> bytes:
    body = f'{{"userId":{user_id},"amount":{amount}}}'.encode()
    head = b"POST /api/balance/update HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def connected(service: Service) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(service.url)
    return await asyncio.open_connection(address.hostname, address.port)


async def answered(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)


async def test_ten_thousand_sockets_at_once(database: Database, tmp_path: Path) -> None:
    """All open together, then all ask: the reference race, each request on a connection of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(SOCKETS, (hard - SPARE_FILES) // 2 * 2)
    environment = {"DATABASE_URL": database.url, "DEADLINE_SECONDS": "30", "SHUTDOWN_SECONDS": "40"}
    try:
        async with running_service(environment, tmp_path) as service:
            database.open({1: count})
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


async def test_clients_that_pipeline_get_their_answers_in_order(database: Database, tmp_path: Path) -> None:
    async with running_service({"DATABASE_URL": database.url}, tmp_path) as service:
        database.open({1: 1_000})
        reader, writer = await connected(service)
        writer.write(request() * 200)
        answers = [await answered(reader) for _ in range(200)]
        assert answers == [(200, b'{"userId":1,"newBalance":%d}' % (1_000 - 2 * n)) for n in range(1, 201)]
        writer.close()


async def test_clients_that_dawdle_or_stall(database: Database, tmp_path: Path) -> None:
    """A byte at a time is fine; a body that does not arrive by the deadline is 408; nobody else waits for either."""
    environment = {"DATABASE_URL": database.url, "DEADLINE_SECONDS": "2", "STATEMENT_SECONDS": "1"}
    async with running_service(environment, tmp_path) as service:
        database.open({1: 1_000})
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


async def test_clients_that_vanish_while_they_wait(database: Database, tmp_path: Path) -> None:
    """Their changes are applied, once, or not at all; those of others are not disturbed."""
    async with running_service({"DATABASE_URL": database.url}, tmp_path) as service:
        database.open({1: 10_000})
        with psycopg.connect(database.url) as blocker:
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
    assert verify(database.url).differences == []


async def test_bodies_that_are_under_way_share_a_room(database: Database, tmp_path: Path) -> None:
    """What finds none is 503 before more of it is read; lone updates need none; what has ended gives it back."""
    last = b'{"updates":[{"userId":1,"amount":-2}]}'
    head = b"POST /api/balance/updates HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    first = head + b"Content-Length: 4000000\r\n\r\n" + b" " * (4_000_000 - len(last))
    async with running_service({"DATABASE_URL": database.url, "BODIES_BYTES_MAX": str(2**23)}, tmp_path) as service:
        database.open({1: 1_000})
        for left in (1_000, 994):
            connections = [await connected(service) for _ in range(6)]
            answers = {asyncio.create_task(answered(reader)): writer for reader, writer in connections}
            for writer in answers.values():
                writer.write(first)
            turned_away = [await each for each in itertools.islice(asyncio.as_completed(answers), 4)]
            assert turned_away == [(503, b'{"error":"Service unavailable: try again"}')] * 4
            reader, writer = await connected(service)
            for part in (request()[:-5], request()[-5:]):
                writer.write(part)
                await asyncio.sleep(0.1)
            assert (await answered(reader))[0] == 200
            holding = {task: writer for task, writer in answers.items() if not task.done()}
            for each in holding.values():
                each.write(last)
            assert {await task for task in holding} == {
                (200, b'{"results":[{"status":200,"userId":1,"newBalance":%d}]}' % (left - taken)) for taken in (4, 6)
            }
            for each in (*answers.values(), writer):
                each.close()


async def test_connections_that_say_nothing_or_take_nothing_are_closed(database: Database, tmp_path: Path) -> None:
    """After IDLE_SECONDS; one whose change waits for longer than that gets its answer."""
    journal = b"GET /api/users/1/changes?limit=1000 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    patience = {"IDLE_SECONDS": "1", "DEADLINE_SECONDS": "30", "SHUTDOWN_SECONDS": "40"}
    async with running_service({"DATABASE_URL": database.url, **patience}, tmp_path) as service:
        database.open({1: 10_000})
        async with aiohttp.ClientSession() as client:
            many = {"updates": [{"userId": 1, "amount": 1, "reference": "r" * 255}] * 1_000}
            async with client.post(f"{service.url}/api/balance/updates", json=many) as answer:
                assert answer.status == 200
        silent, half, idle, half_again, busy = [await connected(service) for _ in range(5)]
        half[1].write(request()[:40])
        idle[1].write(request())
        half_again[1].write(request() + request()[:40])
        address = urlsplit(service.url)
        with (
            socket.create_connection((address.hostname, address.port)) as deaf,
            psycopg.connect(database.url) as blocker,
        ):
            deaf.sendall(journal * 50)
            await answered(idle[0])
            await answered(half_again[0])
            blocker.execute("UPDATE users SET balance = balance WHERE id = 1")
            busy[1].write(request())
            async with asyncio.timeout(20):
                for reader, _ in (silent, half, idle, half_again):
                    assert await reader.read() == b""
                while deaf.getsockname()[1] in peers(service):  # noqa: ASYNC110 - who reads nothing sees no end
                    await asyncio.sleep(0.05)
        assert (await answered(busy[0]))[0] == 200
        for _, writer in (silent, half, idle, half_again, busy):
            writer.transport.abort()


def peers(service: Service) -> set[int]:
    """The ports of those who are connected to the service."""
    connections = psutil.Process(service.process.pid).net_connections("tcp")
    return {connection.raddr.port for connection in connections if connection.raddr}


@pytest.mark.parametrize("level", ["info", "debug"])
async def test_clients_that_go_away_are_no_error(database: Database, tmp_path: Path, level: str) -> None:
    async with running_service({"DATABASE_URL": database.url, "LOG_LEVEL": level}, tmp_path) as service:
        database.open({1: 10})
        bodies = [await connected(service) for _ in range(100)]
        pages = [await connected(service) for _ in range(100)]
        for _, writer in bodies:
            writer.write(request()[:-5])
        for reader, writer in pages:
            writer.write(LIVE)
            await reader.readuntil(b"\r\n\r\n")
        for _, writer in (*bodies, *pages):
            writer.transport.abort()
        reader, writer = await connected(service)
        writer.write(LIVE)
        for _ in range(3):  # by then a page that has gone was written to
            await reader.readuntil(b"\n\n")
        writer.close()
        lines = [json.loads(line) for line in service.log]
        assert {line["level"] for line in lines} <= {"info", "debug"}
        assert len(lines) < (10 if level == "info" else 300)


async def test_one_snapshot_a_second_serves_all_live_pages(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[live.Snapshot] = []

    def snapshot(period: Numbers, waiting: float) -> live.Snapshot:
        made.append(live.Snapshot(len(made), period.replays, None, None, None, waiting))
        return made[-1]

    monkeypatch.setattr(live, "_snapshot", snapshot)
    pages = [await client.get("/live/events") for _ in range(50)]
    events = [await page.content.readuntil(b"\n\n") for _ in range(2) for page in pages]
    assert len(events) == 100
    assert len(made) < 50
    for page in pages:
        page.close()


async def test_there_is_a_limit_of_live_pages(database_url: str, tmp_path: Path) -> None:
    """Beyond it the answer is 503, until one has gone; HEAD is answered without a stream."""
    async with running_service({"DATABASE_URL": database_url}, tmp_path) as service:
        pages = [await connected(service) for _ in range(live.FOLLOWERS_MAX)]
        for reader, writer in pages:
            writer.write(LIVE)
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        reader, writer = await connected(service)
        writer.write(LIVE.replace(b"GET", b"HEAD") + LIVE)
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        assert (await answered(reader))[0] == 503
        pages[0][1].transport.abort()
        status = 503
        async with asyncio.timeout(10):
            while status == 503:
                writer.write(LIVE)
                head = await reader.readuntil(b"\r\n\r\n")
                status = int(head.split(b" ", 2)[1])
                if status == 503:
                    await reader.readuntil(b"}")
                    await asyncio.sleep(0.1)
        assert b'data: {"appliedPerSecond":0.0,' in await reader.readuntil(b"\n\n")
        for _, each in pages:
            each.transport.abort()
        writer.close()
