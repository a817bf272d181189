"""The application: its routes, its resources, and what every request goes through."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
from aiohttp import web

from atomic_balance import handlers
from atomic_balance.errors import ApiError, error_response, of_http_exception
from atomic_balance.settings import Settings
from atomic_balance.store import OutcomeUnknownError, Store, UnavailableError

log = logging.getLogger("atomic_balance")

ROUTES = (
    web.post("/api/balance/update", handlers.update_balance),
    web.put("/api/users/{user_id}", handlers.open_account),
    web.get("/api/users/{user_id}", handlers.read_account),
    web.get("/healthz", handlers.healthz),
    web.get("/readyz", handlers.readyz),
)


def make_app(settings: Settings) -> web.Application:
    """The application for `settings`, which must have a `database_url`. The database may be away when it starts."""
    app = web.Application(middlewares=[answer_errors], client_max_size=settings.body_bytes_max)
    app.add_routes(ROUTES)

    async def store(app: web.Application) -> AsyncIterator[None]:
        async with asyncpg.create_pool(
            settings.asyncpg_url,
            min_size=0,
            max_size=settings.pool_connections_max,
            timeout=settings.connect_seconds,
            server_settings={"application_name": "atomic-balance"},
        ) as pool:
            app[handlers.STORE] = Store(pool, settings.deadline_seconds, settings.statement_seconds)
            yield

    app.cleanup_ctx.append(store)
    return app


@web.middleware
async def answer_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turn whatever a handler raised into an answer of the table in errors.py; the cause goes to the log alone."""
    try:
        return await handler(request)
    except ApiError as error:
        return error_response(error.code, error.text)
    except web.HTTPException as error:
        return of_http_exception(error)
    except UnavailableError as error:
        log.warning("%s %s: database unavailable: %r", request.method, request.path, error.__cause__)
        return error_response("unavailable")
    except OutcomeUnknownError as error:
        log.warning("%s %s: outcome unknown: %r", request.method, request.path, error.__cause__)
        return error_response("outcome_unknown")
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return error_response("internal_error")
