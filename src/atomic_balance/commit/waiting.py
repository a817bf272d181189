"""The changes that wait for an answer, account by account, in order of arrival. Plain state, without a task.

A change is one of

- waiting: it has a place in its account's line. From `add`, until a lane sends it or it is answered.
- in flight: a statement with it is on its way. Until that statement is answered, fails or is lost.
- answered: decided, or given up at its deadline. It leaves the line when it comes to its front.

and beside the first two, for good,

- unknown: a statement with it was lost, so the journal may hold it, now or soon. It is found by its key.
- alone: a statement with it and others was rejected. It goes by itself, so that the one at fault is found.

An account with waiting changes is in exactly one place:

- ready: the load lane takes it, with all others that are ready. From its first change, and after each statement.
- suspect: other lanes take it, because its row could not be had in time or because its next change goes alone.
- busy: a lane has it, and no other may, until that lane releases it.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from itertools import islice, takewhile

from msgspec import Struct

from atomic_balance.changes import Change, Outcome
from atomic_balance.commit.planning import covered_prefix


class WaitingChange:
    """A change that has not been answered, and what is known of it.

    `number`: counts up with every arrival. `deadline`: in the event loop's time. `repeatable`: the journal may hold it.
    `duplicates`: the futures of later requests with the same key and change. `followers`: other settlements of the same
    hold, with their futures and request ids: what becomes of this one decides what becomes of them. `futile_count`: of
    a settlement, how often less was held than it settles. `request_id`: whose request it was.
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
        "number",
        "repeatable",
        "request_id",
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
        self.answered = False
        self.duplicates: list[asyncio.Future[Outcome]] = []
        self.followers: list[tuple[Change, asyncio.Future[Outcome], str | None]] = []


class Place(Enum):
    """Where an account is."""

    READY = auto()
    SUSPECT = auto()
    BUSY = auto()


class WaitingAccount:
    """An account with waiting changes; an answered one stays among them until it is the first.

    `available`, `room`: as planning.py has them, the last known; None if they are not known. `contended`: its row could
    not be had in time when it was last tried.
    """

    __slots__ = ("available", "changes", "contended", "place", "room", "user_id")

    def __init__(self, user_id: int) -> None:
        self.user_id = user_id
        self.place = Place.READY
        self.contended = False
        self.changes: deque[WaitingChange] = deque()
        self.available: int | None = None
        self.room = 0

    def unanswered(self) -> Iterator[WaitingChange]:
        """The changes that have no answer yet."""
        return (waiting for waiting in self.changes if not waiting.answered)

    def arrived_before(self, number: int) -> Iterator[WaitingChange]:
        """The changes without an answer that arrived before the one with `number`."""
        return takewhile(lambda waiting: waiting.number < number, self.unanswered())

    def next_changes(self, count_max: int) -> list[WaitingChange]:
        """What to send next: as many from the front as were covered when last known or, if none was, all.

        It stops before a change that is not covered, and before one that goes alone; if the first is to go
        alone, it is all. Nothing, where everything has been answered.
        """
        changes = list(islice(self.unanswered(), count_max))
        if changes and changes[0].alone:
            return changes[:1]
        changes = list(takewhile(lambda waiting: not waiting.alone, changes))
        if self.available is None:
            return changes
        return changes[: covered_prefix((one.change for one in changes), self.available, self.room)] or changes

    def next_goes_alone(self) -> bool:
        """Whether its next change is to travel alone."""
        return any(waiting.alone for waiting in islice(self.unanswered(), 1))

    def overdue(self, now: float) -> Iterator[WaitingChange]:
        """The changes without an answer whose deadline has passed: the oldest are first."""
        return takewhile(lambda waiting: waiting.deadline <= now, self.unanswered())

    def drop_answered(self) -> None:
        """Let go of the answered changes at the front."""
        while self.changes and self.changes[0].answered:
            self.changes.popleft()


class Batch(Struct):
    """What one statement carries: of each account some changes.

    `arrived_before`: the number of the first change that arrived after it was put together.
    """

    parts: list[tuple[WaitingAccount, list[WaitingChange]]]
    arrived_before: int

    def changes(self) -> list[WaitingChange]:
        """All of its changes, in the order in which they are sent."""
        return [waiting for _, part in self.parts for waiting in part]

    def accounts(self) -> list[WaitingAccount]:
        """Its accounts."""
        return [account for account, _ in self.parts]

    @staticmethod
    def of(accounts: Iterable[WaitingAccount], changes_max: int, arrived_before: int) -> "Batch":
        """A batch of what is next of these accounts, as long as there is room; it leaves out those without anything."""
        parts: list[tuple[WaitingAccount, list[WaitingChange]]] = []
        for account in accounts:
            part = account.next_changes(changes_max)
            if part:
                parts.append((account, part))
                changes_max -= len(part)
        return Batch(parts, arrived_before)


class Backlog:
    """Everything that waits: its accounts, each in one place, and its changes, by arrival and by key."""

    def __init__(self) -> None:
        self.ready_wake = asyncio.Event()
        self.suspects_wake = asyncio.Event()
        self._accounts: dict[int, WaitingAccount] = {}
        self._ready: OrderedDict[int, WaitingAccount] = OrderedDict()
        self._suspects: OrderedDict[int, WaitingAccount] = OrderedDict()
        # Not a plain dict: looking for its first after many were deleted from its front is slow.
        self._unanswered: OrderedDict[int, WaitingChange] = OrderedDict()
        self._keyed: dict[tuple[int, str], WaitingChange] = {}

    @property
    def count(self) -> int:
        """How many changes have no answer yet."""
        return len(self._unanswered)

    @property
    def empty(self) -> bool:
        """Whether no change waits, and no lane has an account."""
        return not self._accounts

    def account(self, user_id: int) -> WaitingAccount | None:
        """The account of `user_id`, if something of it waits."""
        return self._accounts.get(user_id)

    def keyed(self, user_id: int, key: str) -> WaitingChange | None:
        """The change that waits under a key."""
        return self._keyed.get((user_id, key))

    def add(self, waiting: WaitingChange) -> None:
        """Put a change, the youngest of all, at the end of its account's line."""
        user_id = waiting.change.user_id
        account = self._accounts.get(user_id)
        if account is None:
            account = self._accounts[user_id] = WaitingAccount(user_id)
            self._queue(account)
        account.changes.append(waiting)
        self._unanswered[waiting.number] = waiting
        if waiting.change.key is not None:
            self._keyed[user_id, waiting.key] = waiting

    def answer(self, waiting: WaitingChange) -> None:
        """Note that a change is answered; it must not have been before."""
        waiting.answered = True
        del self._unanswered[waiting.number]
        if waiting.change.key is not None:
            del self._keyed[waiting.change.user_id, waiting.key]

    def due(self, now: float) -> list[WaitingChange]:
        """The changes without an answer whose deadlines have passed at `now`, oldest first.

        All deadlines are equally long, so the oldest change is the first that is due.
        """
        return list(takewhile(lambda waiting: waiting.deadline <= now, self._unanswered.values()))

    def unanswered(self) -> list[WaitingChange]:
        """All changes that have no answer yet, oldest first."""
        return list(self._unanswered.values())

    def take_ready(self, changes_max: int, accounts_max: int, arrived_before: int) -> Batch | None:
        """A batch of what is ready, those first who have waited longest; None if nothing is."""
        parts: list[tuple[WaitingAccount, list[WaitingChange]]] = []
        while self._ready and changes_max and len(parts) < accounts_max:
            _, account = self._ready.popitem(last=False)
            account.place = Place.BUSY
            part = account.next_changes(changes_max)
            changes_max -= len(part)
            parts.append((account, part))
        return Batch(parts, arrived_before) if parts else None

    def take_suspects(self, accounts_max: int) -> list[WaitingAccount]:
        """The suspects, those first who have waited longest; one whose next change goes alone is all."""
        taken: list[WaitingAccount] = []
        while self._suspects and len(taken) < accounts_max:
            account = next(iter(self._suspects.values()))
            if taken and account.next_goes_alone():
                break
            del self._suspects[account.user_id]
            account.place = Place.BUSY
            taken.append(account)
            if account.next_goes_alone():
                break
        return taken

    def put_back(self, accounts: Iterable[WaitingAccount]) -> None:
        """Give back suspects that were taken and not sent, ahead of those that were."""
        for account in reversed(list(accounts)):
            self.release(account, account.contended)
            if account.place is Place.SUSPECT:
                self._suspects.move_to_end(account.user_id, last=False)

    def release(self, account: WaitingAccount, contended: bool = False) -> None:
        """End a lane's turn with an account: put it where a lane will take it, or forget it if nothing waits.

        `contended`: its row could not be had in time.
        """
        if account.place is not Place.BUSY:
            raise AssertionError(f"user {account.user_id} is {account.place.name}, and no lane has it")
        account.contended = contended
        account.drop_answered()
        if account.changes:
            self._queue(account)
        else:
            del self._accounts[account.user_id]

    def tidy(self, user_id: int) -> None:
        """Let go of what is answered of an account; a busy one is tidied when it is released."""
        account = self._accounts.get(user_id)
        if account is None or account.place is Place.BUSY:
            return
        account.drop_answered()
        if account.changes and self._place_of(account) is account.place:
            return  # and keeps its turn
        (self._ready if account.place is Place.READY else self._suspects).pop(user_id)
        if account.changes:
            self._queue(account)
        else:
            del self._accounts[user_id]

    @staticmethod
    def _place_of(account: WaitingAccount) -> Place:
        return Place.SUSPECT if account.contended or account.next_goes_alone() else Place.READY

    def _queue(self, account: WaitingAccount) -> None:
        """Put an account at the end of where it belongs."""
        account.place = self._place_of(account)
        if account.place is Place.SUSPECT:
            self._suspects[account.user_id] = account
            self.suspects_wake.set()
        else:
            self._ready[account.user_id] = account
            self.ready_wake.set()
