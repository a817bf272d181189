"""What is no server, or says nonsense, can't be reached, whatever that makes asyncpg raise."""

import asyncio
import itertools
import random
from collections import Counter

import asyncpg
import pytest

from atomic_balance.postgres.accounts import Accounts
from atomic_balance.postgres.connections import connection_pool, open_connection
from atomic_balance.postgres.failures import UnreachableError
from atomic_balance.settings import Settings
from tests.database import Database

GREETINGS = 160
AT_ONCE = 10
PATIENCE_SECONDS = 20


async def test_a_server_that_greets_with_nonsense_cannot_be_reached(database_url: str) -> None:
    """One wrong byte in its greeting, each time another one."""
    outcomes: Counter[str] = Counter()
    with Database(database_url) as database:
        async with database.proxied() as (proxy, url):
            settings = Settings(database_url=url, connect_seconds=0.5)
            seeds = itertools.count()
            proxy.greet = lambda link: link.corrupt_answers(random.Random(next(seeds)))

            async def greet() -> None:
                try:
                    (await open_connection(settings)).terminate()
                except UnreachableError as error:
                    outcomes[type(error.__cause__).__name__] += 1
                else:
                    outcomes["connected"] += 1

            for _ in range(GREETINGS // AT_ONCE):
                await asyncio.gather(*(greet() for _ in range(AT_ONCE)))
    assert sum(outcomes.values()) == GREETINGS
    assert "UnicodeDecodeError" in outcomes, outcomes  # none of asyncpg's own errors


@pytest.mark.parametrize("words", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 64, b"N", b""])
async def test_what_is_no_postgresql_cannot_be_reached(words: bytes) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        settings = Settings(database_url=f"postgresql://user@127.0.0.1:{port}/none", connect_seconds=0.5)
        with pytest.raises(UnreachableError):
            await open_connection(settings)


async def test_a_question_that_is_cancelled_ends_though_its_server_never_answers(database_url: str) -> None:
    """A task that stops while it asks stops, or the service that waits for it would never end."""
    with Database(database_url) as database:
        async with database.proxied() as (proxy, url):
            settings = Settings(database_url=url, statement_seconds=PATIENCE_SECONDS)
            async with connection_pool(settings) as pool:
                accounts = Accounts(pool, settings)
                assert await accounts.account(1) is None
                for link in proxy.links:
                    link.swallow()
                asking = asyncio.create_task(accounts.account(1))
                await asyncio.sleep(0.1)
                asking.cancel()
                async with asyncio.timeout(PATIENCE_SECONDS / 2):
                    await asyncio.wait({asking})
                assert asking.cancelled()


@pytest.mark.parametrize("steps", range(8))
async def test_a_connection_that_is_cancelled_as_it_is_opened_is_not_left_open(
    database_url: str, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Whichever step of the event loop the cancellation falls on."""
    loop = asyncio.get_running_loop()
    opened: list[asyncpg.Connection] = []
    connect = asyncpg.connect

    def cancel_after(count: int) -> None:
        if count:
            loop.call_soon(cancel_after, count - 1)
        else:
            opening.cancel()

    async def connect_and_count(*arguments: object, **options: object) -> asyncpg.Connection:
        opened.append(await connect(*arguments, **options))
        cancel_after(steps)
        return opened[0]

    monkeypatch.setattr(asyncpg, "connect", connect_and_count)
    opening = asyncio.create_task(open_connection(Settings(database_url=database_url)))
    await asyncio.wait({opening})
    assert opening.cancelled() == opened[0].is_closed()
    opened[0].terminate()
