"""The run: a database, a faulty network and two services, load and faults for a while, and then the judges."""

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from psycopg.conninfo import conninfo_to_dict

from atomic_balance.postgres.embedded import server as embedded_server
from tests.fault_proxy import FaultProxy
from tests.killable import KillableServer, killable_server
from tests.soak.asking import PATIENCE_SECONDS, Caller, session
from tests.soak.disk import Disks
from tests.soak.faults import Faults
from tests.soak.judging import counted, judge
from tests.soak.load import Load
from tests.soak.services import Services, judge_logs

_CALLERS = 40
_CONNECTIONS_MAX = "300"  # those whose ends were killed or frozen are closed late
_FIRST_TOKEN = "token-0"


async def soak(seconds: float, seed: int, directory: Path, progress: Callable[[float], None]) -> tuple[str, list[str]]:
    """Run it; gives a summary of what happened, and what was wrong, a line each.

    `directory`: an empty one, for its files. `progress` is told which share of the time is over.
    """
    chance = random.Random(seed)
    with (
        patch.dict(embedded_server._SETTINGS, max_connections=_CONNECTIONS_MAX),
        Disks().unmounted_at_the_end() as disks,
        killable_server(directory / "data") as server,
    ):
        disk = disks.small_disk(server.url)
        if disk is None:
            print("no disk becomes full: none can be mounted here, which takes root on Linux", flush=True)
        socket = Path(str(conninfo_to_dict(server.url)["host"])) / ".s.PGSQL.5432"
        async with FaultProxy(socket).running() as proxy, session() as client:
            through_proxy = f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres?sslmode=disable"
            services = Services(through_proxy, directory, [_FIRST_TOKEN])
            try:
                await services.start()
                caller = Caller(client, services.urls, _FIRST_TOKEN, random.Random(chance.random()))
                load = Load(caller, through_proxy, directory, random.Random(chance.random()))
                await load.accounts.open_first()
                faults = Faults(server, disk, proxy, services, caller, random.Random(chance.random()))
                await _under_load(seconds, load, faults, progress)
                await _holds_have_expired(server)
                await load.feed.read_to_the_end(await _changes(server))
            finally:
                await services.stop()
        summary, wrong = await asyncio.to_thread(judge, load, server.url)
        full = (directory / "data" / "postgres.log").read_text(errors="replace").count("No space left on device")
        faults_line = f"faults: {counted(faults.counts)}; PostgreSQL found no room {full:,} times"
        return f"{summary}\n{faults_line}", wrong + caller.refused + faults.wrong + judge_logs(services.logs)


async def _under_load(seconds: float, load: Load, faults: Faults, progress: Callable[[float], None]) -> None:
    """Ask and break until the time is over, and what was broken is whole again."""
    began = time.monotonic()
    until = began + seconds
    async with asyncio.TaskGroup() as tasks:
        for _ in range(_CALLERS):
            tasks.create_task(load.work(until))
        tasks.create_task(load.imports.work(until))
        for reader in load.feed.readers:
            tasks.create_task(reader.follow(until))
        injecting = [tasks.create_task(faults.inject(stream, until)) for stream in faults.streams()]
        while not all(task.done() for task in injecting):
            progress(min(0.99, (time.monotonic() - began) / seconds))
            await asyncio.sleep(0.2)
    progress(1)


async def _holds_have_expired(server: KillableServer) -> None:
    """Wait until no hold is open that has expired or will within seconds."""
    async with asyncio.timeout(PATIENCE_SECONDS), await server.connection() as connection:
        while True:
            cursor = await connection.execute(
                "SELECT EXISTS (SELECT FROM open_holds WHERE expires_at < clock_timestamp() + interval '10 seconds')"
            )
            row = await cursor.fetchone()
            await connection.commit()
            if row == (False,):
                return
            await asyncio.sleep(0.2)


async def _changes(server: KillableServer) -> int:
    """How many changes were applied."""
    async with await server.connection() as connection:
        cursor = await connection.execute("SELECT count(*) FROM balance_changes WHERE version IS NOT NULL")
        (count,) = await cursor.fetchone() or (0,)
    return int(count)
