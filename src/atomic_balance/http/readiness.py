"""Whether changes should be sent to this process, and why not."""

import asyncio
from typing import NamedTuple

from atomic_balance.commit.group_commit import GroupCommit
from atomic_balance.postgres.accounts import Accounts
from atomic_balance.postgres.failures import UnreachableError

_PROBE_SECONDS = 1.0
"""The longest wait for the database, because whoever asks for readiness waits no longer."""


class Checks(NamedTuple):
    """Whether to send changes to this process, and what each check says: "ok", or what is wrong."""

    ready: bool
    says: dict[str, str]


class ReadinessProbe:
    """Checks when it is asked, and remembers since when the database has been away.

    A change waits up to `deadline_seconds` for a database that is away, and for that long this process stays ready:
    otherwise all processes that share the database would be out of service together.
    """

    def __init__(
        self, accounts: Accounts, group_commit: GroupCommit, stopping: asyncio.Event, deadline_seconds: float
    ) -> None:
        self._accounts = accounts
        self._group_commit = group_commit
        self._stopping = stopping
        self._deadline_seconds = deadline_seconds
        self._away_since: float | None = None
        self._schema = "not known"
        self._asking: asyncio.Task[list[str]] | None = None

    async def check(self) -> Checks:
        """Every check, now."""
        database, tolerable = await self._check_database()
        failing_seconds = self._group_commit.failing_seconds
        says = {
            "stopping": "yes" if self._stopping.is_set() else "ok",
            "overload": "no place for a change to wait" if self._group_commit.full else "ok",
            "database": database,
            "commits": f"none has succeeded for {failing_seconds:.1f} s" if failing_seconds else "ok",
            "schema": self._schema,
        }
        for_now = {"database": tolerable, "commits": failing_seconds < self._deadline_seconds}
        return Checks(all(text == "ok" or for_now.get(name, False) for name, text in says.items()), says)

    async def close(self) -> None:
        """End the query that may be under way."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})

    async def _check_database(self) -> tuple[str, bool]:
        """Query the schema; gives what to say of the database, and whether the process can be ready all the same.

        One query is under way at a time. One without an answer is left to run, because cancelling it takes as long.
        """
        if self._asking is None:
            self._asking = asyncio.create_task(self._accounts.missing_migrations())
        asking = self._asking
        await asyncio.wait({asking}, timeout=_PROBE_SECONDS)
        if asking.done() and self._asking is asking:
            self._asking = None
        failure = asking.exception() if asking.done() else UnreachableError()
        if isinstance(failure, UnreachableError):
            now = asyncio.get_running_loop().time()
            if self._away_since is None:
                self._away_since = now
            away_seconds = now - self._away_since
            text = str(failure) or f"has not answered for {away_seconds:.1f} s"
            return text, not str(failure) and away_seconds < self._deadline_seconds
        missing = asking.result()
        self._away_since = None
        self._schema = f"behind, without {', '.join(missing)}" if missing else "ok"
        return "ok", True
