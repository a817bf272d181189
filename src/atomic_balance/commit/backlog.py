"""Everything that waits for an answer, and which of it one statement is to carry. Plain state, without a task.

waiting.py has the states of a change and of an account, and what they mean.
"""

import asyncio
from bisect import insort
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Set
from itertools import islice, takewhile

from msgspec import Struct

from atomic_balance.changes import Change
from atomic_balance.commit.planning import Load
from atomic_balance.commit.waiting import Place, WaitingAccount, WaitingChange

_PASSED_MAX = 1_000  # so that looking for what fits does not take longer than sending it


class Batch(Struct):
    """What one statement carries: of each line some changes.

    `arrived_before`: the number of the first change that arrived after it was put together.
    """

    parts: list[tuple[WaitingAccount, list[WaitingChange]]]
    arrived_before: int

    def changes(self) -> list[WaitingChange]:
        """All of its changes, in the order in which they are sent."""
        return [waiting for _, part in self.parts for waiting in part]

    def lines(self) -> list[WaitingAccount]:
        """The accounts whose lines they wait in."""
        return [line for line, _ in self.parts]

    def touches(self) -> set[int]:
        """The user ids of all accounts that it changes."""
        return {user_id for waiting in self.changes() for user_id in waiting.change.accounts}

    def without(self, user_ids: Set[int]) -> "Batch":
        """What is left of it without the changes that touch these accounts."""
        parts = (
            (line, [waiting for waiting in part if user_ids.isdisjoint(waiting.change.accounts)])
            for line, part in self.parts
        )
        return Batch([(line, part) for line, part in parts if part], self.arrived_before)

    @staticmethod
    def of(lines: Iterable[WaitingAccount], load: Load, arrived_before: int) -> "Batch":
        """A batch of what is next in these lines and fits; it leaves out those of which nothing does."""
        parts = ((line, _next_that_fit(line, load)) for line in lines)
        return Batch([(line, part) for line, part in parts if part], arrived_before)


def _next_that_fit(line: WaitingAccount, load: Load) -> list[WaitingChange]:
    """What is next in a line, up to what does not fit any more."""
    return list(takewhile(lambda waiting: load.take(waiting.change), line.next_changes(max(1, load.legs_left))))


class Backlog:
    """Everything that waits: its accounts, each in one place, and its changes, by arrival and by key."""

    def __init__(self) -> None:
        self.ready_wake = asyncio.Event()
        self.suspects_wake = asyncio.Event()
        self._accounts: dict[int, WaitingAccount] = {}
        self._ready: OrderedDict[int, WaitingAccount] = OrderedDict()
        self._suspects: OrderedDict[int, WaitingAccount] = OrderedDict()
        self._contended: set[int] = set()  # the accounts whose rows could not be had in time when they were last tried
        # Not a plain dict: looking for its first after many were deleted from its front is slow.
        self._unanswered: OrderedDict[int, WaitingChange] = OrderedDict()
        self._keyed: dict[tuple[int, str], WaitingChange] = {}
        self._credits: Counter[int] = Counter()

    @property
    def count(self) -> int:
        """How many changes have no answer yet."""
        return len(self._unanswered)

    @property
    def empty(self) -> bool:
        """Whether no change waits, and no lane has an account."""
        return not self._accounts

    def account(self, user_id: int) -> WaitingAccount | None:
        """The account of `user_id`, if something waits in its line."""
        return self._accounts.get(user_id)

    def keyed(self, user_id: int, key: str) -> WaitingChange | None:
        """The change that waits under a key."""
        return self._keyed.get((user_id, key))

    def waiting_of(self, change: Change) -> int:
        """How many changes wait for the account of `change` or, if these are more, credit one of its payees."""
        line = self._accounts.get(change.user_id)
        own = len(line.changes) if line else 0
        return max(own, *(self._credits[credit.user_id] for credit in change.payees)) if change.payees else own

    def add(self, waiting: WaitingChange) -> None:
        """Put a change, the youngest of all, at the end of its account's line."""
        change = waiting.change
        line = self._line(change.user_id)
        line.changes.append(waiting)
        waiting.line = line
        self._unanswered[waiting.number] = waiting
        if change.key is not None:
            self._keyed[change.user_id, waiting.key] = waiting
        for credit in change.payees:
            self._credits[credit.user_id] += 1

    def answer(self, waiting: WaitingChange) -> None:
        """Note that a change is answered; it must not have been before."""
        change = waiting.change
        waiting.answered = True
        del self._unanswered[waiting.number]
        if change.key is not None:
            del self._keyed[change.user_id, waiting.key]
        for credit in change.payees:
            self._credits[credit.user_id] -= 1
            if not self._credits[credit.user_id]:
                del self._credits[credit.user_id]

    def due(self, now: float) -> list[WaitingChange]:
        """The changes without an answer whose deadlines have passed at `now`, oldest first.

        All deadlines are equally long, so the oldest change is the first that is due.
        """
        return list(takewhile(lambda waiting: waiting.deadline <= now, self._unanswered.values()))

    def unanswered(self) -> list[WaitingChange]:
        """All changes that have no answer yet, oldest first."""
        return list(self._unanswered.values())

    def take_ready(self, load: Load, arrived_before: int) -> Batch | None:
        """A batch of what is ready, those first who have waited longest; None if nothing is.

        Who has to wait for another batch, as a payer of one who changes in this, or the other way round, is the first
        in the next: neither can keep the other waiting for longer.
        """
        parts: list[tuple[WaitingAccount, list[WaitingChange]]] = []
        passed: list[WaitingAccount] = []
        while self._ready and not load.full and len(passed) < _PASSED_MAX:
            _, line = self._ready.popitem(last=False)
            if self._contended:
                self._divert(line, load.legs_left)
            part = _next_that_fit(line, load)
            if part:
                line.place = Place.BUSY
                parts.append((line, part))
            elif any(line.unanswered()):
                passed.append(line)
            else:
                self._forget(line)
        for line in reversed(passed):
            self._ready[line.user_id] = line
            self._ready.move_to_end(line.user_id, last=False)
        return Batch(parts, arrived_before) if parts else None

    def take_suspects(self, lines_max: int) -> list[WaitingAccount]:
        """The suspects, those first who have waited longest; one whose next change goes alone is all."""
        taken: list[WaitingAccount] = []
        while self._suspects and len(taken) < lines_max:
            line = next(iter(self._suspects.values()))
            if taken and line.next_goes_alone():
                break
            del self._suspects[line.user_id]
            line.place = Place.BUSY
            taken.append(line)
            if line.next_goes_alone():
                break
        return taken

    def put_back(self, lines: Iterable[WaitingAccount]) -> None:
        """Give back suspects that were taken and not sent, ahead of those that were."""
        for line in reversed(list(lines)):
            self._settle_down(line)
            if line.place is Place.SUSPECT:
                self._suspects.move_to_end(line.user_id, last=False)

    def release(self, line: WaitingAccount, contended: bool = False) -> None:
        """End a lane's turn with a line: put it where a lane will take it, or forget it if nothing waits.

        `contended`: the account's row could not be had in time.
        """
        if contended:
            self._contended.add(line.user_id)
        else:
            self._contended.discard(line.user_id)
        self._settle_down(line)

    def contend(self, user_ids: Iterable[int]) -> None:
        """Note that the rows of these accounts could not be had in time: what touches them waits in their lines."""
        for user_id in user_ids:
            self._contended.add(user_id)
            line = self._accounts.get(user_id)
            if line is not None and line.place is Place.READY:
                del self._ready[user_id]
                self._queue(line)

    def move(self, waiting: WaitingChange, user_id: int) -> None:
        """Let a change wait in the line of another account that it touches, in the place that its arrival gives it.

        The line that it has been in is the caller's, to be released.
        """
        if waiting.line is not None:
            waiting.line.changes.remove(waiting)
        self._insert(waiting, user_id)

    def tidy(self, line: WaitingAccount) -> None:
        """Let go of what is answered in a line; a busy one is tidied when it is released."""
        if line.place is Place.BUSY or self._accounts.get(line.user_id) is not line:
            return
        line.drop_answered()
        if line.changes and self._place_of(line) is line.place:
            return  # and keeps its turn
        (self._ready if line.place is Place.READY else self._suspects).pop(line.user_id)
        if line.changes:
            self._queue(line)
        else:
            self._forget(line)

    def _line(self, user_id: int) -> WaitingAccount:
        """The line of an account; an empty one, about to be filled, if nothing waits in it."""
        line = self._accounts.get(user_id)
        if line is None:
            line = self._accounts[user_id] = WaitingAccount(user_id)
            self._queue(line)
        return line

    def _divert(self, line: WaitingAccount, count_max: int) -> None:
        """Have what is next in `line`, and touches a contended account, wait in that account's line instead."""
        diverted: dict[int, tuple[WaitingChange, int]] = {}
        for waiting in islice(line.unanswered(), count_max):
            if waiting.change.payees:
                contended = next((one for one in waiting.change.accounts if one in self._contended), None)
                if contended is not None:
                    diverted[waiting.number] = waiting, contended
        if diverted:
            line.changes = deque(waiting for waiting in line.changes if waiting.number not in diverted)
            for waiting, contended in diverted.values():
                self._insert(waiting, contended)

    def _insert(self, waiting: WaitingChange, user_id: int) -> None:
        line = self._line(user_id)
        insort(line.changes, waiting, key=lambda other: other.number)
        waiting.line = line

    def _settle_down(self, line: WaitingAccount) -> None:
        """Put a line that a lane has had where a lane will take it, or forget it if nothing waits."""
        if line.place is not Place.BUSY:
            raise AssertionError(f"user {line.user_id} is {line.place.name}, and no lane has it")
        line.drop_answered()
        if line.changes:
            self._queue(line)
        else:
            self._forget(line)

    def _forget(self, line: WaitingAccount) -> None:
        del self._accounts[line.user_id]
        self._contended.discard(line.user_id)

    def _place_of(self, line: WaitingAccount) -> Place:
        return Place.SUSPECT if line.user_id in self._contended or line.next_goes_alone() else Place.READY

    def _queue(self, line: WaitingAccount) -> None:
        """Put a line at the end of where it belongs."""
        line.place = self._place_of(line)
        if line.place is Place.SUSPECT:
            self._suspects[line.user_id] = line
            self.suspects_wake.set()
        else:
            self._ready[line.user_id] = line
            self.ready_wake.set()
