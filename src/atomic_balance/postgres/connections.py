"""Connections to PostgreSQL: a single one, and the pool for everything but changes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from atomic_balance.postgres.failures import EncodingError, UnreachableError
from atomic_balance.postgres.statements import LEARN_TYPES
from atomic_balance.settings import Settings

FAULTS = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What asyncpg raises when a connection or a statement fails; a wrong server can make it raise anything."""

# Otherwise Citus, which hides its shards, takes a second to tell asyncpg what types there are, which is more than a
# statement may take.
_SHOW_SHARDS = "SET citus.override_table_visibility TO off"

ENCODING = "UTF8"
"""The encoding that a database must have: no other can hold every text that a caller may send."""


async def open_connection(settings: Settings) -> asyncpg.Connection:
    """A connection to whichever host of DATABASE_URL first gives one that meets the URL's parameters and ENCODING.

    All hosts are asked at the same time, because one that has lost its power or its network never answers. Raises
    UnreachableError; it has a text only where the encoding is the reason.
    """
    asked = [asyncio.create_task(_ask(url, settings)) for url in settings.host_urls]
    chosen: asyncpg.Connection | None = None
    reason: BaseException | None = None
    try:
        for answer in asyncio.as_completed(asked):
            try:
                chosen = await answer
                break
            except Exception as error:  # noqa: BLE001 - what a wrong server sends can make asyncpg raise anything
                reason = error
    finally:
        for task in asked:
            task.cancel()
        try:
            await asyncio.gather(*asked, return_exceptions=True)
        except asyncio.CancelledError:
            chosen = None  # who asked is gone, and would never close it
            raise
        finally:
            for task in asked:
                if not task.cancelled() and task.exception() is None and task.result() is not chosen:
                    task.result().terminate()
    if chosen is None:
        raise UnreachableError(str(reason) if isinstance(reason, EncodingError) else "") from reason
    return chosen


async def _ask(url: str, settings: Settings) -> asyncpg.Connection:
    prepared = {} if settings.prepared_statements else {"statement_cache_size": 0}
    connection = await asyncpg.connect(
        url,
        timeout=settings.connect_seconds,
        server_settings={"application_name": "atomic-balance"},  # and no other: a pooler refuses what it doesn't know
        **prepared,
    )
    try:
        check_encoding(getattr(connection.get_settings(), "server_encoding", None))
        if settings.citus:
            await connection.execute(_SHOW_SHARDS, timeout=settings.connect_seconds)
            await connection.fetch(LEARN_TYPES, timeout=settings.connect_seconds)
    except BaseException:
        connection.terminate()
        raise
    return connection


def check_encoding(encoding: str | None) -> None:
    """Raise EncodingError unless `encoding`, which a server reports for each new connection, is `ENCODING`."""
    if encoding != ENCODING:
        raise EncodingError(f"its encoding is {encoding}, expected {ENCODING}")


@asynccontextmanager
async def connection_pool(settings: Settings) -> AsyncIterator[asyncpg.Pool]:
    """A pool of connections, which are opened when they are first needed."""
    pool = asyncpg.create_pool(
        min_size=0,
        max_size=settings.pool_connections_max,
        connect=lambda *_, **__: open_connection(settings),
    )
    await pool
    try:
        yield pool
    finally:
        try:
            async with asyncio.timeout(settings.statement_seconds):
                await pool.close()
        except FAULTS:
            pool.terminate()  # a server that can't be reached never confirms the end
