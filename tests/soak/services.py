"""Two services on one database, to be killed and started again where they were."""

import asyncio
import contextlib
import signal
from pathlib import Path

from tests.processes import Service, running_service
from tests.soak.asking import PATIENCE_SECONDS

_SETTINGS = {"DEADLINE_SECONDS": "3", "STATEMENT_SECONDS": "1", "CONNECT_SECONDS": "5"}
_OWN_SETTINGS: tuple[dict[str, str], ...] = ({}, {})


class Services:
    """The services, which work in `directory`. `urls`: where they answer, also after a restart."""

    def __init__(self, database_url: str, directory: Path) -> None:
        self.urls: list[str] = []
        self._environments = [{"DATABASE_URL": database_url, **_SETTINGS, **own} for own in _OWN_SETTINGS]
        self._directory = directory
        self._stacks = [contextlib.AsyncExitStack() for _ in _OWN_SETTINGS]
        self._running: list[Service] = []

    async def start(self) -> None:
        """Start all of them."""
        for index in range(len(self._stacks)):
            service = await self._started(index)
            self._running.append(service)
            self.urls.append(service.url)
            self._environments[index]["PORT"] = service.url.rsplit(":", 1)[1]

    async def restart(self, index: int, how: signal.Signals) -> None:
        """End one of them by a signal, and start it again on its port."""
        service = self._running[index]
        service.process.send_signal(how)
        async with asyncio.timeout(PATIENCE_SECONDS):
            status = await service.process.wait()
        assert status == (0 if how is signal.SIGTERM else -how), f"the service ended with {status}: {service.log[-5:]}"
        await self._stacks[index].aclose()
        self._running[index] = await self._started(index)

    async def stop(self) -> None:
        """Stop all of them."""
        for stack in self._stacks:
            await stack.aclose()

    async def _started(self, index: int) -> Service:
        """Start one, and again if its database did not answer in time, as whoever runs a service does."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    return await self._stacks[index].enter_async_context(
                        running_service(self._environments[index], self._directory)
                    )
                except ExceptionGroup as error:
                    if "the service did not start: atomic-balance: database: " not in str(error.exceptions):
                        raise
