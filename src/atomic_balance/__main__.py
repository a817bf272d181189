"""The command line: serve (the default), migrate, verify, open, psql, pg_dump."""

import argparse
import contextlib
import logging
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import asyncpg
import msgspec
import psycopg

from atomic_balance.changes import BALANCE_LIMIT
from atomic_balance.http.authorization import Tokens
from atomic_balance.http.messages import UserId
from atomic_balance.observe.counting import shared_numbers
from atomic_balance.observe.logs import set_up_logs
from atomic_balance.observe.metrics import Metrics
from atomic_balance.postgres.accounts import Accounts
from atomic_balance.postgres.clients import CLIENTS, run_client
from atomic_balance.postgres.connections import connection_pool
from atomic_balance.postgres.embedded import EmbeddedPostgresError, embedded_postgres
from atomic_balance.postgres.failures import EncodingError, UnreachableError
from atomic_balance.postgres.migrations import migrate
from atomic_balance.postgres.verify import DIFFERENCES_MAX, Money, progress_bar, verify
from atomic_balance.serve.serving import BrokenError, StartError, check_schema, database_answers, listen, run, serve
from atomic_balance.serve.signals import outlive_other_signals, stop_on_signals
from atomic_balance.serve.workers import serve_with_workers
from atomic_balance.settings import Settings, WrongSettingError, read_settings

log = logging.getLogger("atomic_balance")

_VERSION = metadata.version("atomic-balance")
_OpeningBalance = Annotated[
    int, msgspec.Meta(ge=0, le=BALANCE_LIMIT, description=f"an integer from 0 to {BALANCE_LIMIT}")
]


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
    opening.add_argument("balance", type=_argument(_OpeningBalance), help="in minor units")
    for name, purpose in CLIENTS.items():
        # Without a prefix of its own, and without help: whatever follows is the program's, --help too.
        client = commands.add_parser(name, help=purpose, add_help=False, prefix_chars="\0")
        client.add_argument("arguments", nargs="*")
    arguments = parser.parse_args()
    try:
        settings = read_settings()
        set_up_logs(settings.log_level)
        with _database(settings, migrated=arguments.command not in CLIENTS) as url:
            where = "DATABASE_URL" if settings.database_url else f"embedded PostgreSQL, data in {settings.data_dir}"
            settings = msgspec.structs.replace(
                settings, database_url=url, demo=settings.demo or settings.database_url is None
            )
            if arguments.command == "migrate":
                applied = migrate(settings.migrations_url, settings.citus)
                print("\n".join(f"applied {name}" for name in applied) or "the schema is current")
            elif arguments.command == "verify":
                sys.exit(_verify(settings))
            elif arguments.command == "open":
                run(check_schema(settings))
                run(_open_account(settings, arguments.user_id, arguments.balance))
            elif arguments.command in CLIENTS:
                bin_dir = Path(settings.postgres_bin_dir) if settings.postgres_bin_dir else None
                sys.exit(run_client(arguments.command, arguments.arguments, settings.url, bin_dir))
            else:
                _serve(settings, where)
    except WrongSettingError as error:
        sys.exit(_failed(error, 2))
    except (StartError, BrokenError, EmbeddedPostgresError) as error:
        sys.exit(_failed(error, 1))
    except (UnreachableError, EncodingError, psycopg.Error, asyncpg.PostgresError, OSError) as error:
        sys.exit(_failed(f"database: {_first_line(error.__cause__ or error)}", 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _failed(why: object, status: int) -> int:
    print(f"atomic-balance: {why}", file=sys.stderr)
    return status


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _database(settings: Settings, migrated: bool) -> Iterator[str]:
    """The database's URL: DATABASE_URL, or that of the embedded PostgreSQL, its schema current if `migrated`."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    bin_dir = settings.postgres_bin_dir
    with embedded_postgres(Path(settings.data_dir), Path(bin_dir) if bin_dir else None) as url:
        if migrated:
            migrate(url)
        yield url


def _serve(settings: Settings, database: str) -> None:
    awaits_database = not run(database_answers(settings))
    listeners = listen(settings)
    host, port = listeners[0].getsockname()[:2]

    def ready() -> None:
        log.info("atomic-balance %s serves on http://%s:%s (database: %s)", _VERSION, host, port, database)

    if settings.workers > 1:
        serve_with_workers(settings, listeners, awaits_database, ready)
    else:
        run(_serve_alone(settings, listeners, awaits_database, ready))


async def _serve_alone(
    settings: Settings, listeners: Sequence[socket.socket], awaits_database: bool, ready: Callable[[], None]
) -> None:
    stop = stop_on_signals()
    tokens = Tokens(settings)
    outlive_other_signals(settings, tokens, stop)
    ready()
    numbers = shared_numbers(1)
    await serve(settings, listeners, Metrics(numbers[0], numbers), tokens, stop, awaits_database)


def _verify(settings: Settings) -> int:
    found = verify(settings.url, progress_bar)
    for difference in found.differences:
        print(difference)
    print(_all_money(found.money))
    if found.differences or found.money.made:
        more = " at least" if len(found.differences) == DIFFERENCES_MAX else ""
        print(f"the journal does not prove the balances:{more} {len(found.differences)} differ")
        return 1
    print(f"{found.accounts:,} accounts, {found.changes:,} changes: every balance is what the journal says")
    return 0


def _all_money(money: Money) -> str:
    end = "none was made or lost"
    if money.made:
        end = f"{abs(money.made):,} {'made' if money.made > 0 else 'lost'}"
    return (
        f"money: {money.balances:,} in all accounts; "
        f"{money.openings:,} at their openings, {money.added:+,} from outside since: {end}"
    )


async def _open_account(settings: Settings, user_id: int, balance: int) -> None:
    async with connection_pool(settings) as pool:
        found = await Accounts(pool, settings).open_account(user_id, balance, minimum_balance=0)
    print(f"user {user_id} {'opened' if found.opened else 'exists already'}, balance {found.account.balance}")


def _argument(shape: Any) -> Callable[[str], Any]:
    """A parser for an argument of the msgspec type `shape`; its error is made from the type's description."""

    def parse(text: str) -> Any:
        try:
            return msgspec.convert(text, shape, strict=False)
        except msgspec.ValidationError as error:
            raise argparse.ArgumentTypeError(f"expected {shape.__metadata__[0].description}") from error

    return parse


if __name__ == "__main__":
    main()
