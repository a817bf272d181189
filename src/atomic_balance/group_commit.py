"""Group commit: changes that arrive while a statement is in flight travel together in the next one.

One event loop, so no mutex. A lane is a task that owns a session. Lane 0 carries the load, one statement in flight;
the others carry one suspect account each, so that an account that is blocked, or whose change fails, holds up no other.
There is no timer and no added delay: with nothing in flight a change leaves at once, and nobody is answered before the
commit is durable. The idea is PostgreSQL's own group commit, one level up.
"""

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager

from msgspec import Struct, structs

from atomic_balance.changes import Applied, Change, Outcome, Refused, Undecided, is_same
from atomic_balance.connections import UnreachableError
from atomic_balance.counting import Numbers
from atomic_balance.planning import refusal
from atomic_balance.store import Answers, Judged, Recorded, Refusing, Session, State, StatementError
from atomic_balance.waiting import Batch, Waiting, WaitingAccount

log = logging.getLogger("atomic_balance")

_EXPIRE_SECONDS = 0.05
_RECONNECT_SECONDS = 0.05
_RECONNECT_SECONDS_MAX = 0.5


class Limits(Struct, frozen=True):
    """The limits of a GroupCommit. At most 1,000 changes per statement, so that no sum leaves bigint.

    `landing_seconds`: how long before its deadline a change is not sent any more; what a statement may take.
    """

    changes_per_statement: int
    accounts_per_statement: int
    lanes: int
    waiting_changes: int
    waiting_changes_per_account: int
    deadline_seconds: float
    landing_seconds: float


class GroupCommit:
    """Takes changes and gives their outcomes; to be entered as `async with GroupCommit(...).running()`."""

    def __init__(self, connect: Callable[[], Awaitable[Session]], limits: Limits, numbers: Numbers) -> None:
        self._connect = connect
        self._limits = limits
        self._numbers = numbers
        self._accounts: dict[int, WaitingAccount] = {}
        self._keyed: dict[tuple[int, str], Waiting] = {}
        # Accounts that no lane has, in the order in which they are to be taken.
        self._ready: OrderedDict[int, WaitingAccount] = OrderedDict()
        self._suspects: OrderedDict[int, WaitingAccount] = OrderedDict()
        self._ready_wake = asyncio.Event()
        self._suspects_wake = asyncio.Event()
        self._waiting_count = 0
        self._next_number = 0
        self._key_prefix = f" {secrets.token_hex(16)}-"  # a space first: no caller's key can hold one
        self._loop = asyncio.get_running_loop()

    def submit(self, change: Change) -> asyncio.Future[Outcome]:
        """Accept a change; the future gives its outcome, by the deadline, and is never an exception."""
        future: asyncio.Future[Outcome] = self._loop.create_future()
        account = self._accounts.get(change.user_id)
        if self.full or (account is not None and len(account.changes) >= self._limits.waiting_changes_per_account):
            self._tell(future, Undecided.NOT_APPLIED)
            return future
        key = change.idempotency_key
        first = self._keyed.get((change.user_id, key)) if key is not None else None
        if first is not None:
            if is_same(first.change, change):
                first.twins.append(future)
                self._waiting_count += 1
            else:
                self._tell(future, Undecided.KEY_REUSED)
            return future
        if account is None:
            account = self._accounts[change.user_id] = WaitingAccount(change.user_id)
            self._queue(account)
        number = self._next_number
        self._next_number += 1
        deadline = self._loop.time() + self._limits.deadline_seconds
        waiting = Waiting(change, key or f"{self._key_prefix}{number:012x}", number, deadline, future)
        account.changes.append(waiting)
        self._waiting_count += 1
        if key is not None:
            self._keyed[change.user_id, key] = waiting
        return future

    @property
    def waiting_count(self) -> int:
        """How many changes wait for their answer."""
        return self._waiting_count

    @property
    def full(self) -> bool:
        """Whether there is no place for a further change."""
        return self._waiting_count >= self._limits.waiting_changes

    @asynccontextmanager
    async def running(self) -> AsyncIterator["GroupCommit"]:
        """Run the lanes; at the end everything that was accepted is answered first."""
        async with asyncio.TaskGroup() as tasks:
            owned = [
                tasks.create_task(self._lane(self._take_ready, self._ready_wake)),
                *(
                    tasks.create_task(self._lane(self._take_suspect, self._suspects_wake))
                    for _ in range(1, self._limits.lanes)
                ),
                tasks.create_task(self._expire()),
            ]
            try:
                yield self
                while self._accounts:  # noqa: ASYNC110 - bounded: by the deadline everything is answered
                    await asyncio.sleep(_EXPIRE_SECONDS)
            finally:
                for task in owned:
                    task.cancel()

    async def _lane(self, take: Callable[[], Batch | None], wake: asyncio.Event) -> None:
        session: Session | None = None
        try:
            while True:
                if session is None or session.closed:
                    session = await self._connected()
                wake.clear()
                batch = take()
                if batch is None:
                    await wake.wait()
                elif not await self._attempt(session, batch):
                    session.terminate()
                    await asyncio.sleep(_RECONNECT_SECONDS)
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
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _RECONNECT_SECONDS_MAX)

    def _take_ready(self) -> Batch | None:
        room = self._limits.changes_per_statement
        parts: list[tuple[WaitingAccount, list[Waiting]]] = []
        while self._ready and room and len(parts) < self._limits.accounts_per_statement:
            _, account = self._ready.popitem(last=False)
            part = account.portion(room)
            account.busy = True
            parts.append((account, part))
            room -= len(part)
        return Batch(parts, self._next_number) if parts else None

    def _take_suspect(self) -> Batch | None:
        if not self._suspects:
            return None
        _, account = self._suspects.popitem(last=False)
        account.busy = True
        return Batch([(account, account.portion(self._limits.changes_per_statement))], self._next_number)

    async def _attempt(self, session: Session, batch: Batch) -> bool:
        """Send a batch and settle it; gives whether the session may be used again."""
        in_flight = batch.changes()
        began = self._loop.time()
        for account, _ in batch.parts:
            account.suspect = False
        try:
            for waiting in in_flight:
                waiting.in_flight = True
            answers = await session.apply(
                [waiting.change for waiting in in_flight],
                [waiting.key for waiting in in_flight],
                [waiting.repeatable for waiting in in_flight],
            )
            _landed(in_flight)
            self._numbers.statement_changes.observe(len(in_flight))
            self._numbers.statement_seconds.observe(self._loop.time() - began)
            refused = self._settle(batch, in_flight, answers)
            if refused:
                in_flight = [waiting for waiting, _ in refused]
                for waiting in in_flight:
                    waiting.in_flight = True
                bound = await session.record_refusals([refusing for _, refusing in refused])
                _landed(in_flight)
                for waiting, refusing in refused:
                    if (waiting.change.user_id, waiting.key) in bound:
                        self._answer(waiting, Refused(refusing.refusal))
        except StatementError as error:
            self._numbers.count_failure(error.state)
            level = logging.DEBUG if error.state in (State.KEY_TAKEN, State.CONTENDED) else logging.WARNING
            log.log(level, "a statement with %d changes: %s, %r", len(in_flight), error, error.__cause__)
            self._failed(in_flight, error.state)
            return error.state not in (State.UNKNOWN, State.READ_ONLY)
        except Exception:
            log.exception("settling %d changes failed", len(in_flight))
            self._failed(in_flight, State.UNKNOWN)
            return False
        finally:
            for account, _ in batch.parts:
                account.busy = False
                self._tidy(account)
        return True

    def _settle(self, batch: Batch, sent: list[Waiting], answers: Answers) -> list[tuple[Waiting, Refusing]]:
        """Answer what the statement decided; gives the refusals that must be recorded before they are answered."""
        for index, recorded in answers.recorded.items():
            self._answer_recorded(sent[index], recorded)
        to_record: list[tuple[Waiting, Refusing]] = []
        first = 0
        for account, part in batch.parts:
            fresh = part
            if answers.recorded:
                fresh = [waiting for index, waiting in enumerate(part, first) if index not in answers.recorded]
            first += len(part)
            judged = answers.judged.get(account.user_id)
            if judged is not None:
                to_record += self._judge(account, fresh, judged, batch.next_number)
            elif fresh:
                for waiting in account.arrived_before(batch.next_number):
                    self._answer(waiting, Undecided.UNKNOWN if waiting.unknown else Undecided.NO_SUCH_USER)
        return to_record

    def _answer_recorded(self, waiting: Waiting, recorded: Recorded) -> None:
        if recorded.amount != waiting.change.amount or recorded.reference != waiting.change.reference:
            self._answer(waiting, Undecided.KEY_REUSED)
        elif recorded.refusal is None:
            self._answer(waiting, Applied(recorded.balance, replayed=not waiting.unknown))
        else:
            self._answer(waiting, Refused(recorded.refusal, replayed=not waiting.unknown))

    def _judge(
        self, account: WaitingAccount, sent: list[Waiting], judged: Judged, next_number: int
    ) -> Iterator[tuple[Waiting, Refusing]]:
        """Answer an account's changes that were applied, or that the statement's balance by itself can't cover.

        What was waiting when the statement was sent is judged with what was sent, or it could wait for ever. Gives the
        refusals to be recorded first: of those that may be repeated.
        """
        balance = judged.balance
        if judged.applied:
            for waiting in sent:
                balance += waiting.change.amount
                self._answer(waiting, Applied(balance))
        account.balance, account.minimum_balance = balance, judged.minimum_balance
        for waiting in account.arrived_before(next_number):
            reason = refusal(waiting.change.amount, balance, judged.minimum_balance)
            if reason is None:
                continue
            if waiting.repeatable:
                yield waiting, Refusing(waiting.change, waiting.key, balance, reason)
            else:
                self._answer(waiting, Refused(reason))

    def _failed(self, in_flight: list[Waiting], state: State) -> None:
        """What follows from a statement that failed; its changes are still first in their accounts, in order."""
        _landed(in_flight)
        if state is State.REJECTED and len(in_flight) == 1:
            self._answer(in_flight[0], Undecided.UNKNOWN if in_flight[0].unknown else Undecided.FAILED)
            return
        for waiting in in_flight:
            if state is State.UNKNOWN:
                waiting.unknown = waiting.repeatable = True
            elif state is State.REJECTED:
                waiting.alone = True
            elif state is State.CONTENDED:
                self._accounts[waiting.change.user_id].suspect = True

    def _answer(self, waiting: Waiting, outcome: Outcome) -> None:
        if waiting.answered:
            return
        waiting.answered = True
        self._tell(waiting.future, outcome)
        self._waiting_count -= 1 + len(waiting.twins)
        accepted = waiting.deadline - self._limits.deadline_seconds
        self._numbers.change_seconds.observe(self._loop.time() - accepted)
        if waiting.change.idempotency_key is not None:
            del self._keyed[waiting.change.user_id, waiting.key]
            for twin in waiting.twins:
                self._tell(twin, outcome if isinstance(outcome, Undecided) else structs.replace(outcome, replayed=True))

    def _tell(self, future: asyncio.Future[Outcome], outcome: Outcome) -> None:
        if not future.done():  # one whose caller was cancelled is
            future.set_result(outcome)
        self._numbers.count(outcome)

    def _tidy(self, account: WaitingAccount) -> None:
        """Answer what is out of time, let go of what is answered, and put the account where it belongs now.

        What is not in flight is given up a little before its deadline: what then is in flight can land in time, and is
        known to be applied or not.
        """
        now = self._loop.time()
        for waiting in account.overdue(now + self._limits.landing_seconds):
            if not waiting.in_flight:
                self._answer(waiting, Undecided.UNKNOWN if waiting.unknown else Undecided.NOT_APPLIED)
            elif waiting.deadline <= now:
                self._answer(waiting, Undecided.UNKNOWN)
        account.drop_answered()
        if account.busy:
            return
        if account.changes:
            self._queue(account)
        else:
            del self._accounts[account.user_id]
            self._ready.pop(account.user_id, None)
            self._suspects.pop(account.user_id, None)

    def _queue(self, account: WaitingAccount) -> None:
        """Put an account where one lane will take it, and no other."""
        if account.suspect or (account.changes and account.changes[0].alone):
            self._ready.pop(account.user_id, None)
            self._suspects[account.user_id] = account
            self._suspects_wake.set()
        else:
            self._suspects.pop(account.user_id, None)
            self._ready[account.user_id] = account
            self._ready_wake.set()

    async def _expire(self) -> None:
        """Answer what is past its deadline."""
        while True:
            await asyncio.sleep(_EXPIRE_SECONDS)
            for account in list(self._accounts.values()):
                self._tidy(account)


def _landed(changes: Iterable[Waiting]) -> None:
    for waiting in changes:
        waiting.in_flight = False
