"""Two services on one database, one of them with workers: killed, stopped, reloaded, and started where they were."""

import asyncio
import contextlib
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.processes import Service, running_service
from tests.soak.asking import PATIENCE_SECONDS

WITH_WORKERS = 1
"""Which of the services has workers."""

_WORKERS = 2
# asyncpg shields the reset of a connection that is given back: when whoever gave it back is cancelled, nobody takes its
# failure, which is logged and has no consequence.
_ASYNCPGS_OWN = "coro=<PoolConnectionHolder.release() done"
_SETTINGS = {"DEADLINE_SECONDS": "3", "STATEMENT_SECONDS": "1", "CONNECT_SECONDS": "5"}
_OWN_SETTINGS: tuple[dict[str, str], ...] = ({}, {"WORKERS": str(_WORKERS)})


class Services:
    """The services, which work in `directory`.

    `urls`: where they answer, also after a restart; `logs`: what each of them has logged since a start.
    """

    def __init__(self, database_url: str, directory: Path, tokens: Sequence[str]) -> None:
        self.urls: list[str] = []
        self.logs: list[list[str]] = []
        self._environments = [{"DATABASE_URL": database_url, **_SETTINGS, **own} for own in _OWN_SETTINGS]
        self._directory = directory
        self._stacks = [contextlib.AsyncExitStack() for _ in _OWN_SETTINGS]
        self._running: list[Service] = []
        self._write(tokens)

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
        workers = _children(service)
        service.process.send_signal(how)
        async with asyncio.timeout(PATIENCE_SECONDS):
            status = await service.process.wait()
        assert status == (0 if how is signal.SIGTERM else -how), f"the service ended with {status}: {service.log[-5:]}"
        await _until("workers end without their parent", service, lambda: not any(map(_is_alive, workers)))
        await self._stacks[index].aclose()
        self._running[index] = await self._started(index)

    async def accept(self, tokens: Sequence[str]) -> None:
        """Have all of them accept these tokens and no others."""
        self._write(tokens)
        for index in range(len(self._running)):
            await self.reload(index)

    async def reload(self, index: int) -> None:
        """Have one of them read its tokens; where there are workers, new ones take the places of all there are."""
        service = self._running[index]
        lines, before = len(service.log), _children(service)
        service.process.send_signal(signal.SIGHUP)
        said = "SIGHUP: the tokens are"
        await _until(said, service, lambda: any(said in line for line in service.log[lines:]))
        await _until("replaced workers end", service, lambda: not any(map(_is_alive, before)))

    async def kill_worker(self, chance: random.Random) -> None:
        """Kill a worker, and wait until there is another one."""
        service = self._running[WITH_WORKERS]
        await _until("there are workers", service, lambda: len(_children(service)) >= _WORKERS)
        victim = chance.choice(_children(service))
        victim.kill()
        await _until(
            "another worker is there", service, lambda: not _is_alive(victim) and len(_children(service)) >= _WORKERS
        )

    async def freeze(self, index: int, seconds: float) -> None:
        """Have one of them stand still for so long, with its workers."""
        service = self._running[index]
        processes = [psutil.Process(service.process.pid), *_children(service)]
        for process in processes:
            _signal(process, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            for process in processes:
                _signal(process, signal.SIGCONT)

    async def stop(self) -> None:
        """Stop all of them."""
        for stack in self._stacks:
            await stack.aclose()

    def _write(self, tokens: Sequence[str]) -> None:
        new = self._directory / ".env.new"
        new.write_text(f"API_TOKEN={','.join(tokens)}\n")
        new.rename(self._directory / ".env")  # in one piece: imports read it too

    async def _started(self, index: int) -> Service:
        """Start one, and again if its database did not answer in time, as whoever runs a service does."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    service = await self._stacks[index].enter_async_context(
                        running_service(self._environments[index], self._directory)
                    )
                except ExceptionGroup as error:
                    if "the service did not start: atomic-balance: database: " not in str(error.exceptions):
                        raise
                else:
                    self.logs.append(service.log)
                    return service


def judge_logs(logs: list[list[str]]) -> list[str]:
    """What services have logged of faults of their own, a line each: those of others are told without a traceback."""
    return [
        f"a service had a fault: {line.strip()}"
        for log in logs
        for line in log
        if "Traceback" in line and _ASYNCPGS_OWN not in line
    ]


def _children(service: Service) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(service.process.pid).children()
    return []


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


async def _until(what: str, service: Service, happened: Callable[[], bool]) -> None:
    """Wait until it has happened; raises AssertionError with the service's last lines if it does not."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not happened():  # noqa: ASYNC110 - it is seen from outside of the service
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"did not happen in {PATIENCE_SECONDS} s: {what}: {service.log[-5:]}") from None
