"""A real PgBouncer in transaction mode, as a process of its own: started, killed, brought back, stopped by its id."""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.killable import sockets_for_the_servers_user

PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")

_START_SECONDS = 20
_CONFIGURATION = """
[databases]
* = host={sockets} user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {server_connections}
max_client_conn = 1000
"""


class PgBouncer:
    """A PgBouncer before the server of `url`; the same database through it is at `self.url`."""

    def __init__(self, url: str, port: int, server_connections: int, directory: Path) -> None:
        place = conninfo_to_dict(url)
        self.url = f"postgresql://postgres@127.0.0.1:{port}/{place['dbname']}?sslmode=disable"
        self._file = directory / "pgbouncer.ini"
        self._file.write_text(
            _CONFIGURATION.format(
                sockets=sockets_for_the_servers_user(url), port=port, server_connections=server_connections
            )
        )
        self._user = pwd.getpwuid(Path(str(place["host"])).stat().st_uid).pw_name  # whom the server lets in
        self._process: Process | None = None

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        assert PROGRAM
        as_user = ["-u", self._user] if os.geteuid() == 0 else []
        self._process = await asyncio.create_subprocess_exec(
            *(PROGRAM, "-q", *as_user, str(self._file)), stderr=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        async with asyncio.timeout(_START_SECONDS):
            while True:
                try:
                    await (await psycopg.AsyncConnection.connect(self.url)).close()
                    return
                except psycopg.OperationalError:
                    assert self._process.returncode is None, "PgBouncer did not start"
                    await asyncio.sleep(0.02)

    async def kill(self) -> None:
        """Kill it: every connection through it breaks."""
        assert self._process
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()


@contextlib.asynccontextmanager
async def running_pgbouncer(url: str, port: int, server_connections: int, directory: Path) -> AsyncIterator[PgBouncer]:
    """Run a PgBouncer with at most `server_connections` to the server."""
    pgbouncer = PgBouncer(url, port, server_connections, directory)
    await pgbouncer.start()
    try:
        yield pgbouncer
    finally:
        await pgbouncer.kill()
