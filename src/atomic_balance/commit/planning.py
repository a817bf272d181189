"""What a balance covers. Pure functions on numbers; a balance covers a change if the sum is within both limits."""

from collections.abc import Iterable

from atomic_balance.changes import BALANCE_LIMIT, Refusal


def refusal(amount: int, balance: int, minimum_balance: int) -> Refusal | None:
    """Why `balance`, by itself, can't cover a change by `amount`; None if it can."""
    if balance + amount < minimum_balance:
        return Refusal.INSUFFICIENT_FUNDS
    if balance + amount > BALANCE_LIMIT:
        return Refusal.BALANCE_LIMIT_EXCEEDED
    return None


def covered_prefix(amounts: Iterable[int], balance: int, minimum_balance: int) -> int:
    """How many changes from the front, one applied after the other, stay within the limits at every step."""
    count = 0
    for amount in amounts:
        balance += amount
        if not minimum_balance <= balance <= BALANCE_LIMIT:
            break
        count += 1
    return count
