"""What an account covers, and what fits into one batch. Pure functions and values, without I/O.

`available` is what can be withdrawn or held: balance - held - minimum balance. `room`: what the balance can still grow.
A change moves both: available by amount - hold_amount, room by -amount. It is covered if neither falls below 0.
"""

from collections.abc import Iterable, Set

from atomic_balance.changes import Change, Refusal


def refusal(change: Change, available: int, room: int) -> Refusal | None:
    """Why `change`, by itself, can't be covered by its account; None if it can."""
    if available + change.amount - change.hold_amount < 0:
        return Refusal.INSUFFICIENT_FUNDS
    if room - change.amount < 0:
        return Refusal.BALANCE_LIMIT_EXCEEDED
    return None


def covered_prefix(changes: Iterable[Change], available: int, room: int) -> int:
    """How many changes of one account from the front, one applied after the other, are covered at every step."""
    count = 0
    for change in changes:
        available += change.amount - change.hold_amount
        room -= change.amount
        if available < 0 or room < 0:
            break
        count += 1
    return count


class Load:
    """What one statement is to carry, change by change, up to its limits; `legs`: a change and each of its credits.

    No account that it credits owns a change in it, so that no debit counts on a credit that may be taken back: the
    statement can undo whatever one account asked for without touching what others did.
    """

    def __init__(self, legs_max: int, accounts_max: int) -> None:
        self.legs_left = legs_max
        self._accounts_left = accounts_max
        self._owners: set[int] = set()
        self._payees: set[int] = set()

    @property
    def full(self) -> bool:
        """Whether nothing more fits."""
        return bool(self._owners) and (self.legs_left <= 0 or self._accounts_left <= 0)

    def take(self, change: Change) -> bool:
        """Take `change` on if it fits; gives whether it did. The first one always does, however large it is."""
        owner = change.user_id
        if owner in self._payees:
            return False
        new = 0 if owner in self._owners else 1
        payees: Set[int] = frozenset()
        if change.payees:
            payees = {credit.user_id for credit in change.payees}
            if not payees.isdisjoint(self._owners):
                return False
            new += len(payees - self._payees)
        legs = 1 + len(payees)
        if self._owners and (legs > self.legs_left or new > self._accounts_left):
            return False
        self._owners.add(owner)
        self._payees.update(payees)
        self.legs_left -= legs
        self._accounts_left -= new
        return True
