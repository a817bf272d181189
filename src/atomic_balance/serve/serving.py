"""One process that serves: from the listening sockets to the last answer."""

import asyncio
import contextlib
import errno
import gc
import logging
import math
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import TypeVar

import asyncpg
import uvloop
from aiohttp import web

from atomic_balance.http.app import make_app
from atomic_balance.http.app_keys import ACCOUNTS, DATABASE_FOUND, DRAINING, GROUP_COMMIT
from atomic_balance.http.authorization import Tokens
from atomic_balance.http.bodies import CONNECTION_BYTES
from atomic_balance.observe.metrics import Metrics
from atomic_balance.postgres.accounts import Accounts
from atomic_balance.postgres.connections import connection_pool
from atomic_balance.postgres.failures import MISCONFIGURED, UnreachableError
from atomic_balance.settings import Settings

log = logging.getLogger("atomic_balance")

BACKLOG = 10_000
_GC_THRESHOLD = 100_000
_POLL_SECONDS = 0.01
_AWAIT_SECONDS = 0.5  # between two questions whether the database is there
_REMIND_SECONDS = 15.0

_Result = TypeVar("_Result")


class StartError(Exception):
    """The service can't start; the text says why, in one line."""


class BrokenError(Exception):
    """The service had to end because of a fault of its own, which was logged; every request was answered."""


def run(work: Coroutine[object, object, _Result]) -> _Result:
    """Run `work` to its end on an event loop of its own, and give its result."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


async def database_answers(settings: Settings) -> bool:
    """Whether the database answers now; otherwise it is worth waiting for.

    Raises StartError where it is no database to serve on: as check_schema does, or because it refuses the connection.
    """
    async with connection_pool(settings) as pool:
        return await _unreachable(Accounts(pool, settings)) is None


async def check_schema(settings: Settings) -> None:
    """Raise StartError where the schema is behind or can't be read, UnreachableError where nothing answers."""
    async with connection_pool(settings) as pool:
        await _check_schema(Accounts(pool, settings))


async def _check_schema(accounts: Accounts) -> None:
    try:
        missing = await accounts.missing_migrations()
    except asyncpg.InsufficientPrivilegeError as error:
        raise StartError(f"database: {error}: the service's role needs the grants that README.md lists") from error
    if missing:
        names = ", ".join(missing)
        raise StartError(f"the schema is behind, without {names}: run python -m atomic_balance migrate")


async def _unreachable(accounts: Accounts) -> BaseException | None:
    """Why the database does not answer; None if it does and is as it must be. Raises StartError if it never will."""
    try:
        await _check_schema(accounts)
    except UnreachableError as error:
        reason = error.__cause__ or error
        if isinstance(reason, MISCONFIGURED):
            raise StartError(f"database: {str(reason).partition(chr(10))[0]}") from error
        return reason
    return None


def listen(settings: Settings) -> list[socket.socket]:
    """Listen on every address of HOST that this machine has. Raises StartError."""
    listeners: list[socket.socket] = []
    errors: list[OSError] = []
    try:
        places = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        places, errors = [], [error]
    for family, _, _, _, address in places:
        try:
            listener = socket.create_server(address, family=family, backlog=BACKLOG)
            listeners.append(listener)
            if sys.platform == "linux":  # connections inherit it: a client that takes no answer is cut off too
                milliseconds = math.ceil(1000 * settings.idle_seconds)
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        except OSError as error:
            errors.append(error)
    for found in errors:
        if not listeners or found.errno != errno.EADDRNOTAVAIL:  # a name may have addresses that this machine lacks
            why = os.strerror(found.errno) if found.errno and found.errno > 0 else str(found)
            raise StartError(f"can't listen on {settings.host}:{settings.port}: {why}") from found
    return listeners


async def serve(
    settings: Settings,
    listeners: Sequence[socket.socket],
    metrics: Metrics,
    tokens: Tokens,
    stop: asyncio.Event,
    awaits_database: bool = False,
) -> None:
    """Serve on `listeners` until `stop` is set, then answer what was accepted. Raises BrokenError.

    `awaits_database`: the database was away. Until it answers, changes wait, readiness is red, and the log has a line
    now and then. Raises StartError if it turns out to be no database to serve on.
    """
    _raise_file_limit()
    nothing_to_serve: StartError | None = None
    async with _running(settings, metrics, tokens, stop.set, awaits_database) as runner:
        sites = [web.SockSite(runner, listener, backlog=BACKLOG) for listener in listeners]
        for site in sites:
            await site.start()
        metrics.publish()
        _collect_garbage_rarely()
        if awaits_database:
            async with asyncio.TaskGroup() as tasks:
                awaiting = tasks.create_task(_await_database(runner.app, stop))
                await stop.wait()
                awaiting.cancel()
            nothing_to_serve = None if awaiting.cancelled() else awaiting.result()
        await stop.wait()
        log.info("stopping: what was accepted is still answered")
        runner.app[DRAINING].set()
        await asyncio.sleep(settings.drain_seconds)  # so that load balancers see it first
        for site in sites:
            await site.stop()
        with contextlib.suppress(TimeoutError):  # a client that has just connected may still send a request
            async with asyncio.timeout(settings.drain_seconds):
                while runner.server and runner.server.connections:  # noqa: ASYNC110 - nothing tells when they have gone
                    await asyncio.sleep(_POLL_SECONDS)
        failure = runner.app[GROUP_COMMIT].failure
    if nothing_to_serve is not None:
        raise nothing_to_serve
    if failure is not None:
        raise BrokenError("no more changes could be applied") from failure


async def _await_database(app: web.Application, stop: asyncio.Event) -> StartError | None:
    """Wait until the database answers; if it is none to serve on, set `stop` and give the reason."""
    remind_at = float("-inf")
    while True:
        try:
            reason = await _unreachable(app[ACCOUNTS])
        except StartError as error:
            stop.set()
            return error
        if reason is None:
            app[DATABASE_FOUND].set()
            log.info("the database answers")
            return None
        now = asyncio.get_running_loop().time()
        if now >= remind_at:
            remind_at = now + _REMIND_SECONDS
            log.warning("waiting for the database, which can't be reached: %r", reason)
        await asyncio.sleep(_AWAIT_SECONDS)


@contextlib.asynccontextmanager
async def _running(
    settings: Settings, metrics: Metrics, tokens: Tokens, on_failure: Callable[[], None], awaits_database: bool
) -> AsyncIterator[web.AppRunner]:
    runner = web.AppRunner(
        make_app(settings, metrics, tokens, on_failure, awaits_database),
        access_log=log if settings.log_requests else None,
        access_log_format='%a "%r" %s %b bytes in %Tf s',
        shutdown_timeout=settings.shutdown_seconds,
        keepalive_timeout=settings.idle_seconds,  # also for connections that have sent nothing, or half a head
        read_bufsize=CONNECTION_BYTES,
    )
    await runner.setup()
    try:
        yield runner
    finally:
        await runner.cleanup()


def _raise_file_limit() -> None:
    """Allow as many connections as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS calls its limit unlimited and refuses it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _collect_garbage_rarely() -> None:
    """Requests leave hardly any cycles behind, and what exists now lives as long as the process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
