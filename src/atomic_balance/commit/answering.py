"""What a statement's answers mean for the changes that wait: who is told what, and what must be recorded before."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeGuard

from msgspec import structs

from atomic_balance.changes import (
    BALANCE_LIMIT,
    Applied,
    Change,
    NoSuchPayee,
    Outcome,
    Refusal,
    Refused,
    Undecided,
    is_same,
)
from atomic_balance.commit.backlog import Backlog, Batch
from atomic_balance.commit.planning import refusal
from atomic_balance.commit.waiting import WaitingAccount, WaitingChange
from atomic_balance.observe.counting import Numbers
from atomic_balance.postgres.session import AccountResult, Answers, Recorded, RefusalRecord, Unpaid

log = logging.getLogger("atomic_balance")

_FUTILE_MAX = 3  # another process settles a hold once, so its settlement is found at the second try
_REFUSALS = {str(reason): reason for reason in Refusal}

ToRecord = list[tuple[WaitingChange, RefusalRecord]]
"""Refusals that are to be bound to their keys before they are answered."""


class Answering:
    """Answers waiting changes, each once.

    `accept`: takes what has waited for another change with its key, if that did not bind the key. `deadline_seconds`:
    how long a change waits at most.
    """

    def __init__(
        self,
        backlog: Backlog,
        numbers: Numbers,
        deadline_seconds: float,
        accept: Callable[[Change, asyncio.Future[Outcome], str | None, float], None],
    ) -> None:
        self._backlog = backlog
        self._numbers = numbers
        self._deadline_seconds = deadline_seconds
        self._accept = accept
        self._loop = asyncio.get_running_loop()

    def answer(self, waiting: WaitingChange, outcome: Outcome) -> None:
        """Tell everybody who waits for a change what became of it, unless they have been told."""
        if waiting.answered:
            return
        self._backlog.answer(waiting)
        self.resolve(waiting.future, outcome)
        accepted = waiting.deadline - self._deadline_seconds
        self._numbers.change_seconds.observe(self._loop.time() - accepted)
        if waiting.duplicates:
            again = structs.replace(outcome, replayed=True) if _binds(outcome, waiting.change) else outcome
            for duplicate in waiting.duplicates:
                self.resolve(duplicate, again)
        for follower in waiting.followers:
            if _binds(outcome, waiting.change):
                self.resolve(follower.future, Undecided.KEY_REUSED)
            elif outcome in (Undecided.TURNED_AWAY, Undecided.UNKNOWN) or follower.deadline <= self._loop.time():
                self.resolve(follower.future, Undecided.TURNED_AWAY)  # it has waited as long, and was never sent
            else:
                self._accept(*follower)

    def resolve(self, future: asyncio.Future[Outcome], outcome: Outcome) -> None:
        """Give one caller an outcome."""
        if not future.done():  # one whose caller was cancelled is
            future.set_result(outcome)
        self._numbers.count(outcome)

    def answer_overdue(self, waiting: WaitingChange, now: float) -> None:
        """Give a change up, a little before its deadline if it is not in flight.

        So what then is in flight can land in time, and is known to be applied or not.
        """
        if not waiting.in_flight:
            self._without(waiting, Undecided.TURNED_AWAY)
        elif waiting.deadline <= now:
            self.answer(waiting, Undecided.UNKNOWN)

    def fail(self, waiting: WaitingChange) -> None:
        """Answer a change whose statement fails for what is in it."""
        self._without(waiting, Undecided.FAILED)

    def settle(self, batch: Batch, sent: list[WaitingChange], answers: Answers) -> ToRecord:
        """Answer what the statement with `batch` decided; gives the refusals that must be recorded first.

        `sent`: its changes, as `answers` counts them.
        """
        for index, recorded in answers.recorded.items():
            self.answer(sent[index], _of_recorded(sent[index], recorded))
        to_record = self._settle_unpaid(sent, answers) if answers.unpaid else []
        decided = {waiting.number for waiting, _ in to_record} | _not_applied_now(sent, answers)
        payee_balances = {sent[index].number: balances for index, balances in answers.credited.items()}
        parts = batch.parts
        if decided:  # not by who has an answer: what was given up at its deadline meanwhile was applied with the others
            parts = [(line, [one for one in part if one.number not in decided]) for line, part in parts]
        # All of an owner's together: some may have waited in another's line.
        fresh = _by_owner([waiting for _, part in parts for waiting in part])
        for owner_id, own in fresh.items():
            result = answers.accounts.get(owner_id)
            if result is not None:
                self._settle_applied(own, result, payee_balances)
        for line, part in parts:
            for owner_id, own in _by_owner(part).items():
                result = answers.accounts.get(owner_id)
                # A list: those who have waited for a settlement join the line meanwhile.
                judged = list(_to_be_judged(line, owner_id, own, batch.arrived_before))
                if result is not None:
                    to_record += self._settle_judged(line, owner_id, fresh[owner_id], judged, result)
                else:
                    for waiting in judged:
                        self._without(waiting, Undecided.NO_SUCH_USER)
        return to_record

    def _settle_unpaid(self, sent: list[WaitingChange], answers: Answers) -> ToRecord:
        """Answer transfers with a payee that does not exist, or has no room even for theirs alone.

        Where only all that the batch brings has no room, the payer's changes go alone, so that what fits is found.
        """
        to_record: ToRecord = []
        crowded: set[int] = set()
        for index, unpaid in answers.unpaid.items():
            waiting = sent[index]
            change = waiting.change
            payer = answers.accounts.get(change.user_id)
            missing = [one.user_id for one in unpaid if one.balance is None]
            if missing:
                self._without(waiting, NoSuchPayee(missing[0]))
            elif payer is not None:
                crowded.add(change.user_id)
                if _is_too_much(change, unpaid):
                    available, room = payer.balance - payer.held - payer.minimum_balance, BALANCE_LIMIT - payer.balance
                    reason = refusal(change, available, room) or Refusal.BALANCE_LIMIT_EXCEEDED
                    self._refuse(waiting, reason, payer.balance, to_record)
        for waiting in sent:
            if waiting.change.user_id in crowded:
                waiting.alone = True
        return to_record

    def _settle_applied(
        self, sent: list[WaitingChange], result: AccountResult, payee_balances: Mapping[int, Mapping[int, int]]
    ) -> None:
        """Answer all that the batch had of an account, if it was applied.

        `payee_balances`: by number, of the transfers.
        """
        if not result.applied:
            if result.held + sum(waiting.change.hold_amount for waiting in sent) < 0:
                self._isolate_settlements(sent)
            return
        balance = result.balance
        for waiting in sent:
            change = waiting.change
            balance += change.amount
            if change.hold_amount:
                self._numbers.count_hold(change)
            if change.hold_amount or change.payees:
                outcome = Applied(
                    balance,
                    expires_at=result.expiry_of(change),
                    payee_balances=payee_balances[waiting.number] if change.payees else None,
                )
            else:
                outcome = Applied(balance)
            self.answer(waiting, outcome)

    def _settle_judged(
        self,
        line: WaitingAccount,
        owner_id: int,
        sent: list[WaitingChange],
        judged: list[WaitingChange],
        result: AccountResult,
    ) -> ToRecord:
        """Answer what the account's balance by itself can't cover; gives the refusals to be recorded first.

        `sent`: all that the batch had of the account.
        """
        balance, held = result.balance, result.held
        if result.applied:
            balance += sum(waiting.change.amount for waiting in sent)
            held += sum(waiting.change.hold_amount for waiting in sent)
        available, room = balance - held - result.minimum_balance, BALANCE_LIMIT - balance
        if line.user_id == owner_id:
            line.available, line.room = available, room
        to_record: ToRecord = []
        for waiting in judged:
            reason = refusal(waiting.change, available, room)
            if reason is not None:
                self._refuse(waiting, reason, balance, to_record)
            elif line.user_id != owner_id:
                waiting.alone = True  # how many of its payer's are covered together is not known in this line
        return to_record

    def _refuse(self, waiting: WaitingChange, reason: Refusal, balance: int, to_record: ToRecord) -> None:
        """Refuse a change; one that may be repeated is added `to_record`, which comes first.

        A settlement's refusal is not recorded: it would be the end of its hold. So it is sent once more, by itself, to
        see whether another process has just settled the hold, and has filled the payee by that.
        """
        if waiting.change.hold_id is not None and not waiting.refused:
            waiting.refused = waiting.alone = True
        elif waiting.change.hold_id is not None:
            self._without(waiting, Refused(reason))
        elif waiting.repeatable:
            to_record.append((waiting, RefusalRecord(waiting.change, waiting.key, balance, reason)))
        else:
            self.answer(waiting, Refused(reason))

    def _without(self, waiting: WaitingChange, outcome: Outcome) -> None:
        """Answer a change that was not applied and binds no key, unless a lost statement may have applied it."""
        self.answer(waiting, Undecided.UNKNOWN if waiting.unknown else outcome)

    def _isolate_settlements(self, sent: list[WaitingChange]) -> None:
        """Have settlements go alone that would settle more than is held.

        Nearly always another process has just settled one of their holds, which is found when it is sent again. If it
        is not, what is held and the list of open holds contradict each other, and the account must not wait for that.
        """
        for waiting in sent:
            if waiting.change.hold_amount < 0 and not waiting.answered:
                waiting.alone = True
                waiting.futile_count += 1
                if waiting.futile_count > _FUTILE_MAX:
                    log.error(
                        "user %d holds less than its open hold %r: run atomic-balance verify",
                        waiting.change.user_id,
                        waiting.change.hold_id,
                        extra={"request_id": waiting.request_id},
                    )
                    self.fail(waiting)


def _binds(outcome: Outcome, change: Change) -> TypeGuard[Applied | Refused]:
    """Whether this outcome of `change` is bound to its key. A settlement's refusal is not: the hold is still there."""
    return isinstance(outcome, Applied) or (isinstance(outcome, Refused) and change.hold_id is None)


def _not_applied_now(sent: list[WaitingChange], answers: Answers) -> set[int]:
    """The numbers of those that the journal had already, and of transfers to somebody who does not exist."""
    missing = (index for index, unpaid in answers.unpaid.items() if any(one.balance is None for one in unpaid))
    return {sent[index].number for index in (*answers.recorded, *missing)}


def _by_owner(changes: list[WaitingChange]) -> dict[int, list[WaitingChange]]:
    """Changes by whose they are, in their order."""
    owners: dict[int, list[WaitingChange]] = {}
    for waiting in changes:
        owners.setdefault(waiting.change.user_id, []).append(waiting)
    return owners


def _to_be_judged(
    line: WaitingAccount, owner_id: int, sent: list[WaitingChange], arrived_before: int
) -> Iterable[WaitingChange]:
    """The changes without an answer that are to be held against an account's balance: all that waited, not only `sent`.

    Or they could wait for ever. But what goes alone is judged alone too, and so is what waits in another's line.
    """
    if line.user_id == owner_id and not sent[0].alone:
        return line.own_before(arrived_before)
    return (waiting for waiting in sent if not waiting.answered)


def _is_too_much(change: Change, unpaid: Iterable[Unpaid]) -> bool:
    """Whether a payee has no room for what this transfer alone would credit."""
    amounts = dict(change.payees)
    return any((one.balance or 0) + amounts[one.user_id] > BALANCE_LIMIT for one in unpaid)


def _of_recorded(waiting: WaitingChange, recorded: Recorded) -> Outcome:
    """The outcome of a change that the journal already had when it was sent."""
    if not is_same(recorded.change, waiting.change):
        return Undecided.KEY_REUSED
    replayed = not waiting.unknown
    if recorded.refusal is None:
        return Applied(recorded.balance, replayed, payee_balances=recorded.payee_balances)
    reason = _REFUSALS.get(recorded.refusal)
    if reason is None:
        log.error(
            "user %d: a change was refused for %s, which is not known here", waiting.change.user_id, recorded.refusal
        )
        return Undecided.FAILED
    return Refused(reason, replayed)
