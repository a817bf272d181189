"""The application: its routes, its resources, and what every request goes through."""

import asyncio
import itertools
import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from importlib import metadata

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from msgspec import json

from atomic_balance.commit.expiry import Expiry
from atomic_balance.commit.group_commit import GroupCommit, Limits
from atomic_balance.commit.hold_reader import HoldReader
from atomic_balance.http import live
from atomic_balance.http.app_keys import (
    ACCOUNTS,
    BODIES,
    DATABASE_FOUND,
    DRAINING,
    GROUP_COMMIT,
    HOLDS,
    METRICS,
    OFFERS_RACES,
    OPENAPI,
    READINESS,
)
from atomic_balance.http.authorization import OPEN_PATHS, Tokens, answer_if_allowed
from atomic_balance.http.bodies import Bodies
from atomic_balance.http.endpoints import ENDPOINTS
from atomic_balance.http.errors import ApiError, error_response, of_http_exception
from atomic_balance.http.feed import FEED, Feed
from atomic_balance.http.hosts import host_check
from atomic_balance.http.messages import Request
from atomic_balance.http.openapi import document
from atomic_balance.http.parsing import parse_query
from atomic_balance.http.readiness import ReadinessProbe
from atomic_balance.http.request_counts import KINDS_OF_REQUESTS, request_cell
from atomic_balance.observe.counting import shared_numbers
from atomic_balance.observe.logs import REQUEST_ID
from atomic_balance.observe.metrics import Metrics
from atomic_balance.postgres.accounts import Accounts
from atomic_balance.postgres.connections import connection_pool
from atomic_balance.postgres.failures import UnreachableError
from atomic_balance.postgres.session import Session, connect
from atomic_balance.settings import Settings

log = logging.getLogger("atomic_balance")

REQUEST_ID_HEADER = "X-Request-ID"

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_TAKING_NO_QUERY = {each.handler for each in ENDPOINTS if "invalid_request" in each.errors and not each.query}
_TOKENS = web.AppKey("tokens", Tokens)
_REQUEST_IDS: web.AppKey[Iterator[str]] = web.AppKey("request_ids")
_HOST_CHECK: web.AppKey[Callable[[str], bool]] = web.AppKey("host_check")


def make_app(
    settings: Settings,
    metrics: Metrics | None = None,
    tokens: Tokens | None = None,
    on_failure: Callable[[], None] = lambda: None,
    awaits_database: bool = False,
) -> web.Application:
    """The application for `settings`, which must have a `database_url`. The database may be away when it starts.

    `metrics`: where it counts; None: by itself. `tokens`: those that are accepted; None: those of `settings`.
    `on_failure`: called if the group commit can apply no more changes. `awaits_database`: changes wait, and holds are
    not settled, until somebody sets DATABASE_FOUND.
    """
    app = web.Application(
        middlewares=[answer],
        # Otherwise aiohttp would inflate a body before any handler could refuse it, and block the event loop meanwhile.
        handler_args={"auto_decompress": False},
    )
    app[_TOKENS] = tokens or Tokens(settings)
    app[_HOST_CHECK] = host_check(settings)
    app[BODIES] = Bodies(settings.bodies_bytes_max, settings.deadline_seconds)
    app[DRAINING] = asyncio.Event()
    app[DATABASE_FOUND] = asyncio.Event()
    if not awaits_database:
        app[DATABASE_FOUND].set()
    app[OFFERS_RACES] = settings.offers_races
    app.add_routes([web.route(endpoint.method, _pattern(endpoint.path), endpoint.handler) for endpoint in ENDPOINTS])
    app[OPENAPI] = json.encode(document(metadata.version("atomic-balance")))
    if metrics is None:
        (numbers,) = shared_numbers(1)
        metrics = Metrics(numbers, [numbers])
    metrics.kinds_of_requests = KINDS_OF_REQUESTS
    app[METRICS] = metrics
    app[live.PUBLISHER] = live.Publisher()
    of_process = secrets.token_hex(4)
    app[_REQUEST_IDS] = (f"{of_process}-{number:x}" for number in itertools.count(1))

    async def accounts(app: web.Application) -> AsyncIterator[None]:
        async with connection_pool(settings) as pool:
            app[ACCOUNTS] = Accounts(pool, settings)
            metrics.gauges["pool_connections"] = pool.get_size
            metrics.gauges["pool_idle_connections"] = pool.get_idle_size
            yield

    async def group_commit(app: web.Application) -> AsyncIterator[None]:
        async def connected() -> Session:
            await app[DATABASE_FOUND].wait()
            return await connect(settings)

        group_commit = GroupCommit(connected, limits(settings), metrics.own, on_failure)
        async with group_commit.running() as committer:
            metrics.gauges["waiting_changes"] = lambda: committer.waiting_count
            app[GROUP_COMMIT] = committer
            readiness = ReadinessProbe(app[ACCOUNTS], committer, app[DRAINING], settings.deadline_seconds)
            app[READINESS] = readiness
            yield
            await readiness.close()

    async def holds(app: web.Application) -> AsyncIterator[None]:
        accounts, committer = app[ACCOUNTS], app[GROUP_COMMIT]
        expiry = Expiry(accounts, committer, settings.waiting_changes_max // 4 or 1)

        async with HoldReader(accounts).running() as reader, asyncio.TaskGroup() as tasks:
            settling = tasks.create_task(_once_database_is_found(app, expiry.running()))
            app[HOLDS] = reader
            metrics.gauges["open_holds"] = lambda: expiry.open_holds
            metrics.gauges["held"] = lambda: expiry.held
            metrics.gauges["overdue_holds"] = lambda: expiry.overdue_holds
            yield
            settling.cancel()

    async def feed(app: web.Application) -> AsyncIterator[None]:
        app[FEED] = None
        metrics.gauges["feed_lag_seconds"] = lambda: 0.0
        if settings.citus:
            yield
            return
        following = Feed(app[ACCOUNTS], app[DRAINING])
        async with asyncio.TaskGroup() as tasks:
            looking = tasks.create_task(_once_database_is_found(app, following.running()))
            app[FEED] = following
            metrics.gauges["feed_lag_seconds"] = lambda: following.lag_seconds
            yield
            looking.cancel()

    app.cleanup_ctx.extend((accounts, group_commit, holds, feed, live.publishing))
    return app


async def _once_database_is_found(app: web.Application, running: AbstractAsyncContextManager[object]) -> None:
    """Let something run from when DATABASE_FOUND is set, until this is cancelled."""
    await app[DATABASE_FOUND].wait()
    async with running:
        await asyncio.Event().wait()


def _pattern(path: str) -> str:
    """`path` as a route of aiohttp, with variable parts that may hold `{` and `}`: a plain `{name}` matches neither."""
    return re.sub(r"\{(\w+)\}", r"{\1:[^/]+}", path)


def limits(settings: Settings) -> Limits:
    """The limits of the group commit that follow from the settings."""
    return Limits(
        changes_per_statement=settings.changes_per_statement_max,
        accounts_per_statement=settings.accounts_per_statement_max,
        lanes=settings.lanes,
        waiting_changes=settings.waiting_changes_max,
        waiting_changes_per_account=settings.waiting_changes_per_account_max,
        deadline_seconds=settings.deadline_seconds,
        landing_seconds=min(2 * settings.lock_seconds, settings.deadline_seconds / 2),
        lock_seconds=settings.lock_seconds,
    )


@web.middleware
async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Name the request, let it pass if it may, turn whatever was raised into an answer, and count it.

    The log has the cause of what was raised.
    """
    app, headers = request.app, request.headers
    request_id = headers.get(REQUEST_ID_HEADER, "")
    if not _REQUEST_ID.fullmatch(request_id):
        request_ids = app[_REQUEST_IDS]
        request_id = next(request_ids)
    REQUEST_ID.set(request_id)
    try:
        if hdrs.CONTENT_ENCODING in headers and _is_encoded(request):
            raise ApiError("unsupported_content_encoding")
        asked = _refuse_query if request.query_string and handler in _TAKING_NO_QUERY else handler
        tokens = app[_TOKENS]
        if tokens.writing:
            response = await answer_if_allowed(tokens, request, asked)
        elif app[_HOST_CHECK](headers.get(hdrs.HOST, "")) or request.path in OPEN_PATHS:
            response = await asked(request)
        else:
            raise ApiError("misdirected_request")
    except ApiError as error:
        response = error_response(request, error.code, error.text)
    except web.HTTPException as error:
        response = of_http_exception(request, error)
    except UnreachableError as error:
        log.warning("%s %s: the database can't be reached: %r", request.method, request.path, error.__cause__)
        response = error_response(request, "unavailable")
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        response = error_response(request, "internal_error")
    response.headers[REQUEST_ID_HEADER] = request_id
    app[METRICS].own.count_request(request_cell(handler, response.status))
    if app[DRAINING].is_set():
        response.force_close()  # so that the caller sends no more on a connection that is about to be closed
    return response


async def _refuse_query(request: web.Request) -> web.StreamResponse:
    """The answer of an endpoint that takes no query to a request with one."""
    parse_query(Request, request)
    raise ApiError("invalid_request", "query: expected none")  # of nothing but separators


def _is_encoded(request: web.Request) -> bool:
    codings = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING)).split(",")
    return not {coding.strip().lower() for coding in codings} <= {"", "identity"}
