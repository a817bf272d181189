"""The command line: serve (the default), migrate, verify, open, import, export."""

import argparse
import contextlib
import io
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import asyncpg
import msgspec
import psycopg
from msgspec import Meta

from atomic_balance.changes import BALANCE_LIMIT, UserId
from atomic_balance.http.authorization import Tokens
from atomic_balance.observe.counting import shared_numbers
from atomic_balance.observe.logs import set_up_logs
from atomic_balance.observe.metrics import Metrics
from atomic_balance.postgres.accounts import Accounts
from atomic_balance.postgres.accounts_csv import WRONG_LINES_MAX, export_accounts, import_accounts
from atomic_balance.postgres.connections import connection_pool
from atomic_balance.postgres.embedded import EmbeddedPostgresError, embedded_postgres
from atomic_balance.postgres.failures import MISCONFIGURED, EncodingError, UnreachableError
from atomic_balance.postgres.migrations import migrate
from atomic_balance.postgres.verify import DIFFERENCES_MAX, Money, verify
from atomic_balance.progress import progress_bar
from atomic_balance.serve.serving import BrokenError, StartError, check_schema, listen, run, serve
from atomic_balance.serve.signals import outlive_other_signals, stop_on_signals
from atomic_balance.serve.workers import serve_with_workers
from atomic_balance.settings import Settings, WrongSettingError, read_settings

log = logging.getLogger("atomic_balance")

_VERSION = metadata.version("atomic-balance")

_OpeningBalance = Annotated[int, Meta(ge=0, le=BALANCE_LIMIT, description=f"an integer from 0 to {BALANCE_LIMIT}")]


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
    importing = commands.add_parser("import", help="open the accounts of a CSV file, all or none")
    importing.add_argument("file", help="its columns: userId,balance[,minimumBalance]; -: standard input")
    exporting = commands.add_parser("export", help="write all accounts as such a CSV file")
    exporting.add_argument("file", nargs="?", default="-", help="where to; -, or nothing: standard output")
    arguments = parser.parse_args()
    try:
        settings = read_settings()
        set_up_logs(settings.log_level)
        with _database(settings) as url:
            where = "DATABASE_URL" if settings.database_url else f"embedded PostgreSQL, data in {settings.data_dir}"
            settings = msgspec.structs.replace(
                settings, database_url=url, demo=settings.demo or settings.database_url is None
            )
            if arguments.command == "migrate":
                applied = migrate(settings.migrations_url, settings.citus, settings.database_schema)
                print("\n".join(f"applied {name}" for name in applied) or "the schema is current")
            elif arguments.command == "verify":
                run(check_schema(settings))
                sys.exit(_verify(settings))
            elif arguments.command == "open":
                run(check_schema(settings))
                run(_open_account(settings, arguments.user_id, arguments.balance))
            elif arguments.command in ("import", "export"):
                run(check_schema(settings))
                sys.exit((_import if arguments.command == "import" else _export)(settings, arguments.file))
            else:
                _serve(settings, where)
    except WrongSettingError as error:
        sys.exit(_failed(error, 2))
    except (StartError, BrokenError, EmbeddedPostgresError) as error:
        sys.exit(_failed(error, 1))
    except (UnreachableError, EncodingError, asyncpg.PostgresError, psycopg.Error, OSError) as error:
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
    """The database's URL: DATABASE_URL, or that of the embedded PostgreSQL with its schema up to date."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    bin_dir = settings.postgres_bin_dir
    with embedded_postgres(Path(settings.data_dir), Path(bin_dir) if bin_dir else None) as url:
        migrate(url, schema=settings.database_schema)
        yield url


def _serve(settings: Settings, database: str) -> None:
    try:
        run(check_schema(settings))
    except UnreachableError as error:
        if isinstance(error.__cause__, MISCONFIGURED):
            raise
        why = _first_line(error.__cause__ or error)
        log.warning("the database can't be reached: %s; not ready until it answers", why)
    listeners = listen(settings)
    host, port = listeners[0].getsockname()[:2]

    def ready() -> None:
        log.info("atomic-balance %s serves on http://%s:%s (database: %s)", _VERSION, host, port, database)

    if settings.workers > 1:
        serve_with_workers(settings, listeners, ready)
    else:
        run(_serve_alone(settings, listeners, ready))


async def _serve_alone(settings: Settings, listeners: Sequence[socket.socket], ready: Callable[[], None]) -> None:
    stop = stop_on_signals()
    tokens = Tokens(settings)
    outlive_other_signals(settings, tokens, stop)
    ready()
    numbers = shared_numbers(1)
    await serve(settings, listeners, Metrics(numbers[0], numbers), tokens, stop)


def _verify(settings: Settings) -> int:
    found = verify(settings.url, progress_bar("verify", "changes"), settings.database_schema)
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


def _import(settings: Settings, name: str) -> int:
    with _opened(name, "rb", sys.stdin.buffer) as file:
        size = os.fstat(file.fileno()).st_size if name != "-" else None
        draw = progress_bar("import", "lines" if size is None else "bytes")
        found = import_accounts(
            settings.url,
            io.TextIOWrapper(file, encoding="utf-8-sig", newline=""),
            lambda count: draw(count if size is None else file.tell(), size),
            settings.database_schema,
        )
    for wrong in found.wrong:
        print(wrong)
    if found.wrong:
        more = " at least" if len(found.wrong) == WRONG_LINES_MAX else ""
        return _failed(f"nothing was imported:{more} {len(found.wrong)} lines are wrong", 1)
    print(f"{found.opened:,} accounts opened, {found.open_already:,} were open already")
    return 0


def _export(settings: Settings, name: str) -> int:
    with _opened(name, "wb", sys.stdout.buffer) as file:
        count, held = export_accounts(settings.url, file, settings.database_schema)
    if count:
        print(f"not in the file: {count:,} open holds, which hold {held:,} of the balances", file=sys.stderr)
    return 0


@contextlib.contextmanager
def _opened(name: str, mode: str, standard: BinaryIO) -> Iterator[BinaryIO]:
    """The file `name`, or `standard` for `-`. Raises StartError."""
    if name == "-":
        yield standard
        return
    try:
        file = cast(BinaryIO, Path(name).open(mode))  # noqa: SIM115
    except OSError as error:
        raise StartError(f"{name}: {error.strerror}") from error
    with file:
        yield file


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
