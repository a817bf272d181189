"""The schema: yoyo applies `sql/`, and the service checks that nothing of it is missing."""

import contextlib
import io
import os
import time
from collections.abc import Iterable
from pathlib import Path

import psycopg
import yoyo
from psycopg import sql

from atomic_balance.postgres.connections import check_encoding
from atomic_balance.postgres.statements import APPLIED_MIGRATIONS, in_schema
from atomic_balance.settings import WrongSettingError

_LOCK = 0x61746F6D6963  # "atomic", in ASCII: held while this database is being migrated
_POLL_SECONDS = 0.1
_TABLE_IN_USE = "a migration gave up and changed nothing: a transaction holds its table; migrate again after it"


def migrations_dir() -> Path:
    """The folder of the migrations: inside an installed package, `sql/` of a checkout. Raises FileNotFoundError."""
    package = Path(__file__).parents[1]
    for folder in (package / "sql", package.parents[1] / "sql"):
        if any(folder.glob("*.sql")):
            return folder
    raise FileNotFoundError("the migrations are not there: neither in the package nor in a checkout")


def missing_migrations(applied: Iterable[str], citus: bool = False) -> list[str]:
    """The migrations of this version that are not among `applied`, in order. `applied` may have newer ones too."""
    known = [
        path.stem
        for folder in _folders(citus)
        for path in sorted(folder.glob("*.sql"))
        if not path.stem.endswith(".rollback")
    ]
    there = set(applied)
    return [name for name in known if name not in there]


def _folders(citus: bool) -> list[Path]:
    folder = migrations_dir()
    return [folder, folder / "citus"] if citus else [folder]


def migrate(database_url: str, citus: bool = False, schema: str | None = None, wait_seconds: float = 60) -> list[str]:
    """Bring the schema up to date and give the names of the migrations that were applied; `citus`: those for Citus too.

    `schema`: where the tables belong, made if it is not there; None: where the search path says.

    Several processes may do so at once: one migrates, the others wait for it, polling, because a session that blocks
    for a lock would hold up CREATE INDEX CONCURRENTLY. Before anything is made it raises psycopg.Error, EncodingError,
    or WrongSettingError if somebody else's table is where ours belongs; afterwards psycopg.Error, or TimeoutError when
    another migration takes longer than `wait_seconds`, or a transaction holds a table for too long.
    """
    os.environ.setdefault("LOGNAME", "atomic-balance")  # yoyo records it, and fails where the user id has no name
    location = database_url.split("://", 1)[1]
    with psycopg.connect(f"postgresql://{location}", autocommit=True) as guard:
        check_encoding(guard.info.parameter_status("server_encoding"))
        give_up = time.monotonic() + wait_seconds
        while not _take_lock(guard):
            if time.monotonic() > give_up:
                raise TimeoutError(f"another process has been migrating for {wait_seconds} s")
            time.sleep(_POLL_SECONDS)
        if schema:
            _make_schema(guard, schema)
            location += f"{'&' if '?' in location else '?'}schema=%22{schema}%22"
        _refuse_foreign_tables(guard)
        with yoyo.get_backend(f"postgresql+psycopg://{location}") as backend:
            backend.break_lock()  # only a killed process can have left it: the others wait above
            applied: list[str] = []
            for folder in _folders(citus):
                pending = backend.to_apply(yoyo.read_migrations(str(folder)))
                with backend.lock():
                    try:
                        with contextlib.redirect_stdout(io.StringIO()):  # yoyo prints what a SELECT gives, void too
                            backend.apply_migrations(pending)
                    except psycopg.errors.LockNotAvailable:
                        raise TimeoutError(_TABLE_IN_USE) from None
                applied += [migration.id for migration in pending]
            return applied


def _take_lock(guard: psycopg.Connection) -> bool:
    row = guard.execute("SELECT pg_try_advisory_lock(%s)", (_LOCK,)).fetchone()
    return row is not None and bool(row[0])


def _make_schema(guard: psycopg.Connection, schema: str) -> None:
    """Make `schema` unless it is there, and let `guard` look into it alone."""
    if guard.execute("SELECT to_regnamespace(%s)", (schema,)).fetchone() == (None,):
        guard.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    guard.execute(sql.SQL("SET search_path TO {}").format(sql.Identifier(schema)))


def _refuse_foreign_tables(guard: psycopg.Connection) -> None:
    try:
        applied = [name for (name,) in guard.execute(in_schema(APPLIED_MIGRATIONS, None).encode())]
    except psycopg.errors.UndefinedTable:
        applied = []
    there = "SELECT current_schema() FROM pg_tables WHERE schemaname = current_schema() AND tablename = 'users'"
    found = guard.execute(there).fetchone()
    if found and "0001-users" in missing_migrations(applied):
        raise WrongSettingError(
            f"DATABASE_SCHEMA: expected a schema without a table users; {found[0]} has one that is not this service's"
        )
