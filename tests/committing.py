"""The service's group commit in this process, on a real database, without HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from aiohttp import web

from atomic_balance.changes import Outcome
from atomic_balance.commit.group_commit import GroupCommit
from atomic_balance.http.app import make_app
from atomic_balance.http.app_keys import GROUP_COMMIT
from atomic_balance.settings import Settings

_PATIENCE_SECONDS = 40


@contextlib.asynccontextmanager
async def committing(settings: Settings) -> AsyncIterator[GroupCommit]:
    """Run the group commit of a service with `settings`; at the end it answers everything that it has accepted.

    A test that would wait for ever ends with a TimeoutError.
    """
    runner = web.AppRunner(make_app(settings))
    async with asyncio.timeout(_PATIENCE_SECONDS):
        await runner.setup()
        try:
            yield runner.app[GROUP_COMMIT]
        finally:
            await runner.cleanup()


def patient(url: str) -> Settings:
    """Let a statement wait for a row as long as a test takes."""
    return Settings(database_url=url, lock_seconds=20, statement_seconds=20, deadline_seconds=30)


async def all_of(*futures: asyncio.Future[Outcome]) -> list[Outcome]:
    """What becomes of all of these changes. Raises TimeoutError if one of them is not answered."""
    async with asyncio.timeout(20):
        return await asyncio.gather(*futures)
