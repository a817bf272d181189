"""The accounts of the soak test: who there is, who is asked for more often than others, and openings under load."""

import asyncio
import random
from collections.abc import Sequence

from atomic_balance.changes import BALANCE_LIMIT
from tests.soak.asking import PATIENCE_SECONDS, Caller, Reply
from tests.soak.journal import Journal

HOT_USER = 1
BUSY = (1, 2, 3)
"""Users who pay and are paid more often than others; their rows are blocked now and then."""
USERS = range(1, 60)
FULL_USER = 60
"""A user who has room for little more, is paid, and never pays."""
NOBODY = 1_000
"""A user who is never opened."""

_OPENING = 1_000
_ROOM = 200  # of the full user
_FIRST = (*USERS[:10], FULL_USER)


class Accounts:
    """Opens accounts, each with the same values however often. `opened`: those who are known to exist."""

    def __init__(self, caller: Caller, chance: random.Random) -> None:
        self.opened: set[int] = set()
        self.replies: list[tuple[int, Reply]] = []
        self._caller = caller
        self._chance = chance

    async def open_first(self) -> None:
        """Open those who exist from the beginning."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            for user_id in _FIRST:
                while user_id not in self.opened:
                    await self._open(user_id)

    async def one(self) -> None:
        """Open one, who may be open already."""
        await self._open(self._chance.choice(USERS))

    def someone(self) -> int:
        """A user who is known to exist and can pay; the hot one more often than others."""
        return HOT_USER if self._chance.random() < 0.4 else self._chance.choice(sorted(self.opened - {FULL_USER}))

    def payees(self, payer: int, count_max: int) -> list[int]:
        """Up to so many users to be paid; now and then among them one who is full, or does not exist, or not yet."""
        known: Sequence[int] = BUSY if self._chance.random() < 0.5 else sorted(self.opened)
        payees = self._chance.sample(known, min(len(known), count_max))
        if self._chance.random() < 0.1:
            payees[0] = self._chance.choice((FULL_USER, NOBODY, self._chance.choice(USERS)))
        return [user_id for user_id in payees if user_id != payer] or [FULL_USER]

    async def _open(self, user_id: int) -> None:
        balance, minimum = opening(user_id)
        body = {"balance": balance, "minimumBalance": minimum}
        reply = await self._caller.ask("PUT", f"/api/users/{user_id}", body)
        self.replies.append((user_id, reply))
        if reply.status in (200, 201):
            self.opened.add(user_id)


def opening(user_id: int) -> tuple[int, int]:
    """The balance and the minimum balance that a user is opened with."""
    return BALANCE_LIMIT - _ROOM if user_id == FULL_USER else _OPENING, -50 if user_id % 3 == 0 else 0


def judge_openings(replies: list[tuple[int, Reply]], journal: Journal) -> list[str]:
    """What was answered to openings and is not so, a line each."""
    wrong = []
    for user_id, reply in replies:
        account = journal.accounts.get(user_id)
        if reply.status not in (0, 200, 201, 503):
            wrong.append(f"an answer that may never be given: opening {user_id}: {reply}")
        elif reply.status in (200, 201) and (account is None or account[:2] != opening(user_id)):
            wrong.append(f"answered as opened and not so: {user_id}: {reply}, {account}")
    firsts = [user_id for user_id, reply in replies if reply.status == 201]
    return wrong + [f"opened twice: {user_id}" for user_id in sorted(set(firsts)) if firsts.count(user_id) > 1]
