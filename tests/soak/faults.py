"""What can go wrong: with the database, with the network, and with the services, each beside the other two."""

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import psycopg

from tests.fault_proxy import FaultProxy, Link
from tests.killable import KillableServer
from tests.soak.accounts import BUSY
from tests.soak.asking import Caller
from tests.soak.disk import SmallDisk
from tests.soak.services import WITH_WORKERS, Services

_CALM_SECONDS = (0.3, 3.0)
"""The shortest and the longest time between two faults of a kind."""

Fault = Callable[[], Awaitable[None]]


class Faults:
    """Breaks things. `counts`: how often each of them was broken; `wrong`: what may not follow and did, a line each."""

    def __init__(
        self,
        server: KillableServer,
        disk: SmallDisk | None,
        proxy: FaultProxy,
        services: Services,
        caller: Caller,
        chance: random.Random,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._caller = caller
        self._server = server
        self._disk = disk
        self._proxy = proxy
        self._services = services
        self._chance = chance

    def streams(self) -> list[Sequence[Fault]]:
        """The faults; those of one stream come one after the other, each stream beside the others."""
        return [
            (self.postmaster_killed, self.backend_killed, self.row_blocked, *([self.disk_full] if self._disk else [])),
            (self.connections_cut, self.answers_lost, self.half_open, self.latency),
            (
                self.service_killed,
                self.service_stopped,
                self.service_frozen,
                self.worker_killed,
                self.workers_replaced,
                self.token_rotated,
            ),
        ]

    async def inject(self, faults: Sequence[Fault], until: float) -> None:
        """Do one after the other until the time is over; what was broken is whole again at the end."""
        due: list[Fault] = []
        while time.monotonic() < until:
            await asyncio.sleep(self._chance.uniform(*_CALM_SECONDS))
            due = due or self._chance.sample(faults, len(faults))  # each of them before any comes again
            fault = due.pop()
            await fault()
            self.counts[fault.__name__.replace("_", " ")] += 1

    async def postmaster_killed(self) -> None:
        """PostgreSQL is killed, and started again at once or after longer than a change waits."""
        self._server.kill()
        await asyncio.sleep(self._chance.choice((0, 0, 0.5, 4)))
        await asyncio.to_thread(self._server.start)

    async def backend_killed(self) -> None:
        """One backend is killed; the server ends the others, and recovers."""
        await self._server.kill_backend()

    async def row_blocked(self) -> None:
        """Another session holds a row, for less or for longer than a change waits."""
        connection = await self._server.connection()
        with contextlib.suppress(psycopg.OperationalError):
            await connection.execute("UPDATE users SET balance = balance WHERE id = %s", (self._chance.choice(BUSY),))
            await asyncio.sleep(self._chance.choice((0.5, 4)))
        await connection.close()

    async def disk_full(self) -> None:
        """There is no room for another page of any table or index, for less or for longer than a change waits."""
        assert self._disk
        await asyncio.to_thread(self._disk.fill)
        try:
            await asyncio.sleep(self._chance.choice((1, 4)))
        finally:
            self._disk.make_room()

    async def connections_cut(self) -> None:
        """Every connection to the database breaks."""
        self._proxy.cut()

    async def answers_lost(self) -> None:
        """What the database is asked arrives, and no answer comes back."""
        await self._freeze(Link.swallow_answers)

    async def half_open(self) -> None:
        """Both sides believe that they are connected, and nothing arrives."""
        await self._freeze(Link.swallow)

    async def latency(self) -> None:
        """Every packet takes its time."""
        self._proxy.latency_seconds = self._chance.choice((0.005, 0.05))
        await asyncio.sleep(1)
        self._proxy.latency_seconds = 0

    async def service_killed(self) -> None:
        """A service dies."""
        await self._services.restart(self._chance.randrange(2), signal.SIGKILL)

    async def service_stopped(self) -> None:
        """A service is stopped, as for an upgrade."""
        await self._services.restart(self._chance.randrange(2), signal.SIGTERM)

    async def service_frozen(self) -> None:
        """A service stands still, for less or for longer than a change waits, and goes on."""
        await self._services.freeze(self._chance.randrange(2), self._chance.choice((1, 4)))

    async def worker_killed(self) -> None:
        """A worker dies; its service replaces it."""
        await self._services.kill_worker(self._chance)

    async def workers_replaced(self) -> None:
        """A service replaces all of its workers."""
        await self._services.reload(WITH_WORKERS)

    async def token_rotated(self) -> None:
        """A new token beside the old one, the callers take it, and the old one goes: no request may be turned away."""
        old, new = self._caller.token, f"token-{self.counts['token rotated'] + 1}"
        await self._services.accept([old, new])
        await self._caller.move(new)
        await self._services.accept([new])
        for url in self._services.urls:
            if (status := await self._caller.status_with(url, old)) not in (0, 401):
                self.wrong.append(f"a token that was taken back is still taken: {url}, {status}")

    async def _freeze(self, how: Callable[[Link], None]) -> None:
        """Do this to every connection there is, and cut it later, as keepalives do, or it would be kept for ever."""
        frozen = list(self._proxy.links)
        for link in frozen:
            how(link)
        await asyncio.sleep(self._chance.choice((0.5, 3)))
        for link in frozen:
            link.cut()
