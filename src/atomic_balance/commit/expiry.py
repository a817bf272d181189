"""Settling the holds whose time is over: by the process whose turn it is, through the group commit like any change."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from functools import partial

from atomic_balance.changes import Applied, Outcome, release
from atomic_balance.commit.group_commit import GroupCommit
from atomic_balance.postgres.accounts import Accounts, ExpiredHold
from atomic_balance.postgres.failures import UnreachableError

log = logging.getLogger("atomic_balance")

_PERIOD_SECONDS = 0.5  # the money of an expired hold is to be free within a second
_COUNT_SECONDS = 10.0  # counting reads the whole list of open holds
_HOLDS_PER_READ = 1_000
_UNDER_WAY_MAX = 10_000  # a quarter of the places for changes that wait, as they come
_UNDER_WAY_PER_ACCOUNT_MAX = 100  # one that is blocked keeps neither other accounts' holds waiting, nor its callers out


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
        self._under_way: dict[int, set[str]] = {}  # by account: the ids of holds whose settlements are submitted
        self._full: set[int] = set()  # accounts of which so many are under way that others wait until they are done
        self._wake = asyncio.Event()
        self._count_at = float("-inf")

    @contextlib.asynccontextmanager
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
                    self._count_at = float("-inf")
            except UnreachableError as error:
                log.debug("expired holds wait for the database: %r", error.__cause__)
            except Exception:
                log.exception("expired holds could not be settled; they are tried again")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PERIOD_SECONDS):
                    await self._wake.wait()

    async def _settle_expired(self) -> None:
        """Submit the settlement of every hold that has expired, if that is not under way already."""
        self._wake.clear()
        after: ExpiredHold | None = None
        while sum(map(len, self._under_way.values())) < _UNDER_WAY_MAX:
            expired = await self._accounts.expired_holds(after, self._full, _HOLDS_PER_READ)
            for hold in expired:
                self._submit(hold)
            if len(expired) < _HOLDS_PER_READ:
                break
            after = expired[-1]

    def _submit(self, hold: ExpiredHold) -> None:
        of_account = self._under_way.setdefault(hold.user_id, set())
        if hold.hold_id in of_account or hold.user_id in self._full:
            return
        of_account.add(hold.hold_id)
        if len(of_account) == _UNDER_WAY_PER_ACCOUNT_MAX:
            self._full.add(hold.user_id)
        future = self._group_commit.submit(release(hold.user_id, hold.hold_id, hold.amount, expired=True))
        future.add_done_callback(partial(self._ended, hold))

    def _ended(self, hold: ExpiredHold, future: asyncio.Future[Outcome]) -> None:
        of_account = self._under_way[hold.user_id]
        of_account.remove(hold.hold_id)
        if of_account:
            return
        del self._under_way[hold.user_id]
        if hold.user_id in self._full:
            self._full.remove(hold.user_id)
            if isinstance(future.result(), Applied):  # or else it is tried again later
                self._wake.set()

    async def _count(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._count_at >= _COUNT_SECONDS:
            self._count_at = now
            self.counts = await self._accounts.count_open_holds()
