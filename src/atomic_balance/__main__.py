"""The command line: serve (the default), migrate, verify, open."""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import uvloop
from aiohttp import web

from atomic_balance.app import make_app
from atomic_balance.embedded import EmbeddedPostgresError, embedded_postgres
from atomic_balance.handlers import DRAINING, STORE
from atomic_balance.logs import set_up_logs
from atomic_balance.messages import Balance, UserId
from atomic_balance.migrations import migrate
from atomic_balance.settings import Settings, WrongSettingError, read_settings
from atomic_balance.store import UnreachableError
from atomic_balance.verify import DIFFERENCES_MAX, progress_bar, verify

log = logging.getLogger("atomic_balance")

_VERSION = metadata.version("atomic-balance")
_BACKLOG = 10_000
_GC_THRESHOLD = 100_000


class StartError(Exception):
    """The command can't be carried out; the text says why, in one line."""


def main() -> None:
    """Run one command; exits 0, 1 if it failed, 2 for a wrong setting or argument."""
    parser = argparse.ArgumentParser(
        prog="atomic-balance",
        description="A balance per user in PostgreSQL that is never wrong, at any concurrency.",
        epilog="Settings come from the environment and from .env; .env.example lists them all. Without DATABASE_URL "
        "the database is an embedded PostgreSQL, its data in DATA_DIR. Exit status: 0 done; 1 failed, or verify found "
        "a difference; 2 a wrong setting or argument.",
    )
    parser.add_argument("--version", action="version", version=f"atomic-balance {_VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    commands.add_parser("serve", help="serve the API (the default)")
    commands.add_parser("migrate", help="bring the database's schema up to date")
    commands.add_parser("verify", help="recompute every balance from the journal")
    opening = commands.add_parser("open", help="open an account, unless there is one")
    opening.add_argument("user_id", type=_argument(UserId), help="a number from 1 on")
    opening.add_argument("balance", type=_argument(Balance), help="in minor units")
    arguments = parser.parse_args()
    try:
        settings = read_settings()
        set_up_logs(settings.log_level)
        with _database(settings) as url:
            where = "DATABASE_URL" if settings.database_url else f"embedded PostgreSQL, data in {settings.data_dir}"
            settings = msgspec.structs.replace(settings, database_url=url)
            if arguments.command == "migrate":
                applied = migrate(settings.asyncpg_url)
                print("\n".join(f"applied {name}" for name in applied) or "the schema is current")
            elif arguments.command == "verify":
                sys.exit(_verify(settings))
            elif arguments.command == "open":
                _run(_open_account(settings, arguments.user_id, arguments.balance))
            else:
                _run(_serve(settings, where))
    except WrongSettingError as error:
        sys.exit(_failed(error, 2))
    except (StartError, EmbeddedPostgresError) as error:
        sys.exit(_failed(error, 1))
    except (UnreachableError, psycopg.Error, OSError) as error:
        sys.exit(_failed(f"database: {_first_line(error.__cause__ or error)}", 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _failed(why: object, status: int) -> int:
    print(f"atomic-balance: {why}", file=sys.stderr)
    return status


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _database(settings: Settings) -> Iterator[str]:
    """The DATABASE_URL: the one given, or that of the embedded PostgreSQL, migrated."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    bin_dir = settings.postgres_bin_dir
    with embedded_postgres(Path(settings.data_dir), Path(bin_dir) if bin_dir else None) as url:
        migrate(url)
        yield url


def _run(work: Coroutine[object, object, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


@contextlib.asynccontextmanager
async def _running(settings: Settings) -> AsyncIterator[web.AppRunner]:
    runner = web.AppRunner(
        make_app(settings),
        access_log=log if settings.log_requests else None,
        access_log_format='%a "%r" %s %b bytes in %Tf s',
        shutdown_timeout=settings.shutdown_seconds,
    )
    await runner.setup()
    try:
        yield runner
    finally:
        await runner.cleanup()


async def _serve(settings: Settings, database: str) -> None:
    _raise_file_limit()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with _running(settings) as runner:
        missing = await runner.app[STORE].missing_migrations()
        if missing:
            names = ", ".join(missing)
            raise StartError(f"the schema is behind, without {names}: run python -m atomic_balance migrate")
        try:
            await web.TCPSite(runner, settings.host, settings.port, backlog=_BACKLOG).start()
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            raise StartError(f"can't listen on {settings.host}:{settings.port}: {why}") from error
        _spare_the_garbage_collector()
        host, port = runner.addresses[0][:2]
        log.info("atomic-balance %s serves on http://%s:%s (database: %s)", _VERSION, host, port, database)
        await stop.wait()
        log.info("stopping: what was accepted is still answered")
        runner.app[DRAINING].set()
        await asyncio.sleep(settings.drain_seconds)  # so that whoever asks for readiness learns of it first


def _verify(settings: Settings) -> int:
    found = verify(settings.asyncpg_url, progress_bar)
    for difference in found.differences:
        print(difference)
    if found.differences:
        more = " at least" if len(found.differences) == DIFFERENCES_MAX else ""
        print(f"the journal does not prove the balances:{more} {len(found.differences)} differ")
        return 1
    print(f"{found.accounts:,} accounts, {found.changes:,} changes: every balance is what the journal says")
    return 0


def _raise_file_limit() -> None:
    """Allow as many connections as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS calls its limit unlimited and refuses it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _spare_the_garbage_collector() -> None:
    """Look for cycles seldom, and not among what lives for ever: requests leave hardly any behind."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)


async def _open_account(settings: Settings, user_id: int, balance: int) -> None:
    async with _running(settings) as runner:
        found = await runner.app[STORE].open_account(user_id, balance, minimum_balance=0)
    print(f"user {user_id} {'opened' if found.opened else 'exists already'}, balance {found.account.balance}")


def _argument(shape: Any) -> Callable[[str], Any]:
    """A parser for an argument of the msgspec type `shape`; what it expects is said by the type's description."""

    def parse(text: str) -> Any:
        try:
            return msgspec.convert(text, shape, strict=False)
        except msgspec.ValidationError as error:
            raise argparse.ArgumentTypeError(f"expected {shape.__metadata__[0].description}") from error

    return parse


if __name__ == "__main__":
    main()
