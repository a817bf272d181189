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

import uvloop
from aiohttp import web

from atomic_balance.http.app import make_app
from atomic_balance.http.app_keys import DRAINING, GROUP_COMMIT
from atomic_balance.http.authorization import Tokens
from atomic_balance.http.bodies import CONNECTION_BYTES
from atomic_balance.observe.metrics import Metrics
from atomic_balance.postgres.accounts import Accounts
from atomic_balance.postgres.connections import connection_pool
from atomic_balance.settings import Settings

log = logging.getLogger("atomic_balance")

BACKLOG = 10_000
_GC_THRESHOLD = 100_000
_POLL_SECONDS = 0.01


class StartError(Exception):
    """The service can't start; the text says why, in one line."""


class BrokenError(Exception):
    """The service had to end because of a fault of its own, which was logged; every request was answered."""


def run(work: Coroutine[object, object, None]) -> None:
    """Run `work` to its end on an event loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


async def check_schema(settings: Settings) -> None:
    """Raise StartError where the schema is behind, UnreachableError where the database does not answer."""
    async with connection_pool(settings) as pool:
        missing = await Accounts(pool, settings).missing_migrations()
    if missing:
        names = ", ".join(missing)
        raise StartError(f"the schema is behind, without {names}: run python -m atomic_balance migrate")


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
    settings: Settings, listeners: Sequence[socket.socket], metrics: Metrics, tokens: Tokens, stop: asyncio.Event
) -> None:
    """Serve on `listeners` until `stop` is set, then answer what was accepted. Raises BrokenError."""
    _raise_file_limit()
    async with _running(settings, metrics, tokens, stop.set) as runner:
        sites = [web.SockSite(runner, listener, backlog=BACKLOG) for listener in listeners]
        for site in sites:
            await site.start()
        metrics.publish()
        _collect_garbage_rarely()
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
    if failure is not None:
        raise BrokenError("no more changes could be applied") from failure


@contextlib.asynccontextmanager
async def _running(
    settings: Settings, metrics: Metrics, tokens: Tokens, on_failure: Callable[[], None]
) -> AsyncIterator[web.AppRunner]:
    runner = web.AppRunner(
        make_app(settings, metrics, tokens, on_failure),
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
