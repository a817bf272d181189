"""A PostgreSQL server of a test's own, to be killed and brought back under the same URL."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

from atomic_balance.postgres.embedded import embedded_postgres
from tests.schema import make_schema


def postmaster(data_dir: Path) -> int:
    """The process id of the server on `data_dir`."""
    (pid_file,) = data_dir.glob("postgres-*/postmaster.pid")
    return int(pid_file.read_text().split()[0])


def sockets_for_the_servers_user(url: str) -> Path:
    """The server's socket directory, by a path that the user whom it runs as may take though it is root's data."""
    directory = Path(str(conninfo_to_dict(url)["host"]))
    through_the_server = Path("/proc", (directory / "postmaster.pid").read_text().split()[0], "cwd")
    return through_the_server if through_the_server.exists() else directory


class KillableServer:
    """A running server. `url` stays the same from one start to the next."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._running = contextlib.ExitStack()
        self.url = ""
        self.start()

    def start(self) -> None:
        """Start it, on the data that it had."""
        self.url = self._running.enter_context(embedded_postgres(self._data_dir))

    def kill(self) -> None:
        """Kill the postmaster, for as long as the test wants it; its backends notice and go."""
        os.kill(postmaster(self._data_dir), signal.SIGKILL)
        self._running.close()  # or it would be started again

    async def kill_backend(self) -> None:
        """Kill one backend of the service; the server ends all the others, recovers, and goes on."""
        async with await self.connection() as connection:
            cursor = await connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'atomic-balance' ORDER BY random() LIMIT 1"
            )
            rows = await cursor.fetchall()
        for (pid,) in rows:
            with contextlib.suppress(ProcessLookupError):  # its client may just have left it
                os.kill(pid, signal.SIGKILL)
        await (await self.connection()).close()

    async def connection(self) -> psycopg.AsyncConnection:
        """A connection, once the server gives one: it may just be recovering."""
        async with asyncio.timeout(60):
            while True:
                try:
                    return await psycopg.AsyncConnection.connect(self.url)
                except psycopg.OperationalError:
                    await asyncio.sleep(0.02)

    def stop(self) -> None:
        """Stop it for good."""
        self._running.close()


@contextlib.contextmanager
def killable_server(data_dir: Path) -> Iterator[KillableServer]:
    """Run a server with the current schema."""
    server = KillableServer(data_dir)
    try:
        make_schema(server.url)
        yield server
    finally:
        server.stop()
