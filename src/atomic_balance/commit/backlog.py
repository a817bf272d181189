"""Everything that waits for an answer, and which of it one statement is to carry. Plain state, without a task.

waiting.py has the states of a change and of an account, and what they mean.
"""

import asyncio
from bisect import insort
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Set
from itertools import islice, takewhile

from msgspec import Struct

from atomic_balance.changes import Change
from atomic_balance.commit.planning import Load
from atomic_balance.commit.waiting import BETWEEN, Place, WaitingAccount, WaitingChange
from atomic_balance.postgres.shards import Shards

_PASSED_MAX = 1_000  # so that looking for what fits does not take longer than sending it


class Batch(Struct):
    """What one statement carries: of each line some changes.

    `arrived_before`: the number of the first change that arrived after it was put together.
    """

    parts: list[tuple[WaitingAccount, list[WaitingChange]]]
    arrived_before: int

    @property
    def shard(self) -> int:
        """The shard that all of it is for; BETWEEN: for several."""
        return self.parts[0][1][0].shard

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
        """What is left of it without the changes that touch these accounts, or have been answered since."""
        parts = [
            (line, [one for one in part if not one.answered and user_ids.isdisjoint(one.change.accounts)])
            for line, part in self.parts
        ]
        return Batch([(line, part) for line, part in parts if part], self.arrived_before)

    @staticmethod
    def of(lines: Iterable[WaitingAccount], load: Load, arrived_before: int) -> "Batch":
        """A batch of what is next in these lines and fits; it leaves out those of which nothing does."""
        parts = ((line, _next_that_fit(line, load)) for line in lines)
        return Batch([(line, part) for line, part in parts if part], arrived_before)


def _next_that_fit(line: WaitingAccount, load: Load) -> list[WaitingChange]:
    """What is next in a line, up to what does not fit any more."""
    return list(takewhile(lambda waiting: load.take(waiting.change), line.next_changes(max(1, load.legs_left))))


class _Ready(Struct):
    """The accounts that a shard's load lane is to take, and what wakes it."""

    lines: OrderedDict[int, WaitingAccount]
    wake: asyncio.Event


class Backlog:
    """Everything that waits: its accounts, each in one place, and its changes, by arrival and by key."""

    def __init__(self) -> None:
        self.suspects_wake = asyncio.Event()
        self.doubted: dict[int, int] = {}
        """Shards to which nothing is to be sent now, and an account on each, to be asked for."""
        self._shards = Shards()
        self._accounts: dict[int, WaitingAccount] = {}
        self._ready = {0: _Ready(OrderedDict(), asyncio.Event())}
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

    def spread(self, shards: Shards) -> list[int]:
        """Take it that accounts lie on these shards; gives those that are new, BETWEEN among them."""
        if shards == self._shards:
            return []
        self._shards = shards
        new = [shard for shard in (BETWEEN, *range(shards.count)) if shard not in self._ready]
        for shard in new:
            self._ready[shard] = _Ready(OrderedDict(), asyncio.Event())
        for waiting in self._unanswered.values():
            self._locate(waiting)
        lines = [line for ready in self._ready.values() for line in ready.lines.values()]
        for ready in self._ready.values():
            ready.lines.clear()
        for line in lines:
            self._queue(line)
        return new

    def doubt(self, changes: Iterable[WaitingChange]) -> None:
        """Send nothing more to the shards of these changes, whose lanes are to find out whether they answer."""
        for waiting in changes:
            for user_id in waiting.change.accounts:
                shard = self._shards.of(user_id)
                if shard not in self.doubted:
                    self.doubted[shard] = user_id
                    self.ready_wake(shard).set()

    def trust(self, shard: int) -> None:
        """Send to a shard again."""
        del self.doubted[shard]
        self.suspects_wake.set()
        if BETWEEN in self._ready:
            self.ready_wake(BETWEEN).set()

    @property
    def all_doubted(self) -> bool:
        """Whether nothing is to be sent to any shard now."""
        return len(self.doubted) == self._shards.count

    def ready_wake(self, shard: int) -> asyncio.Event:
        """What says that something is ready for the load lane of `shard`."""
        return self._ready[shard].wake

    def add(self, waiting: WaitingChange) -> None:
        """Put a change, the youngest of all, at the end of its account's line."""
        change = waiting.change
        if self._shards.bounds:
            self._locate(waiting)
        self._put(waiting, change.user_id)
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

    def take_ready(self, shard: int, load: Load, arrived_before: int) -> Batch | None:
        """A batch of what is ready for a shard's lane, those first who have waited longest; None if nothing is.

        Who has to wait for another batch, as a payer of one who changes in this, or the other way round, is the first
        in the next: neither can keep the other waiting for longer.
        """
        parts: list[tuple[WaitingAccount, list[WaitingChange]]] = []
        passed: list[WaitingAccount] = []
        put_off: list[WaitingAccount] = []
        ready = self._ready[shard].lines
        while ready and not load.full and len(passed) < _PASSED_MAX:
            _, line = ready.popitem(last=False)
            if self._contended or self.doubted:
                self._divert(line, load.legs_left, self._is_wanting)
            first = line.next_change()
            if first is None:
                self._forget(line)
            elif first.shard != shard:  # what was before it is answered
                self._queue(line)
            elif not self._is_trusted(first):
                put_off.append(line)
            elif part := _next_that_fit(line, load):
                if self.doubted:
                    part = list(takewhile(self._is_trusted, part))
                line.place = Place.BUSY
                parts.append((line, part))
            else:
                passed.append(line)
        for line in reversed(passed):
            ready[line.user_id] = line
            ready.move_to_end(line.user_id, last=False)
        for line in put_off:
            ready[line.user_id] = line
        return Batch(parts, arrived_before) if parts else None

    def take_suspects(self, lines_max: int, legs_max: int) -> list[WaitingAccount]:
        """Suspects of one lane, those first who have waited longest; one whose next change goes alone is all.

        `legs_max`: how many of a line's changes are looked at, as many as a statement carries.
        """
        taken: list[WaitingAccount] = []
        shard: int | None = None
        for line in list(self._suspects.values()):
            if self.doubted and not self.all_doubted:
                self._divert(line, legs_max, self._is_doubted)
            first = line.next_change()
            if first is not None and not self._is_trusted(first):
                continue
            if taken and first is not None and (first.alone or first.shard != shard):
                break
            del self._suspects[line.user_id]
            line.place = Place.BUSY
            taken.append(line)
            if first is not None:
                shard = first.shard
            if len(taken) == lines_max or (first is not None and first.alone):
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
                self._take_out(line)
                self._queue(line)

    def move(self, waiting: WaitingChange, user_id: int) -> None:
        """Let a change wait in the line of another account that it touches, in the place that its arrival gives it.

        The line that it has been in is the caller's, to be released.
        """
        if waiting.line is not None:
            waiting.line.changes.remove(waiting)
        self._put(waiting, user_id)

    def tidy(self, line: WaitingAccount) -> None:
        """Let go of what is answered in a line; a busy one is tidied when it is released."""
        if line.place is Place.BUSY or self._accounts.get(line.user_id) is not line:
            return
        line.drop_answered()
        if line.changes and self._place_of(line, line.next_change()) is line.place:
            return  # and keeps its turn
        self._take_out(line)
        if line.changes:
            self._queue(line)
        else:
            self._forget(line)

    def _is_wanting(self, user_id: int) -> bool:
        """Whether an account can't be had now, because of another transaction or of its shard."""
        return user_id in self._contended or self._is_doubted(user_id)

    def _is_doubted(self, user_id: int) -> bool:
        """Whether the shard of an account is doubted."""
        return bool(self.doubted) and self._shards.of(user_id) in self.doubted

    def _is_trusted(self, waiting: WaitingChange) -> bool:
        """Whether no shard that a change touches is doubted."""
        return not self.doubted or self.doubted.keys().isdisjoint(waiting.shards)

    def _locate(self, waiting: WaitingChange) -> None:
        """Find out which lane carries a change."""
        change = waiting.change
        waiting.shards = set(map(self._shards.of, change.accounts))
        waiting.shard = BETWEEN if change.payees and self._shards.bounds else min(waiting.shards)

    def _put(self, waiting: WaitingChange, user_id: int) -> None:
        """Let a change wait in the line of an account, in the place that its arrival gives it."""
        line = self._accounts.get(user_id)
        new = line is None
        if line is None:
            line = self._accounts[user_id] = WaitingAccount(user_id)
        if line.changes and line.changes[-1].number > waiting.number:
            insort(line.changes, waiting, key=lambda other: other.number)
        else:
            line.changes.append(waiting)
        waiting.line = line
        if new:
            self._queue(line)

    def _take_out(self, line: WaitingAccount) -> None:
        """Take a line out of the queue that it stands in."""
        if line.place is Place.SUSPECT:
            del self._suspects[line.user_id]
        else:
            for ready in self._ready.values():
                ready.lines.pop(line.user_id, None)

    def _divert(self, line: WaitingAccount, count_max: int, is_wanting: Callable[[int], bool]) -> None:
        """Have what is next in `line` and touches an account that `is_wanting` wait in that one's line instead."""
        diverted: dict[int, tuple[WaitingChange, int]] = {}
        for waiting in islice(line.unanswered(), count_max):
            if waiting.change.payees:
                wanting = next(filter(is_wanting, waiting.change.accounts), line.user_id)
                if wanting != line.user_id:
                    diverted[waiting.number] = waiting, wanting
        if diverted:
            line.changes = deque(waiting for waiting in line.changes if waiting.number not in diverted)
            for waiting, wanting in diverted.values():
                self._put(waiting, wanting)

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

    def _place_of(self, line: WaitingAccount, first: WaitingChange | None) -> Place:
        alone = first is not None and first.alone
        return Place.SUSPECT if alone or line.user_id in self._contended else Place.READY

    def _queue(self, line: WaitingAccount) -> None:
        """Put a line at the end of where it belongs."""
        first = line.next_change()
        line.place = self._place_of(line, first)
        if line.place is Place.SUSPECT:
            self._suspects[line.user_id] = line
            self.suspects_wake.set()
        else:
            ready = self._ready[first.shard if first else 0]
            ready.lines[line.user_id] = line
            ready.wake.set()
