"""What the service is measured beside: one small handler, and the ways to keep a balance behind it.

`python -m benchmarking.contenders NAME ADDRESS` serves one of them. They have the service's own bodies and what makes
it fast (uvloop, a spared garbage collector, prepared statements, connections that are not reset), but no journal, no
idempotency keys, and no error other than a refusal.
"""

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial

import asyncpg
import msgspec
import redis.asyncio
import uvloop
from aiohttp import hdrs, web

from atomic_balance.http.messages import BalanceUpdate, Error, UpdatedBalance

POSTGRES_CONNECTIONS = 16
REDIS_CONNECTIONS = 256

Update = Callable[[int, int], Awaitable[int | None]]
"""Takes a user id and an amount; gives the new balance, or None where the balance can't cover it."""

_BACKLOG = 10_000
_GC_THRESHOLD = 100_000
_HEADERS = {hdrs.CONTENT_TYPE: "application/json"}
_REFUSED = msgspec.json.encode(Error("Insufficient funds"))
_decode = msgspec.json.Decoder(BalanceUpdate).decode
_encode = msgspec.json.Encoder().encode


@asynccontextmanager
async def no_database(balance: str) -> AsyncIterator[Update]:
    """The limit: every user has `balance`, for ever."""
    always = int(balance)

    async def update(_: int, amount: int) -> int | None:
        return always + amount if always + amount >= 0 else None

    yield update


async def bare_statement(connection: asyncpg.Connection, user_id: int, amount: int) -> int | None:
    """The conditional statement, one per request."""
    return await connection.fetchval(  # type: ignore[no-any-return]
        "UPDATE users SET balance = balance - $2 WHERE id = $1 AND balance >= $2 RETURNING balance", user_id, -amount
    )


async def for_update(connection: asyncpg.Connection, user_id: int, amount: int) -> int | None:
    """Lock the row, look, update."""
    async with connection.transaction():
        balance = await connection.fetchval("SELECT balance FROM users WHERE id = $1 FOR UPDATE", user_id)
        return await _set_if_covered(connection, user_id, balance + amount)


async def serializable(connection: asyncpg.Connection, user_id: int, amount: int) -> int | None:
    """Look and update in a serializable transaction; again, for as long as PostgreSQL finds a conflict."""
    while True:
        with suppress(asyncpg.SerializationError):
            async with connection.transaction(isolation="serializable"):
                balance = await connection.fetchval("SELECT balance FROM users WHERE id = $1", user_id)
                return await _set_if_covered(connection, user_id, balance + amount)


async def _set_if_covered(connection: asyncpg.Connection, user_id: int, balance: int) -> int | None:
    if balance < 0:
        return None
    await connection.execute("UPDATE users SET balance = $2 WHERE id = $1", user_id, balance)
    return balance


@asynccontextmanager
async def postgres(
    update_on: Callable[[asyncpg.Connection, int, int], Awaitable[int | None]], database_url: str
) -> AsyncIterator[Update]:
    """A way that needs a connection: the connections are never reset, and a request waits for one in order."""
    idle = [await asyncpg.connect(database_url) for _ in range(POSTGRES_CONNECTIONS)]
    turn = asyncio.Semaphore(POSTGRES_CONNECTIONS)

    async def update(user_id: int, amount: int) -> int | None:
        async with turn:
            connection = idle.pop()
            try:
                return await update_on(connection, user_id, amount)
            finally:
                idle.append(connection)

    yield update
    for connection in idle:
        await connection.close()


@asynccontextmanager
async def redis_script(socket: str) -> AsyncIterator[Update]:
    """Redis, and a script that looks and updates in one go."""
    pool = redis.asyncio.BlockingConnectionPool(
        connection_class=redis.asyncio.UnixDomainSocketConnection, path=socket, max_connections=REDIS_CONNECTIONS
    )
    async with redis.asyncio.Redis.from_pool(pool) as client:
        script = client.register_script("""
            if redis.call('GET', KEYS[1]) + ARGV[1] < 0 then return nil end
            return redis.call('INCRBY', KEYS[1], ARGV[1])
        """)

        async def update(user_id: int, amount: int) -> int | None:
            return await script(keys=[str(user_id)], args=[amount])  # type: ignore[no-any-return]

        yield update


CONTENDERS: Mapping[str, Callable[[str], AbstractAsyncContextManager[Update]]] = {
    "no-database": no_database,
    "bare-statement": partial(postgres, bare_statement),
    "for-update": partial(postgres, for_update),
    "serializable": partial(postgres, serializable),
    "redis": redis_script,
}


def application(name: str, address: str) -> web.Application:
    """The server of a contender; `address` is a database's URL, Redis's socket or, without a store, the balance."""
    ways: list[Update] = []

    async def handler(request: web.Request) -> web.Response:
        asked = _decode(await request.read())
        balance = await ways[0](asked.user_id, asked.amount)
        if balance is None:
            return web.Response(status=400, body=_REFUSED, headers=_HEADERS)
        return web.Response(body=_encode(UpdatedBalance(asked.user_id, balance)), headers=_HEADERS)

    async def contender(_: web.Application) -> AsyncIterator[None]:
        async with CONTENDERS[name](address) as update:
            ways.append(update)
            gc.collect()
            gc.freeze()
            gc.set_threshold(_GC_THRESHOLD)
            yield

    app = web.Application()
    app.router.add_post("/api/balance/update", handler)
    app.cleanup_ctx.append(contender)
    return app


if __name__ == "__main__":
    web.run_app(
        application(*sys.argv[1:]),
        host="127.0.0.1",
        port=0,
        backlog=_BACKLOG,
        access_log=None,
        print=partial(print, flush=True),
        loop=uvloop.new_event_loop(),
    )
