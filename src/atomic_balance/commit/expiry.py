"""Settling the holds whose time is over: by the process whose turn it is, through the group commit like any change."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from functools import partial

from atomic_balance.changes import Applied, Outcome, Undecided, release
from atomic_balance.commit.group_commit import GroupCommit
from atomic_balance.postgres.accounts import Accounts, ExpiredHold
from atomic_balance.postgres.failures import UnreachableError

log = logging.getLogger("atomic_balance")

_PERIOD_SECONDS = 0.5  # the money of an expired hold is to be free within a second
_COUNT_SECONDS = 10.0  # counting reads the whole list of open holds
_COMPLAINT_SECONDS = 60.0  # what is wrong stays wrong, and a line each half a second says no more
_FAILED_SECONDS = 60.0  # a settlement that failed for what is in it is not tried again at once
_HOLDS_PER_READ = 1_000
_OVERDUE_COUNT_MAX = 10_000
_UNDER_WAY_PER_ACCOUNT_MAX = 100  # one that is blocked keeps neither other accounts' holds waiting, nor its callers out


class Expiry:
    """Settles expired holds; to be entered as `async with Expiry(...).running()`.

    One process at a time has the turn, because several that settle the same holds make each other's whole batches fail.
    If it dies, another one has the turn two seconds later. `under_way_max`: how many settlements may wait at a time, a
    share of the places, so that callers find theirs. `open_holds`, `held`: how many are open and what they hold
    together, as last counted by this process; 0 while others have the turn. `overdue_holds`: how many expired over a
    second ago, as each process counts them, whoever has the turn.
    """

    def __init__(self, accounts: Accounts, group_commit: GroupCommit, under_way_max: int) -> None:
        self.open_holds = 0
        self.held = 0.0
        self.overdue_holds = 0
        self._accounts = accounts
        self._group_commit = group_commit
        self._under_way_max = under_way_max
        self._under_way_count = 0
        self._holder = secrets.token_hex(16)
        self._under_way: dict[int, set[str]] = {}  # by account: the ids of holds whose settlements are submitted
        self._full: set[int] = set()  # accounts of which so many are under way that others wait until they are done
        self._failed: dict[tuple[int, str], float] = {}  # when they may be tried again
        self._wake = asyncio.Event()
        self._has_turn = False
        self._count_at = float("-inf")
        self._complain_at = float("-inf")
        self._loop = asyncio.get_running_loop()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Expiry"]:
        """Settle what expires until the end."""
        async with asyncio.TaskGroup() as tasks:
            settling = tasks.create_task(self._settle_all())
            yield self
            settling.cancel()

    async def _settle_all(self) -> None:
        while True:
            self._wake.clear()  # whoever has the turn: or a process without it would never pause
            try:
                has_turn = self._can_settle() and await self._accounts.take_expiry_turn(self._holder)
                if has_turn:
                    await self._settle_expired()
            except Exception as error:  # noqa: BLE001 - the next round tries again, whatever it was
                has_turn = False
                self._complain(error)
            if has_turn is not self._has_turn or self._loop.time() - self._count_at >= _COUNT_SECONDS:
                await self._count(has_turn)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PERIOD_SECONDS):
                    await self._wake.wait()

    def _can_settle(self) -> bool:
        """Whether this process could have changes applied now; if not, another one should have the turn."""
        return not (self._group_commit.full or self._group_commit.failing_seconds)

    async def _settle_expired(self) -> None:
        """Submit the settlement of every hold that has expired, if that is not under way already."""
        after: ExpiredHold | None = None
        while True:
            expired = await self._accounts.expired_holds(after, self._full, _HOLDS_PER_READ)
            for hold in expired:
                if self._under_way_count >= self._under_way_max or not self._submit(hold):
                    return
            if len(expired) < _HOLDS_PER_READ:
                return
            after = expired[-1]

    def _submit(self, hold: ExpiredHold) -> bool:
        """Submit a settlement, unless it is under way or has just failed; gives whether there was a place for it."""
        of_account = self._under_way.setdefault(hold.user_id, set())
        if hold.hold_id in of_account or hold.user_id in self._full:
            return True
        if self._loop.time() < self._failed.get((hold.user_id, hold.hold_id), 0):
            return True
        of_account.add(hold.hold_id)
        self._under_way_count += 1
        if len(of_account) == _UNDER_WAY_PER_ACCOUNT_MAX:
            self._full.add(hold.user_id)
        future = self._group_commit.submit(release(hold.user_id, hold.hold_id, hold.amount, expired=True))
        future.add_done_callback(partial(self._ended, hold))
        return not (future.done() and future.result() is Undecided.TURNED_AWAY)

    def _ended(self, hold: ExpiredHold, future: asyncio.Future[Outcome]) -> None:
        if future.result() is Undecided.FAILED:
            self._failed[hold.user_id, hold.hold_id] = self._loop.time() + _FAILED_SECONDS
        else:
            self._failed.pop((hold.user_id, hold.hold_id), None)
        self._under_way_count -= 1
        of_account = self._under_way[hold.user_id]
        of_account.remove(hold.hold_id)
        if of_account:
            return
        del self._under_way[hold.user_id]
        if hold.user_id in self._full:
            self._full.remove(hold.user_id)
            if isinstance(future.result(), Applied):  # or else it is tried again later
                self._wake.set()

    async def _count(self, has_turn: bool) -> None:
        try:
            self.overdue_holds = await self._accounts.count_overdue_holds(_OVERDUE_COUNT_MAX)
            self.open_holds, self.held = await self._accounts.count_open_holds() if has_turn else (0, 0.0)
        except Exception as error:  # noqa: BLE001 - the next round tries again, whatever it was
            self._complain(error)
        else:
            self._count_at = self._loop.time()
            self._has_turn = has_turn

    def _complain(self, error: Exception) -> None:
        if self._loop.time() >= self._complain_at:
            self._complain_at = self._loop.time() + _COMPLAINT_SECONDS
            known = isinstance(error, UnreachableError)
            cause = error.__cause__ if known else error
            log.warning("expired holds could not be settled, and are tried again: %r", cause, exc_info=not known)
