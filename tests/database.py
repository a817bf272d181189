"""A test's database, seen and disturbed from outside the service."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.fault_proxy import FaultProxy

_PATIENCE_SECONDS = 15
_POLL_SECONDS = 0.01


class Row(NamedTuple):
    """A row of the journal; `refusal` None if the change was applied."""

    version: int | None
    amount: int
    balance: int
    key: str
    reference: str | None
    refusal: str | None


class Database:
    """A database and a session of its own on it, which is not one of the service's. Its calls don't wait for locks."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = conninfo_to_dict(url)["dbname"]
        self._connection = psycopg.connect(url, autocommit=True)

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def execute(self, statement: str, *arguments: object) -> list[Any]:
        """Run a statement, and commit it."""
        cursor = self._connection.execute(statement.encode(), arguments or None)
        return cursor.fetchall() if cursor.description else []

    def open(self, balances: dict[int, int]) -> None:
        """Open accounts."""
        for user_id, balance in balances.items():
            self.execute(
                "INSERT INTO users (id, balance, opening_balance) VALUES (%s, %s, %s)", user_id, balance, balance
            )

    def configure(self, setting: str, value: str) -> None:
        """Set a server setting for the sessions that begin from now on."""
        self.execute(f"ALTER DATABASE {self.name} SET {setting} = '{value}'")

    def balance(self, user_id: int) -> int:
        """What an account has now."""
        return int(self.execute("SELECT balance FROM users WHERE id = %s", user_id)[0][0])

    def accounts(self) -> dict[int, tuple[int, int]]:
        """Version and balance of every account, by its user's id, all at one moment."""
        rows = self.execute("SELECT id, version, balance FROM users")
        return {user_id: (version, balance) for user_id, version, balance in rows}

    def journal(self, user_id: int) -> list[Row]:
        """What the journal holds for an account: the applied changes in order, then the refused ones."""
        rows = self.execute(
            "SELECT version, amount, balance, idempotency_key, reference, refusal FROM balance_changes"
            " WHERE user_id = %s ORDER BY version, created_at",
            user_id,
        )
        return [Row(*row) for row in rows]

    @contextlib.contextmanager
    def session(self, *statements: str) -> Iterator[psycopg.Connection]:
        """Another session, in a transaction that has run `statements`; rolled back at the end unless committed."""
        with contextlib.closing(psycopg.connect(self.url)) as connection:
            for statement in statements:
                connection.execute(statement.encode())
            yield connection

    def holding(self, user_id: int) -> contextlib.AbstractContextManager[psycopg.Connection]:
        """Another session, which holds the row of an account until the end or until it commits."""
        return self.session(f"UPDATE users SET balance = balance WHERE id = {user_id}")

    def blocked(self) -> list[int]:
        """The service's backends that wait for a lock."""
        return self._backends("wait_event_type = 'Lock'")

    def connected(self) -> list[int]:
        """The service's backends."""
        return self._backends("true")

    def fail(self, condition: str, code: str, times: int = 2**31, at_commit: bool = False) -> None:
        """Have the server raise `code` for a change whose journal row, NEW, meets `condition`, the first `times` times.

        `at_commit`: not before the statement has succeeded and its transaction is to be committed.
        """
        kind, when = ("CONSTRAINT TRIGGER", "AFTER") if at_commit else ("TRIGGER", "BEFORE")
        self.execute(
            f"""
            CREATE SEQUENCE raised;  -- which a rollback does not turn back
            CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF ({condition}) AND nextval('raised') <= {times} THEN
                    RAISE EXCEPTION 'on purpose' USING ERRCODE = '{code}';
                END IF;
                RETURN NEW;
            END $$;
            CREATE {kind} fail {when} INSERT ON balance_changes {"DEFERRABLE INITIALLY DEFERRED" if at_commit else ""}
               FOR EACH ROW EXECUTE FUNCTION fail();
            """
        )

    def failures(self) -> int:
        """How many times what `fail` looks for has been met."""
        return int(self.execute("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM raised")[0][0])

    def heal(self) -> None:
        """Let everything succeed again."""
        self.execute("DROP TRIGGER fail ON balance_changes")

    @contextlib.asynccontextmanager
    async def proxied(self) -> AsyncIterator[tuple[FaultProxy, str]]:
        """A proxy before the server, and the URL of this database through it."""
        socket = Path(str(conninfo_to_dict(self.url)["host"]), ".s.PGSQL.5432")
        async with FaultProxy(socket).running() as proxy:
            yield proxy, f"postgresql://postgres@127.0.0.1:{proxy.port}/{self.name}?sslmode=disable"

    def _backends(self, condition: str) -> list[int]:
        rows = self.execute(
            "SELECT pid FROM pg_stat_activity"
            f" WHERE datname = current_database() AND application_name = 'atomic-balance' AND {condition}"
        )
        return [pid for (pid,) in rows]


async def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` is true."""
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - it is asked of a database
            await asyncio.sleep(_POLL_SECONDS)
