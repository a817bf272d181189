"""Group commit: changes that wait at the same time share a statement.

One lane carries the load: with nothing in flight a change leaves at once, and while a statement is on its way the next
batch gathers. With Citus there is one for each shard, and one for what goes between them, so that a shard that is slow
or away keeps only its own waiting. The other lanes carry what would hold those up: accounts whose rows another
transaction holds, and changes that go alone. waiting.py has the states, docs/guarantees.md what is promised when
something fails.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Set
from contextlib import asynccontextmanager
from enum import Enum, auto
from functools import partial

from msgspec import Struct

from atomic_balance.changes import Change, Outcome, Refused, Undecided, is_same
from atomic_balance.commit.answering import Answering, ToRecord
from atomic_balance.commit.backlog import Backlog, Batch
from atomic_balance.commit.planning import Load
from atomic_balance.commit.waiting import Follower, WaitingChange
from atomic_balance.observe.counting import Numbers
from atomic_balance.observe.logs import REQUEST_ID
from atomic_balance.postgres.failures import Failure, StatementError, UnreachableError
from atomic_balance.postgres.session import Session

log = logging.getLogger("atomic_balance")

_EXPIRE_SECONDS = 0.05  # how much later than its deadline a change may be answered
_RECONNECT_SECONDS = 0.05  # a server that restarts is back within a tenth of a second or so
_RECONNECT_SECONDS_MAX = 0.5  # one that stays away is not pressed, and found within half a second
_CONTENTION_SECONDS = 1.0  # a transaction that was met may hold other rows too; most have ended after a second
_BRIEF_SHARE = 0.1  # of LOCK_SECONDS, for which a row is waited for while others are locked too


_NEEDS_NEW_SESSION = (Failure.UNKNOWN, Failure.CANNOT_WRITE)


class Limits(Struct, frozen=True):
    """The limits of a GroupCommit. At most 1,000 changes per statement, so that no sum leaves bigint.

    `landing_seconds`: how long before its deadline a change is not sent any more: what the lock waits of a statement
    and of recording its refusals may take.
    `lock_seconds`: the longest that a statement waits for a row. `lanes`: with one shard; each further one has its own.
    """

    changes_per_statement: int
    accounts_per_statement: int
    lanes: int
    waiting_changes: int
    waiting_changes_per_account: int
    deadline_seconds: float
    landing_seconds: float
    lock_seconds: float


class _Turn(Enum):
    """What a lane's turn came to."""

    IDLE = auto()
    """There was nothing to carry."""
    DONE = auto()
    AWAY = auto()
    """The shard does not answer, although the server does that was asked for it."""
    LOST = auto()
    """The session is not to be used again."""


class GroupCommit:
    """Takes changes and gives their outcomes; to be entered as `async with GroupCommit(...).running()`.

    `on_failure`: called once if it can't go on (`failure` says why); everything is answered by then.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Session]],
        limits: Limits,
        numbers: Numbers,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.failure: BaseException | None = None
        self._connect = connect
        self._limits = limits
        self._numbers = numbers
        self._on_failure = on_failure
        self._backlog = Backlog()
        self._answering = Answering(self._backlog, numbers, limits.deadline_seconds, self._accept)
        self._next_number = 0
        self._key_prefix = f" {secrets.token_hex(16)}-"  # a space first: no caller's key can hold one
        self._contended_at: dict[int, float] = {}  # by shard
        self._suspects_together = limits.accounts_per_statement
        self._failing_since: float | None = None
        self._failed_at = float("-inf")
        self._tasks = asyncio.TaskGroup()
        self._loop = asyncio.get_running_loop()

    def submit(self, change: Change) -> asyncio.Future[Outcome]:
        """Accept a change; the future gives its outcome, by the deadline, and is never an exception.

        An account's changes are applied in the order in which they are submitted. A duplicate of a change that waits -
        the same user, key, amounts and reference - waits for that one's outcome, until that one's deadline, and takes
        no place of its own. Of different changes with one key, as all settlements of a hold are, one is under way at a
        time: if it binds the key, another one's outcome is KEY_REUSED; or else the next is sent, and has a deadline of
        its own. A change that finds no place is turned away at once. What each outcome promises is said where it is
        defined, in changes.py.
        """
        future: asyncio.Future[Outcome] = self._loop.create_future()
        self._accept(change, future, REQUEST_ID.get())
        return future

    def _accept(
        self, change: Change, future: asyncio.Future[Outcome], request_id: str | None, deadline: float | None = None
    ) -> None:
        """Give a change a place, or let it wait for another one with its key.

        `deadline`: until when it may be sent after others, if it has waited for one; None: for all of its time.
        """
        key = change.key
        first = self._backlog.keyed(change.user_id, key) if key is not None else None
        if first is not None:
            if len(first.duplicates) + len(first.followers) >= self._limits.waiting_changes_per_account:
                self._answering.resolve(future, Undecided.TURNED_AWAY)
            elif is_same(first.change, change):
                first.duplicates.append(future)
            else:
                deadline = deadline or self._loop.time() + self._limits.deadline_seconds
                first.followers.append(Follower(change, future, request_id, deadline))
            return
        of_account = self._backlog.waiting_of(change)
        if self.full or of_account >= self._limits.waiting_changes_per_account or self.failure is not None:
            self._answering.resolve(future, Undecided.TURNED_AWAY)
            return
        number = self._next_number
        self._next_number += 1
        deadline = self._loop.time() + self._limits.deadline_seconds
        key = key or f"{self._key_prefix}{number:012x}"
        self._backlog.add(WaitingChange(change, key, number, deadline, future, request_id))

    @property
    def waiting_count(self) -> int:
        """How many changes wait for their answer."""
        return self._backlog.count

    @property
    def full(self) -> bool:
        """Whether there is no place for a further change."""
        return self._backlog.count >= self._limits.waiting_changes

    @property
    def failing_seconds(self) -> float:
        """For how many seconds statements have been lost, or connecting has failed, without one success in between.

        0 if that is not so, or if nothing has been tried for as long as a change waits.
        """
        now = self._loop.time()
        if self._failing_since is None or now - self._failed_at > self._limits.deadline_seconds:
            return 0.0
        return now - self._failing_since

    @asynccontextmanager
    async def running(self) -> AsyncIterator["GroupCommit"]:
        """Run the lanes; at the end everything that was accepted is answered first."""
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(self._work())
            try:
                yield self
                while not (self._backlog.empty or self.failure):  # noqa: ASYNC110 - by the deadline all is answered
                    await asyncio.sleep(_EXPIRE_SECONDS)
            finally:
                work.cancel()

    async def _work(self) -> None:
        with contextlib.suppress(ExceptionGroup):  # whoever failed has said so
            async with self._tasks:
                self._start_load_lane(0)
                for _ in range(1, self._limits.lanes):
                    self._start(self._lane(self._send_suspects, self._backlog.suspects_wake))
                self._start(self._expire())

    def _start_load_lane(self, shard: int) -> None:
        self._start(self._lane(partial(self._send_ready, shard), self._backlog.ready_wake(shard)))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        self._tasks.create_task(self._loud(work))

    async def _loud(self, work: Coroutine[None, None, None]) -> None:
        """Do `work`. If it fails, everything is answered at once, because nobody will carry it any more."""
        try:
            await work
        except Exception as fault:
            log.critical("changes can't be carried any more", exc_info=fault)
            if self.failure is None:
                self._give_up(fault)
            raise

    def _give_up(self, fault: BaseException) -> None:
        self.failure = fault
        for waiting in self._backlog.unanswered():
            undecided = waiting.unknown or waiting.in_flight
            self._answering.answer(waiting, Undecided.UNKNOWN if undecided else Undecided.TURNED_AWAY)
        self._on_failure()

    async def _lane(self, send: Callable[[Session], Awaitable[_Turn]], wake: asyncio.Event) -> None:
        """Own a session, and send on it whenever there is something for this lane, which `wake` says."""
        session: Session | None = None
        pause_seconds = _RECONNECT_SECONDS
        try:
            while True:
                if session is None or session.closed:
                    session = await self._connected()
                    for shard in self._backlog.spread(session.shards):
                        self._start_load_lane(shard)
                wake.clear()  # before looking: what is queued while this lane sends wakes it again
                turn = await send(session)
                if turn is _Turn.IDLE:
                    await wake.wait()
                elif turn is _Turn.DONE:
                    pause_seconds = _RECONNECT_SECONDS
                else:
                    if turn is _Turn.LOST:
                        session.terminate()
                    await asyncio.sleep(pause_seconds)
                    pause_seconds = min(2 * pause_seconds, _RECONNECT_SECONDS_MAX)
        finally:
            if session is not None:
                await session.close()

    async def _connected(self) -> Session:
        pause_seconds = _RECONNECT_SECONDS
        while True:
            try:
                return await self._connect()
            except UnreachableError as error:
                log.warning("the database can't be reached: %r", error.__cause__)
                if self._backlog.count:
                    self._note_failing()
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _RECONNECT_SECONDS_MAX)

    async def _send_ready(self, shard: int, session: Session) -> _Turn:
        if shard in self._backlog.doubted:
            turn = await self._ask(shard, session)
            if turn is not None:
                return turn
        batch = self._backlog.take_ready(shard, self._load(), self._next_number)
        if batch is None:
            return _Turn.IDLE
        # While rows are locked, whoever meets one must not keep the others for long.
        lately_contended = self._loop.time() - self._contended_at.get(shard, float("-inf")) < _CONTENTION_SECONDS
        lost, _ = await self._send(
            session, batch, self._limits.lock_seconds * (_BRIEF_SHARE if lately_contended else 1)
        )
        return _Turn.LOST if lost else _Turn.DONE

    async def _ask(self, shard: int, session: Session) -> _Turn | None:
        """Ask a shard that is doubted whether it answers; gives what the turn came to if it does not."""
        try:
            await session.blocked_accounts([self._backlog.doubted[shard]])
        except StatementError as error:
            if error.failure in _NEEDS_NEW_SESSION:
                log.debug("asking a shard that is away: %s, %r", error, error.__cause__)
                if self._backlog.all_doubted:  # while others answer, it is not the database that fails
                    self._note_failing()
                return _Turn.AWAY if error.reported else _Turn.LOST
        self._backlog.trust(shard)
        return None

    async def _send_suspects(self, session: Session) -> _Turn:
        """Send those suspects together whose rows are free; if none is, the first by itself, waiting for its row.

        That one sends a single change: a statement that may wait in vain is to be a small one. If it is a transfer it
        would hold the rows that it has while it waits, so it waits only briefly, and then for a while without them.
        """
        suspects = self._backlog.take_suspects(self._suspects_together, self._limits.changes_per_statement)
        if not suspects:
            return _Turn.IDLE
        batch = Batch.of(suspects, self._load(), self._next_number)
        if len(suspects) > 1:
            blocked = await self._blocked(session, batch.touches())
            if blocked is None:
                self._backlog.put_back(suspects)
                return _Turn.LOST
            batch = batch.without(blocked)
        single = len(suspects) == 1 or not batch.parts
        if single:
            batch = Batch.of(suspects[:1], Load(1, 1), self._next_number)
        sent = {line.user_id for line in batch.lines()}
        self._backlog.put_back(line for line in suspects if line.user_id not in sent)
        if not sent:
            return _Turn.DONE
        may_wait = single and len(batch.touches()) == 1
        lost, failure = await self._send(session, batch, self._limits.lock_seconds * (1 if may_wait else _BRIEF_SHARE))
        if lost:
            return _Turn.LOST
        if failure is None:
            self._suspects_together = min(2 * self._suspects_together, self._limits.accounts_per_statement)
        elif failure is Failure.CONTENDED and single and not may_wait:
            await asyncio.sleep(self._limits.lock_seconds)
        return _Turn.DONE

    def _load(self) -> Load:
        return Load(self._limits.changes_per_statement, self._limits.accounts_per_statement)

    async def _blocked(self, session: Session, user_ids: Iterable[int]) -> Set[int] | None:
        """Which of these accounts have their rows locked by another transaction; None: the session is lost."""
        try:
            return await session.blocked_accounts(list(user_ids))
        except StatementError as error:
            self._report(error, "asking which rows are locked")
            return None if error.failure in _NEEDS_NEW_SESSION else frozenset()

    async def _send(self, session: Session, batch: Batch, lock_seconds: float) -> tuple[bool, Failure | None]:
        """Send a batch, settle it, and put its lines where they belong then.

        Gives whether the session is lost, and what a failure left behind. If a row could not be had in time, the
        accounts whose rows are locked become suspect. Where no row says that it is locked all lines of the batch do,
        and fewer suspects travel together until those in the way are by themselves.
        """
        failure = await self._apply(session, batch, lock_seconds)
        lost = failure in _NEEDS_NEW_SESSION
        contended: Set[int] = frozenset()
        if failure is Failure.CONTENDED:
            # A brief wait may have ended only because other services share the rows: that is no reason to go on so.
            if lock_seconds >= self._limits.lock_seconds:
                self._contended_at[batch.shard] = self._loop.time()
            touched = batch.touches()
            blocked = await self._blocked(session, touched) if len(touched) > 1 else touched
            lost = blocked is None
            contended = blocked or self._under_suspicion(batch)
            if not blocked:
                self._suspects_together = max(1, len(batch.parts) // 2)
        self._release(batch, contended)
        return lost, failure

    def _under_suspicion(self, batch: Batch) -> Set[int]:
        """The accounts of a batch that could not be had in time, where no row tells which of them are locked.

        A single change has its payer's line to itself then, so that it holds up no others in a line of its payees.
        """
        changes = batch.changes()
        if len(changes) > 1:
            return {line.user_id for line in batch.lines()}
        (waiting,) = changes
        if not waiting.answered:
            self._backlog.move(waiting, waiting.change.user_id)
        return set(waiting.change.accounts)

    def _release(self, batch: Batch, contended: Set[int]) -> None:
        """Let other lanes have a batch's lines. What has no time left for another try is answered first."""
        now = self._loop.time()
        lines = batch.lines()
        for line in lines:
            for waiting in line.overdue(now + self._limits.landing_seconds):
                self._answering.answer_overdue(waiting, now)
        self._backlog.contend(contended - {line.user_id for line in lines})
        for line in lines:
            self._backlog.release(line, line.user_id in contended)

    async def _apply(self, session: Session, batch: Batch, lock_seconds: float) -> Failure | None:
        """Send a batch, and answer what was decided; gives what a failure left behind, None if there was none."""
        changes = batch.changes()
        began = self._loop.time()
        _set_in_flight(changes, True)
        try:
            answers = await session.apply(
                [waiting.change for waiting in changes],
                [waiting.key for waiting in changes],
                [waiting.repeatable for waiting in changes],
                lock_seconds,
            )
        except StatementError as error:
            return self._settle_failure(changes, error)
        self._failing_since = None
        self._numbers.statement_changes.observe(len(changes))
        self._numbers.statement_seconds.observe(self._loop.time() - began)
        refused = self._answering.settle(batch, changes, answers)
        _set_in_flight(changes, False)  # not before: what has been committed must not look as if it had never been sent
        count_max = self._limits.changes_per_statement
        for start in range(0, len(refused), count_max):
            failure = await self._record_refusals(session, refused[start : start + count_max], lock_seconds)
            if failure is not None:
                return failure
        return None

    async def _record_refusals(self, session: Session, refused: ToRecord, lock_seconds: float) -> Failure | None:
        """Bind up to 1,000 refusals to their keys, and only then answer them; gives what a failure left behind."""
        refused = [one for one in refused if not one[0].answered]  # while others were recorded
        changes = [waiting for waiting, _ in refused]
        _set_in_flight(changes, True)
        try:
            bound = await session.record_refusals([record for _, record in refused], lock_seconds)
        except StatementError as error:
            return self._settle_failure(changes, error)
        _set_in_flight(changes, False)
        for waiting, record in refused:
            if (waiting.change.user_id, waiting.key) in bound:
                self._answering.answer(waiting, Refused(record.refusal))
        return None

    def _settle_failure(self, changes: list[WaitingChange], error: StatementError) -> Failure:
        """What follows for the changes of a statement that failed; they are still first in their accounts, in order."""
        _set_in_flight(changes, False)
        self._report(error, f"a statement with {len(changes)} changes")
        match error.failure:
            case Failure.UNKNOWN:
                self._backlog.doubt(changes)
                for waiting in changes:
                    waiting.unknown = waiting.repeatable = True
            case Failure.REJECTED if len(changes) == 1:
                (waiting,) = changes
                log.error(
                    "a change of user %d failed: %r",
                    waiting.change.user_id,
                    error.__cause__,
                    extra={"request_id": waiting.request_id},
                )
                self._answering.fail(waiting)
            case Failure.REJECTED:
                for waiting in changes:
                    waiting.alone = True
            case Failure.CONTENDED | Failure.KEY_TAKEN | Failure.CANNOT_WRITE:
                pass  # rolled back, and through no fault of theirs: they are sent again as they are
        return error.failure

    def _report(self, error: StatementError, what: str) -> None:
        self._numbers.count_failure(error.failure)
        level = logging.DEBUG if error.failure in (Failure.KEY_TAKEN, Failure.CONTENDED) else logging.WARNING
        log.log(level, "%s: %s, %r", what, error, error.__cause__)
        if error.failure in _NEEDS_NEW_SESSION:
            self._note_failing()

    def _note_failing(self) -> None:
        if not self.failing_seconds:
            self._failing_since = self._loop.time()
        self._failed_at = self._loop.time()

    async def _expire(self) -> None:
        """Answer what is out of time."""
        while True:
            await asyncio.sleep(_EXPIRE_SECONDS)
            now = self._loop.time()
            due = self._backlog.due(now + self._limits.landing_seconds)
            for waiting in due:
                self._answering.answer_overdue(waiting, now)
            for line in {waiting.line for waiting in due if waiting.line}:
                self._backlog.tidy(line)


def _set_in_flight(changes: Iterable[WaitingChange], in_flight: bool) -> None:
    for waiting in changes:
        waiting.in_flight = in_flight
