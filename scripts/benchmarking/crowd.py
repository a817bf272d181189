"""Ten thousand connections at once, each with a request that waits: what the service needs for them.

`python -m benchmarking.crowd PORT CONNECTIONS` is the crowd: it opens the connections, sends one withdrawal on each,
says so, prints how many of them were answered with 200, and stays until its input ends.
"""

import asyncio
import resource
import subprocess
import sys
import time

import psutil
import psycopg
import uvloop

from benchmarking.entrants import Stage, service, verify
from benchmarking.loads import LOADS, ROWS
from benchmarking.processes import BenchmarkError
from benchmarking.results import Crowd

CONNECTIONS = 10_000

_SPARE_DESCRIPTORS = 200
_OPENED_AT_ONCE = 200
_SETTLE_SECONDS = 2
_SENT = "sent"
_REQUEST = (
    b"POST /api/balance/update HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 24\r\n\r\n{"userId":1,"amount":-2}'
)


def measure_crowd(stage: Stage) -> Crowd:
    """Have the crowd wait for a row that another transaction holds, let the row go; look at the service's memory."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    count = CONNECTIONS if limit == resource.RLIM_INFINITY else min(CONNECTIONS, limit - _SPARE_DESCRIPTORS)
    with stage.postgres.service_database("crowd", LOADS[ROWS].balance) as url:
        with service(url, stage) as server, psycopg.connect(url) as holder:
            memory = psutil.Process(server.pid)
            before = memory.memory_info().rss
            holder.execute("SELECT FROM users WHERE id = 1 FOR UPDATE")
            with subprocess.Popen(
                [sys.executable, "-m", "benchmarking.crowd", str(server.port), str(count)],
                env=stage.environment,
                cwd=stage.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as crowd:
                lines = iter(crowd.stdout or ())
                if next(lines, "").strip() != _SENT:
                    raise BenchmarkError("the crowd could not connect")
                time.sleep(_SETTLE_SECONDS)
                waiting = memory.memory_info().rss
                holder.rollback()
                answered = int(next(lines, 0))
                time.sleep(_SETTLE_SECONDS)
                idle = memory.memory_info().rss
        if answered != count:
            raise BenchmarkError(f"of {count} connections that waited only {answered} were answered with 200")
        verify(url, stage)
    return Crowd(
        connections=count,
        connections_wanted=CONNECTIONS,
        before_mb=before / 1e6,
        waiting_mb=waiting / 1e6,
        idle_mb=idle / 1e6,
    )


async def _crowd(port: int, count: int) -> None:
    gate = asyncio.Semaphore(_OPENED_AT_ONCE)

    async def connected() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with gate:
            return await asyncio.open_connection("127.0.0.1", port)

    streams = await asyncio.gather(*(connected() for _ in range(count)))
    for _, writer in streams:
        writer.write(_REQUEST)
    await asyncio.gather(*(writer.drain() for _, writer in streams))
    print(_SENT, flush=True)
    answers = await asyncio.gather(*(reader.readline() for reader, _ in streams), return_exceptions=True)
    print(sum(isinstance(answer, bytes) and b" 200 " in answer for answer in answers), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_crowd(*map(int, sys.argv[1:])))
