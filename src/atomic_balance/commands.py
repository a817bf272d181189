"""The commands: each takes the settings, whose `database_url` is set, and its arguments, and gives an exit status."""

import argparse
import contextlib
import logging
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, cast

from atomic_balance.http.authorization import Tokens
from atomic_balance.observe.counting import shared_numbers
from atomic_balance.observe.metrics import Metrics
from atomic_balance.postgres.accounts import Accounts
from atomic_balance.postgres.accounts_csv import export_accounts, import_accounts
from atomic_balance.postgres.client_programs import run_client_program
from atomic_balance.postgres.connections import connection_pool
from atomic_balance.postgres.migrations import migrate
from atomic_balance.postgres.verify import DIFFERENCES_MAX, Money, verify
from atomic_balance.progress import progress_bar
from atomic_balance.serve.serving import StartError, check_schema, database_answers, listen, run, serve
from atomic_balance.serve.signals import outlive_other_signals, stop_on_signals
from atomic_balance.serve.workers import serve_with_workers
from atomic_balance.settings import Settings

log = logging.getLogger("atomic_balance")

VERSION = metadata.version("atomic-balance")
CLIENT_PROGRAMS = ("psql", "pg_dump")

Command = Callable[[Settings, argparse.Namespace], int]


def failed(why: object, status: int) -> int:
    """Say on standard error, in one line, why a command failed; gives its exit status."""
    print(f"atomic-balance: {why}", file=sys.stderr)
    return status


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _serve(settings: Settings, arguments: argparse.Namespace) -> int:
    awaits_database = not run(database_answers(settings))
    listeners = listen(settings)
    host, port = listeners[0].getsockname()[:2]

    def ready() -> None:
        log.info("atomic-balance %s serves on http://%s:%s (database: %s)", VERSION, host, port, arguments.database)

    if settings.workers > 1:
        serve_with_workers(settings, listeners, awaits_database, ready)
    else:
        run(_serve_alone(settings, listeners, awaits_database, ready))
    return 0


async def _serve_alone(
    settings: Settings, listeners: Sequence[socket.socket], awaits_database: bool, ready: Callable[[], None]
) -> None:
    stop = stop_on_signals()
    tokens = Tokens(settings)
    outlive_other_signals(settings, tokens, stop)
    ready()
    numbers = shared_numbers(1)
    await serve(settings, listeners, Metrics(numbers[0], numbers), tokens, stop, awaits_database)


def _migrate(settings: Settings, _: argparse.Namespace) -> int:
    applied = migrate(settings.migrations_url, settings.citus, settings.database_schema)
    print("\n".join(f"applied {name}" for name in applied) or "the schema is current")
    return 0


def _verify(settings: Settings, _: argparse.Namespace) -> int:
    run(check_schema(settings))
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


def _open(settings: Settings, arguments: argparse.Namespace) -> int:
    run(check_schema(settings))
    run(_open_account(settings, arguments.user_id, arguments.balance))
    return 0


async def _open_account(settings: Settings, user_id: int, balance: int) -> None:
    async with connection_pool(settings) as pool:
        found = await Accounts(pool, settings).open_account(user_id, balance, minimum_balance=0)
    print(f"user {user_id} {'opened' if found.opened else 'exists already'}, balance {found.account.balance}")


def _import(settings: Settings, arguments: argparse.Namespace) -> int:
    run(check_schema(settings))
    name = arguments.file
    with _opened(name, "rb", sys.stdin.buffer) as file:
        status = os.fstat(file.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
        draw = progress_bar("read", "lines" if size is None else "bytes")

        def progress(lines: int, ended: bool) -> None:
            done = lines if size is None else file.tell()
            if ended or done != size:  # or the full bar is drawn twice
                draw(done, done if ended else size)
            if ended and sys.stderr.isatty():
                print("opening the accounts, which takes longer", file=sys.stderr)

        found = import_accounts(settings.url, file, progress, settings.database_schema)
    for wrong in found.wrong:
        print(wrong)
    if found.wrong:
        more = found.wrong_in_all - len(found.wrong)
        if more:
            print(f"and {more:,} more")
        return failed(f"nothing was imported: {found.wrong_in_all:,} lines are wrong", 1)
    print(f"{found.opened:,} accounts opened, {found.open_already:,} were open already")
    return 0


def _export(settings: Settings, arguments: argparse.Namespace) -> int:
    run(check_schema(settings))
    with _opened(arguments.file, "wb", sys.stdout.buffer) as file:
        count, held = export_accounts(settings.url, file, settings.database_schema)
    if count:
        print(f"not in the file: {count:,} open holds, which hold {held:,} of the balances", file=sys.stderr)
    return 0


@contextlib.contextmanager
def _opened(name: str, mode: str, standard: BinaryIO) -> Iterator[BinaryIO]:
    """The file `name`, or `standard` for `-`. Raises StartError where it can't be opened, read or written."""
    try:
        if name == "-":
            yield standard
        else:
            with Path(name).open(mode) as file:
                yield cast(BinaryIO, file)
    except OSError as error:
        raise StartError(f"{name}: {error.strerror}") from error


def _run_client_program(settings: Settings, arguments: argparse.Namespace) -> int:
    bin_dir = Path(settings.postgres_bin_dir) if settings.postgres_bin_dir else None
    return run_client_program(arguments.command, arguments.passed_on, settings.url, settings.database_schema, bin_dir)


COMMANDS: Mapping[str | None, Command] = {
    None: _serve,
    "serve": _serve,
    "migrate": _migrate,
    "verify": _verify,
    "open": _open,
    "import": _import,
    "export": _export,
    **dict.fromkeys(CLIENT_PROGRAMS, _run_client_program),
}
