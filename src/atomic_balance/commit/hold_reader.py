"""Reading holds: those that are asked for at the same time are read with one statement."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from atomic_balance.postgres.accounts import Accounts, Hold

_HOLDS_PER_READ = 1_000


class _Asked(NamedTuple):
    user_id: int
    hold_id: str
    future: asyncio.Future[Hold | None]


class HoldReader:
    """Reads holds; to be entered as `async with HoldReader(...).running()`.

    While a statement is on its way the next holds gather, as changes do. A hold never changes after it was placed, so
    what was read of it stays true; whether it has been settled is not read, but left to the settlement's key.
    """

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._asked: list[_Asked] = []
        self._wake = asyncio.Event()

    async def read(self, user_id: int, hold_id: str) -> Hold | None:
        """A hold as it was placed; None if none was, or it was refused. Raises UnreachableError.

        It does not wait for longer than two statements may take: the one that is under way, and its own.
        """
        future: asyncio.Future[Hold | None] = asyncio.get_running_loop().create_future()
        self._asked.append(_Asked(user_id, hold_id, future))
        self._wake.set()
        return await future

    @asynccontextmanager
    async def running(self) -> AsyncIterator["HoldReader"]:
        """Read until the end; who asks after that is not answered."""
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._read_all())
            yield self
            reading.cancel()

    async def _read_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._asked:
                waiting = [asked for asked in self._asked if not asked.future.done()]
                batch, self._asked = waiting[:_HOLDS_PER_READ], waiting[_HOLDS_PER_READ:]
                try:
                    holds = await self._accounts.placed_holds([(one.user_id, one.hold_id) for one in batch])
                except Exception as error:  # noqa: BLE001 - it belongs to those who asked, who tell faults apart
                    for asked in (*batch, *self._asked):  # who has come meanwhile would wait for the same again
                        if not asked.future.done():
                            asked.future.set_exception(error)
                    self._asked.clear()
                else:
                    for asked, hold in zip(batch, holds, strict=True):
                        if not asked.future.done():
                            asked.future.set_result(hold)
