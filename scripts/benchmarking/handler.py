"""What the service is measured beside: one small HTTP handler, and the ways to keep a balance behind it.

`python handler.py NAME ADDRESS` serves one; ADDRESS is a database's URL, Redis's socket or, without a store, the one
balance of all. They have the service's bodies and what makes it fast (uvloop, a spared garbage collector,
prepared statements, connections that are not reset), but no journal, no idempotency keys, and no error but a refusal.
"""

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import asyncpg
import msgspec
import redis.asyncio
import uvloop
from aiohttp import web

POSTGRES_CONNECTIONS = 16
REDIS_CONNECTIONS = 256

_BACKLOG = 10_000
_GC_THRESHOLD = 100_000
_HEADERS = {"Content-Type": "application/json"}
_REFUSED = b'{"error":"Insufficient funds"}'

Body = dict[str, Any]
Way = Callable[[Any, Body], Awaitable[Body | None]]  # takes what its store lends, and a request; None: a refusal
Lend = Callable[[Way, Body], Awaitable[Body | None]]  # calls a way for a request, with what the store lends


async def no_database(balance: int, asked: Body) -> Body | None:
    """The limit: everyone has `balance`, for ever."""
    return _answer(asked, balance + asked["amount"])


async def bare_update(connection: asyncpg.Connection, asked: Body) -> Body | None:
    """The conditional statement, one per request."""
    statement = "UPDATE users SET balance = balance - $2 WHERE id = $1 AND balance >= $2 RETURNING balance"
    return _answer(asked, await connection.fetchval(statement, asked["userId"], -asked["amount"]))


async def for_update(connection: asyncpg.Connection, asked: Body) -> Body | None:
    """Lock the row, look, update."""
    async with connection.transaction():
        return await _look_and_set("SELECT balance FROM users WHERE id = $1 FOR UPDATE", connection, asked)


async def serializable(connection: asyncpg.Connection, asked: Body) -> Body | None:
    """Look and update in a serializable transaction; again, for as long as PostgreSQL finds a conflict."""
    while True:
        with suppress(asyncpg.SerializationError):
            async with connection.transaction(isolation="serializable"):
                return await _look_and_set("SELECT balance FROM users WHERE id = $1", connection, asked)


async def redis_script(script: Any, asked: Body) -> Body | None:
    """A script that looks and updates in one go."""
    return _answer(asked, await script(keys=[str(asked["userId"])], args=[asked["amount"]]))


async def _look_and_set(look: str, connection: asyncpg.Connection, asked: Body) -> Body | None:
    balance = await connection.fetchval(look, asked["userId"]) + asked["amount"]
    if balance >= 0:
        await connection.execute("UPDATE users SET balance = $2 WHERE id = $1", asked["userId"], balance)
    return _answer(asked, balance)


async def no_database_transfer(balance: int, asked: Body) -> Body | None:
    """The limit of transfers."""
    to = [{"userId": payee["userId"], "newBalance": balance + payee["amount"]} for payee in asked["to"]]
    return {"fromUserId": asked["fromUserId"], "newBalance": balance, "to": to}


async def for_update_transfer(connection: asyncpg.Connection, asked: Body) -> Body | None:
    """Lock the rows of payer and payee in the order of their ids, look, update both."""
    payer, (payee,) = asked["fromUserId"], asked["to"]
    amount, update = payee["amount"], "UPDATE users SET balance = $2 WHERE id = $1"
    async with connection.transaction():
        both = "SELECT id, balance FROM users WHERE id IN ($1, $2) ORDER BY id FOR UPDATE"
        balances = dict(await connection.fetch(both, payer, payee["userId"]))
        if balances[payer] < amount:
            return None
        await connection.execute(update, payer, balances[payer] - amount)
        await connection.execute(update, payee["userId"], balances[payee["userId"]] + amount)
    to = [{"userId": payee["userId"], "newBalance": balances[payee["userId"]] + amount}]
    return {"fromUserId": payer, "newBalance": balances[payer] - amount, "to": to}


def _answer(asked: Body, balance: int | None) -> Body | None:
    return None if balance is None or balance < 0 else {"userId": asked["userId"], "newBalance": balance}


async def nowhere(balance: str) -> Lend:
    """Lends the balance."""
    fixed = int(balance)
    return lambda way, asked: way(fixed, asked)


async def in_postgres(database_url: str) -> Lend:
    """Lends a connection; they are never reset, and a request waits for one in order."""
    idle = [await asyncpg.connect(database_url) for _ in range(POSTGRES_CONNECTIONS)]
    turn = asyncio.Semaphore(POSTGRES_CONNECTIONS)

    async def lend(way: Way, asked: Body) -> Body | None:
        async with turn:
            connection = idle.pop()
            try:
                return await way(connection, asked)
            finally:
                idle.append(connection)

    return lend


async def in_redis(socket: str) -> Lend:
    """Lends the script."""
    pool = redis.asyncio.BlockingConnectionPool(
        connection_class=redis.asyncio.UnixDomainSocketConnection, path=socket, max_connections=REDIS_CONNECTIONS
    )
    script = redis.asyncio.Redis.from_pool(pool).register_script("""
        if redis.call('GET', KEYS[1]) + ARGV[1] < 0 then return nil end
        return redis.call('INCRBY', KEYS[1], ARGV[1])
    """)
    return lambda way, asked: way(script, asked)


# A name -> its store, and its way at each path.
WAYS: Mapping[str, tuple[Callable[[str], Awaitable[Lend]], Mapping[str, Way]]] = {
    "no-database": (nowhere, {"/api/balance/update": no_database, "/api/balance/transfer": no_database_transfer}),
    "bare-update": (in_postgres, {"/api/balance/update": bare_update}),
    "for-update": (in_postgres, {"/api/balance/update": for_update, "/api/balance/transfer": for_update_transfer}),
    "serializable": (in_postgres, {"/api/balance/update": serializable}),
    "redis": (in_redis, {"/api/balance/update": redis_script}),
}


async def serve(name: str, address: str) -> None:
    """Serve on a free port, print its address, and go on until this process is stopped."""
    open_store, ways = WAYS[name]
    lend = await open_store(address)
    app = web.Application()
    for path, way in ways.items():
        app.router.add_post(path, _handler(lend, way))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=_BACKLOG).start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def _handler(lend: Lend, way: Way) -> Callable[[web.Request], Awaitable[web.Response]]:
    decode, encode = msgspec.json.Decoder().decode, msgspec.json.Encoder().encode

    async def handle(request: web.Request) -> web.Response:
        answer = await lend(way, decode(await request.read()))
        if answer is None:
            return web.Response(status=400, body=_REFUSED, headers=_HEADERS)
        return web.Response(body=encode(answer), headers=_HEADERS)

    return handle


if __name__ == "__main__":
    uvloop.run(serve(*sys.argv[1:]))
