"""Settling the holds whose time is over: by the process whose turn it is, through the group commit like any change."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from atomic_balance.changes import Outcome, release
from atomic_balance.commit.group_commit import GroupCommit
from atomic_balance.postgres.accounts import Accounts, ExpiredHold
from atomic_balance.postgres.failures import UnreachableError

log = logging.getLogger("atomic_balance")

_PERIOD_SECONDS = 0.5  # the money of an expired hold is to be free within a second
_COUNT_SECONDS = 10.0  # counting reads the whole list of open holds
_HOLDS_PER_READ = 1_000
_UNDER_WAY_MAX = 10_000  # of accounts that are blocked, say: those that come after them are not kept waiting


class Expiry:
    """Settles expired holds; to be entered as `async with Expiry(...).running()`.

    One process at a time has the turn, because several that settle the same holds make each other's whole batches fail.
    If it dies, another one has the turn two seconds later. `counts`: open holds, what they hold together, and how many
    are overdue, as last counted by this process; nothing while others have the turn.
    """

    def __init__(self, accounts: Accounts, group_commit: GroupCommit) -> None:
        self.counts: tuple[float, float, float] = (0, 0, 0)
        self._accounts = accounts
        self._group_commit = group_commit
        self._holder = secrets.token_hex(16)
        self._under_way: dict[tuple[int, str], asyncio.Future[Outcome]] = {}
        self._count_at = float("-inf")

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Expiry"]:
        """Settle what expires until the end."""
        async with asyncio.TaskGroup() as tasks:
            settling = tasks.create_task(self._settle_all())
            yield self
            settling.cancel()

    async def _settle_all(self) -> None:
        while True:
            try:
                if await self._accounts.take_expiry_turn(self._holder):
                    await self._settle_expired()
                    await self._count()
                else:
                    self.counts = (0, 0, 0)
            except UnreachableError as error:
                log.debug("expired holds wait for the database: %r", error.__cause__)
            except Exception:
                log.exception("expired holds could not be settled; they are tried again")
            await asyncio.sleep(_PERIOD_SECONDS)

    async def _settle_expired(self) -> None:
        """Submit the settlement of every hold that has expired, if that is not under way already."""
        after: ExpiredHold | None = None
        while len(self._under_way) < _UNDER_WAY_MAX:
            expired = await self._accounts.expired_holds(after, _HOLDS_PER_READ)
            for hold in expired:
                key = (hold.user_id, hold.hold_id)
                if key not in self._under_way:
                    settlement = release(hold.user_id, hold.hold_id, hold.amount, expired=True)
                    future = self._group_commit.submit(settlement)
                    self._under_way[key] = future
                    future.add_done_callback(partial(self._ended, key))
            if len(expired) < _HOLDS_PER_READ:
                break
            after = expired[-1]

    def _ended(self, key: tuple[int, str], _: asyncio.Future[Outcome]) -> None:
        del self._under_way[key]

    async def _count(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._count_at >= _COUNT_SECONDS:
            self._count_at = now
            self.counts = await self._accounts.count_open_holds()
