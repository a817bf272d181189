"""What an account covers. Pure functions on numbers.

`available` is what can be withdrawn or held: balance - held - minimum balance. `room`: what the balance can still grow.
A change moves both: available by amount - hold_amount, room by -amount. It is covered if neither falls below 0.
"""

from collections.abc import Iterable

from atomic_balance.changes import Change, Refusal


def refusal(change: Change, available: int, room: int) -> Refusal | None:
    """Why `change`, by itself, can't be covered; None if it can."""
    if available + change.amount - change.hold_amount < 0:
        return Refusal.INSUFFICIENT_FUNDS
    if room - change.amount < 0:
        return Refusal.BALANCE_LIMIT_EXCEEDED
    return None


def covered_prefix(changes: Iterable[Change], available: int, room: int) -> int:
    """How many changes from the front, one applied after the other, are covered at every step."""
    count = 0
    for change in changes:
        available += change.amount - change.hold_amount
        room -= change.amount
        if available < 0 or room < 0:
            break
        count += 1
    return count
