"""The service's group commit in this process, on a real database, without HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from atomic_balance.commit.group_commit import GroupCommit
from atomic_balance.http import app
from atomic_balance.observe.counting import shared_numbers
from atomic_balance.settings import Settings

_PATIENCE_SECONDS = 40


@contextlib.asynccontextmanager
async def committing(settings: Settings) -> AsyncIterator[GroupCommit]:
    """Run the group commit of a service with `settings`; at the end it answers everything that it has accepted.

    A test that would wait for ever ends with a TimeoutError.
    """
    (numbers,) = shared_numbers(1)
    committer = GroupCommit(lambda: app.connect(settings), app.limits(settings), numbers)
    async with asyncio.timeout(_PATIENCE_SECONDS), committer.running():
        yield committer
