"""Reads: what accounts have now, and what they had at a time; each answer is kept and compared with the journal."""

import random
from bisect import bisect_right
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from tests.soak.accounts import HOT_USER, USERS, Accounts
from tests.soak.asking import Caller, Reply
from tests.soak.journal import Journal

_SECONDS_BACK = (6.0, 15.0)
"""How far reads look back: further than DEADLINE_SECONDS, as the documents say that one must."""


class ReadAsked(NamedTuple):
    """A read of an account as it was `at` a time (None: as it was then), and the answer.

    `exists`: whether it was known to exist before.
    """

    user_id: int
    exists: bool
    at: datetime | None
    reply: Reply


class Reads:
    """Reads accounts. `asked`: all reads, with the answers."""

    def __init__(self, caller: Caller, accounts: Accounts, chance: random.Random) -> None:
        self.asked: list[ReadAsked] = []
        self._caller = caller
        self._accounts = accounts
        self._chance = chance

    async def now(self) -> None:
        """Read an account as it is."""
        await self._read(None)

    async def past(self) -> None:
        """Read an account as it was seconds ago."""
        await self._read(datetime.now(UTC) - timedelta(seconds=self._chance.uniform(*_SECONDS_BACK)))

    async def _read(self, at: datetime | None) -> None:
        user_id = HOT_USER if self._chance.random() < 0.4 else self._chance.choice(USERS)
        exists = user_id in self._accounts.opened
        query = {"at": at.isoformat()} if at else {}
        reply = await self._caller.ask("GET", f"/api/users/{user_id}", query=query)
        self.asked.append(ReadAsked(user_id, exists, at, reply))


def judge_reads(asked: list[ReadAsked], journal: Journal) -> list[str]:
    """What was read and is not what the journal says, a line each."""
    history = journal.by_account()
    wrong = []
    for one in asked:
        account = journal.accounts.get(one.user_id)
        rows = history[one.user_id]
        status, body, _ = one.reply
        told = body.get("balance"), body.get("version")
        if status not in (0, 200, 404, 503):
            wrong.append(f"an answer that may never be given: {one}")
        elif status == 404 and (account and account.opened_at <= one.at if one.at else one.exists):
            wrong.append(f"not found though it was open: {one}, {account}")
        elif status == 200 and (account is None or (one.at and account.opened_at > one.at)):
            wrong.append(f"read before it was open: {one}, {account}")
        elif status == 200 and account:
            version = bisect_right(rows, one.at, key=lambda row: row.created_at) if one.at else body["version"]
            expected = rows[version - 1].balance if version else account.opening_balance
            if told != (expected, version):
                wrong.append(f"another balance than the journal has, {expected} in version {version}: {one}")
    return wrong
