"""The command line: what may be asked, and how a failure is said."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import asyncpg
import msgspec
import psycopg
from msgspec import Meta

from atomic_balance.changes import BALANCE_LIMIT, UserId
from atomic_balance.commands import CLIENT_PROGRAMS, COMMANDS, VERSION, failed, first_line
from atomic_balance.observe.logs import set_up_logs
from atomic_balance.postgres.embedded import EmbeddedPostgresError, embedded_postgres
from atomic_balance.postgres.failures import EncodingError, UnreachableError
from atomic_balance.postgres.migrations import migrate
from atomic_balance.serve.serving import BrokenError, StartError
from atomic_balance.settings import Settings, WrongSettingError, read_settings

_OpeningBalance = Annotated[int, Meta(ge=0, le=BALANCE_LIMIT, description=f"an integer from 0 to {BALANCE_LIMIT}")]


def main() -> None:
    """Run one command; exits 0, 1 if it failed, 2 for a wrong setting or argument."""
    arguments = _arguments(sys.argv[1:])
    try:
        settings = read_settings()
        set_up_logs(settings.log_level)
        embedded = settings.database_url is None
        arguments.database = f"embedded PostgreSQL, data in {settings.data_dir}" if embedded else "DATABASE_URL"
        with _database(settings, arguments.command not in CLIENT_PROGRAMS) as url:
            settings = msgspec.structs.replace(settings, database_url=url, demo=settings.demo or embedded)
            sys.exit(COMMANDS[arguments.command](settings, arguments))
    except WrongSettingError as error:
        sys.exit(failed(error, 2))
    except (StartError, BrokenError, EmbeddedPostgresError) as error:
        sys.exit(failed(error, 1))
    except (UnreachableError, EncodingError, asyncpg.PostgresError, psycopg.Error, OSError) as error:
        sys.exit(failed(f"database: {first_line(error.__cause__ or error)}", 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _arguments(given: list[str]) -> argparse.Namespace:
    """What was asked; `passed_on`: what a client program is given as it stands."""
    parser = argparse.ArgumentParser(
        prog="atomic-balance",
        description="A balance per user in PostgreSQL that is never wrong, at any concurrency.",
        epilog="Settings come from the environment and from .env; .env.example lists them all. Without DATABASE_URL "
        "the database is an embedded PostgreSQL, its data in DATA_DIR. Exit status: 0 done; 1 failed, or verify found "
        "a difference; 2 a wrong setting or argument.",
    )
    parser.add_argument("--version", action="version", version=f"atomic-balance {VERSION}")
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
    for name in CLIENT_PROGRAMS:
        commands.add_parser(name, help=f"run PostgreSQL's {name} on the database, with any arguments")
    passed_on = given[1:] if given[:1] and given[0] in CLIENT_PROGRAMS else []
    arguments = parser.parse_args(given[:1] if passed_on else given)
    arguments.passed_on = passed_on
    return arguments


@contextlib.contextmanager
def _database(settings: Settings, migrated: bool) -> Iterator[str]:
    """The database's URL: DATABASE_URL, or that of the embedded PostgreSQL, its schema up to date if `migrated`."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    bin_dir = settings.postgres_bin_dir
    with embedded_postgres(Path(settings.data_dir), Path(bin_dir) if bin_dir else None) as url:
        if migrated:
            migrate(url, schema=settings.database_schema)
        yield url


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
