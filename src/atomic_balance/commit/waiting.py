"""What is known of a change that waits for an answer, and of an account's line of them. Plain state, without a task.

A change is one of

- waiting: it has a place in a line, nearly always that of its own account. From `Backlog.add`, until a lane sends it or
  it is answered.
- in flight: a statement with it is on its way. Until that statement is answered, fails or is lost.
- answered: decided, or given up at its deadline. It leaves the line when it comes to its front.

and beside the first two, for good,

- unknown: a statement with it was lost, so the journal may hold it, now or soon. It is found by its key.
- alone: a statement with it and others was rejected. It goes by itself, so that the one at fault is found.

An account with waiting changes has a line, and is in exactly one place:

- ready: the load lane that its next change is for takes it, with all others that are ready for that one. From its first
  change, and after each statement.
- suspect: other lanes take it, because its row could not be had in time or because its next change goes alone.
- busy: a lane has it, and no other may, until that lane releases it.

Accounts lie on one shard or, with Citus, on several. A statement carries what is of one shard, and each shard has a
load lane; where there are several, transfers go in a load lane of their own. A shard of which a statement was lost is
doubted: nothing more is sent to it until it has answered a question.

A transfer touches several accounts. One that touches an account whose row could not be had in time, be it the payer's
or a payee's, waits in that account's line: so it holds up neither the payer's other changes nor anybody's transfers.
"""

import asyncio
from collections import deque
from collections.abc import Iterator, Set
from enum import Enum, auto
from itertools import takewhile
from typing import NamedTuple

from atomic_balance.changes import Change, Outcome
from atomic_balance.commit.planning import covered_prefix

BETWEEN = -1
"""What stands for a shard where a change may go between several."""

_ONE_SHARD = frozenset({0})


class Follower(NamedTuple):
    """A change whose key another change has that waits.

    `deadline`: until when it may be sent after that one, in the event loop's time.
    """

    change: Change
    future: asyncio.Future[Outcome]
    request_id: str | None
    deadline: float


class WaitingChange:
    """A change that has not been answered, and what is known of it.

    `number`: counts up with every arrival. `deadline`: in the event loop's time. `repeatable`: the journal may hold it.
    `shards`: where the accounts lie that it touches. `shard`: whose load lane carries it.
    `duplicates`: the futures of later requests with the same key and change. `followers`: other changes with the key:
    what becomes of this one decides what becomes of them. `futile_count`: of a settlement, how often less was held than
    it settles; `refused`: it was refused once. `request_id`: whose request it was. `line`: where it waits.
    """

    __slots__ = (
        "alone",
        "answered",
        "change",
        "deadline",
        "duplicates",
        "followers",
        "futile_count",
        "future",
        "in_flight",
        "key",
        "line",
        "number",
        "refused",
        "repeatable",
        "request_id",
        "shard",
        "shards",
        "unknown",
    )

    def __init__(
        self,
        change: Change,
        key: str,
        number: int,
        deadline: float,
        future: asyncio.Future[Outcome],
        request_id: str | None = None,
    ) -> None:
        self.change = change
        self.key = key
        self.number = number
        self.deadline = deadline
        self.future = future
        self.request_id = request_id
        self.repeatable = change.key is not None
        self.in_flight = False
        self.unknown = False
        self.alone = False
        self.futile_count = 0
        self.refused = False
        self.answered = False
        self.line: WaitingAccount | None = None
        self.shards: Set[int] = _ONE_SHARD
        self.shard = 0
        self.duplicates: list[asyncio.Future[Outcome]] = []
        self.followers: list[Follower] = []


class Place(Enum):
    """Where an account is."""

    READY = auto()
    SUSPECT = auto()
    BUSY = auto()


class WaitingAccount:
    """An account's line of waiting changes, oldest first; an answered one stays in it until it is the first.

    They are the account's own, and others' transfers that touch it if its row could not be had in time. `available`,
    `room`: as planning.py has them, the last known; None if they are not known.
    """

    __slots__ = ("available", "changes", "place", "room", "user_id")

    def __init__(self, user_id: int) -> None:
        self.user_id = user_id
        self.place = Place.READY
        self.changes: deque[WaitingChange] = deque()
        self.available: int | None = None
        self.room = 0

    def unanswered(self) -> Iterator[WaitingChange]:
        """The changes that have no answer yet."""
        return (waiting for waiting in self.changes if not waiting.answered)

    def owns(self, waiting: WaitingChange) -> bool:
        """Whether a change in the line is the account's own."""
        return waiting.change.user_id == self.user_id

    def own_before(self, number: int) -> Iterator[WaitingChange]:
        """The account's own changes without an answer that arrived before the one with `number`."""
        return filter(self.owns, takewhile(lambda waiting: waiting.number < number, self.unanswered()))

    def next_changes(self, count_max: int) -> list[WaitingChange]:
        """What to send next: as many from the front as were covered when last known or, if none was, all.

        It stops before a change of its own that is not covered, before one that another lane carries, and before one
        that goes alone; if the first is to go alone, it is all. Nothing, where everything has been answered.
        """
        changes: list[WaitingChange] = []
        for waiting in self.unanswered():
            if changes and (waiting.alone or waiting.shard != changes[0].shard):
                break
            changes.append(waiting)
            if waiting.alone or len(changes) == count_max:
                break
        if self.available is None:
            return changes
        own = [waiting for waiting in changes if self.owns(waiting)]
        covered = covered_prefix((waiting.change for waiting in own), self.available, self.room)
        if covered in (0, len(own)):
            return changes
        return list(takewhile(lambda waiting: waiting is not own[covered], changes))

    def next_change(self) -> WaitingChange | None:
        """The first change that has no answer yet."""
        if self.changes and not self.changes[0].answered:  # nearly always
            return self.changes[0]
        return next(self.unanswered(), None)

    def overdue(self, now: float) -> Iterator[WaitingChange]:
        """The changes without an answer whose deadline has passed: the oldest are first."""
        return takewhile(lambda waiting: waiting.deadline <= now, self.unanswered())

    def drop_answered(self) -> None:
        """Let go of the answered changes at the front."""
        while self.changes and self.changes[0].answered:
            self.changes.popleft()
