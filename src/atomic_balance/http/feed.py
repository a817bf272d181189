"""The feed: every applied change of all accounts, and the callers who wait for the next one."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import NamedTuple, TypeAlias

import msgspec
from aiohttp import web

from atomic_balance.http.errors import ApiError
from atomic_balance.http.handlers import answer_with, journal_entry
from atomic_balance.http.messages import FeedEntry, FeedPage, FeedQuery
from atomic_balance.http.parsing import parse_query
from atomic_balance.postgres.accounts import Accounts, FeedPlace, JournalRow
from atomic_balance.postgres.failures import UnreachableError

log = logging.getLogger("atomic_balance")

FEED: "web.AppKey[Feed | None]" = web.AppKey("feed")
"""None where no feed is offered."""
WAITING_MAX = 1_000

_WAITING_PERIOD_SECONDS = 0.1
_PERIOD_SECONDS = 5.0
_COMPLAINT_SECONDS = 60.0  # what is wrong stays wrong, and a line each time says no more

Rows: TypeAlias = list[tuple[FeedPlace, JournalRow]]


class _Asked(NamedTuple):
    after: FeedPlace
    count_max: int


class Feed:
    """Reads the feed; to be entered as `async with Feed(...).running()`.

    While callers wait, one question each tenth of a second serves all of them, and a page that several wait for is read
    once. `lag_seconds`: for how long the oldest change has been committed that an older transaction holds back.
    """

    def __init__(self, accounts: Accounts, draining: asyncio.Event) -> None:
        self.lag_seconds = 0.0
        self._accounts = accounts
        self._draining = draining
        self._waiting: dict[asyncio.Future[Rows], _Asked] = {}
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._complain_at = float("-inf")

    @property
    def waiting_count(self) -> int:
        """How many callers wait."""
        return len(self._waiting)

    async def read(self, after: FeedPlace, count_max: int, wait_seconds: float) -> Rows:
        """The first `count_max` applied changes after a place, each with its own; none: nothing came for so long.

        When the process is about to stop it no longer waits. Raises UnreachableError, and ApiError if too many wait.
        """
        rows = await self._accounts.feed(after, count_max)
        if rows or not wait_seconds or self._draining.is_set():
            return rows
        if self.waiting_count >= WAITING_MAX:
            raise ApiError("unavailable")
        future: asyncio.Future[Rows] = self._loop.create_future()
        self._waiting[future] = _Asked(after, count_max)
        self._wake.set()
        try:
            async with asyncio.timeout(wait_seconds):
                return await future
        except TimeoutError:
            return []
        finally:
            del self._waiting[future]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Feed"]:
        """Look for those who wait, until the end."""
        async with asyncio.TaskGroup() as tasks:
            looking = [tasks.create_task(work()) for work in (self._look, self._keep_ascending, self._let_go)]
            yield self
            for task in looking:
                task.cancel()

    async def _look(self) -> None:
        """Ask how far the feed goes: seldom for the sake of the lag alone, often while somebody waits."""
        while True:
            self._wake.clear()
            try:
                await self._answer()
            except Exception as error:  # noqa: BLE001 - it belongs to those who wait, who tell faults apart
                self._fail(error)
            if self._waiting:
                await asyncio.sleep(_WAITING_PERIOD_SECONDS)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PERIOD_SECONDS):
                        await self._wake.wait()

    async def _answer(self) -> None:
        head, self.lag_seconds = await self._accounts.feed_head()
        # Positions up to the head are complete, so whoever has read up to it has nothing to read.
        behind = {asked for asked in self._waiting.values() if asked.after.position < head}
        for asked in behind:
            rows = await self._accounts.feed(*asked)
            for future, its in self._waiting.items():
                if rows and its == asked and not future.done():
                    future.set_result(rows)

    def _fail(self, error: Exception) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_exception(error)
        self._complain(error)

    async def _keep_ascending(self) -> None:
        """Lanes see to it when they connect; behind a pooler nobody learns that it has gone to another server."""
        while True:
            try:
                await self._accounts.keep_feed_ascending()
            except Exception as error:  # noqa: BLE001 - the next round tries again, whatever it was
                self._complain(error)
            await asyncio.sleep(_PERIOD_SECONDS)

    async def _let_go(self) -> None:
        """When the process is about to stop, answer all who wait."""
        await self._draining.wait()
        for future in self._waiting:
            if not future.done():
                future.set_result([])

    def _complain(self, error: Exception) -> None:
        if self._loop.time() >= self._complain_at:
            self._complain_at = self._loop.time() + _COMPLAINT_SECONDS
            known = isinstance(error, UnreachableError)
            cause = error.__cause__ if known else error
            log.warning("the feed could not be looked at, which is tried again: %r", cause, exc_info=not known)


async def read_feed(request: web.Request) -> web.Response:
    """GET /api/changes: applied changes of all accounts, oldest first, and where they end."""
    asked = parse_query(FeedQuery, request)
    feed = request.app[FEED]
    if feed is None:
        raise ApiError("feed_not_offered")
    after = FeedPlace(*map(int, asked.after.split("."))) if asked.after else FeedPlace()
    rows = await feed.read(after, asked.limit, asked.wait)
    last = rows[-1][0] if rows else after
    return answer_with(FeedPage([_entry(*row) for row in rows], ".".join(map(str, last))))


def _entry(place: FeedPlace, row: JournalRow) -> FeedEntry:
    return FeedEntry(user_id=place.user_id, **msgspec.structs.asdict(journal_entry(row)))
