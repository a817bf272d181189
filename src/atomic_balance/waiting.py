"""The changes that wait for an answer, account by account, in order of arrival. Plain state, without a task."""

import asyncio
import itertools
from collections import deque
from collections.abc import Iterator

from msgspec import Struct

from atomic_balance.changes import Change, Outcome
from atomic_balance.planning import covered_prefix


class Waiting:
    """A change that has not been answered, and what is known of it.

    `number`: counts up with every arrival. `deadline`: in the event loop's time. `repeatable`: the journal may hold it.
    `unknown`: an attempt at it was lost. `alone`: it is to travel alone, an attempt with others was rejected.
    `answered`: decided, or given up, whether or not anybody was still there to be told. `twins`: the futures of later
    requests with the same key and change.
    """

    __slots__ = (
        "alone",
        "answered",
        "change",
        "deadline",
        "future",
        "in_flight",
        "key",
        "number",
        "repeatable",
        "twins",
        "unknown",
    )

    def __init__(self, change: Change, key: str, number: int, deadline: float, future: asyncio.Future[Outcome]) -> None:
        self.change = change
        self.key = key
        self.number = number
        self.deadline = deadline
        self.future = future
        self.answered = False
        self.repeatable = change.idempotency_key is not None
        self.in_flight = False
        self.unknown = False
        self.alone = False
        self.twins: list[asyncio.Future[Outcome]] = []


class WaitingAccount:
    """An account with waiting changes; an answered one stays among them until it is the first.

    `busy`: a lane has it. `suspect`: to be carried by a lane of its own. `balance`: the last known, None if none is.
    """

    __slots__ = ("balance", "busy", "changes", "minimum_balance", "suspect", "user_id")

    def __init__(self, user_id: int) -> None:
        self.user_id = user_id
        self.changes: deque[Waiting] = deque()
        self.busy = False
        self.suspect = False
        self.balance: int | None = None
        self.minimum_balance = 0

    def live(self) -> Iterator[Waiting]:
        """The changes that have no answer yet."""
        return (waiting for waiting in self.changes if not waiting.answered)

    def arrived_before(self, number: int) -> Iterator[Waiting]:
        """The changes without an answer that arrived before the one with `number`."""
        return itertools.takewhile(lambda waiting: waiting.number < number, self.live())

    def overdue(self, now: float) -> Iterator[Waiting]:
        """The changes without an answer whose deadline has passed: the oldest are first."""
        return itertools.takewhile(lambda waiting: waiting.deadline <= now, self.live())

    def portion(self, count_max: int) -> list[Waiting]:
        """What to send next: as many from the front as the last known balance covers or, if it covers none, all.

        A change that the balance doesn't cover is not jumped over. One that is to travel alone does.
        """
        changes = list(itertools.islice(self.live(), count_max))
        if changes[0].alone:
            return changes[:1]
        if self.balance is None:
            return changes
        amounts = (waiting.change.amount for waiting in changes)
        return changes[: covered_prefix(amounts, self.balance, self.minimum_balance)] or changes

    def drop_answered(self) -> None:
        """Let go of the answered changes at the front."""
        while self.changes and self.changes[0].answered:
            self.changes.popleft()


class Batch(Struct):
    """What one statement carries: of each account some changes; and the number of the first change too late for it."""

    parts: list[tuple[WaitingAccount, list[Waiting]]]
    next_number: int

    def changes(self) -> list[Waiting]:
        """All of its changes, in the order in which they are sent."""
        return [waiting for _, part in self.parts for waiting in part]
