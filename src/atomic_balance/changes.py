"""The domain: what is asked of an account and what comes of it. Values only, no I/O."""

from enum import StrEnum

from msgspec import Struct

BALANCE_LIMIT = 2**53 - 1
"""The largest balance, amount and user id: what every JSON client can hold exactly."""


class Account(Struct, frozen=True, gc=False, rename="camel"):
    """An account as it is now; `version` is how many changes it has had. It is answered as it is here."""

    user_id: int
    balance: int
    minimum_balance: int
    version: int


class Change(Struct, frozen=True, gc=False):
    """One requested update of an account.

    `amount`: minor units, not 0; a negative one withdraws. `idempotency_key`: the caller's, None if it sent none.
    """

    user_id: int
    amount: int
    idempotency_key: str | None = None
    reference: str | None = None


class Refusal(StrEnum):
    """Why a change was refused."""

    INSUFFICIENT_FUNDS = "insufficient_funds"
    BALANCE_LIMIT_EXCEEDED = "balance_limit_exceeded"


class Applied(Struct, frozen=True, gc=False):
    """The change was committed; `balance` is the account's right after it. `replayed`: by an earlier request."""

    balance: int
    replayed: bool = False


class Refused(Struct, frozen=True, gc=False):
    """The change was not applied, for `reason`. `replayed`: an earlier request with its key was refused."""

    reason: Refusal
    replayed: bool = False


class Undecided(StrEnum):
    """Every other outcome; none of them binds the key. Its value is the error's code in errors.py."""

    NO_SUCH_USER = "user_not_found"
    KEY_REUSED = "idempotency_key_reused"
    """The key belongs to a change with another amount or reference."""
    TURNED_AWAY = "turned_away"
    """This request changed nothing, for want of a place, a connection or time; an earlier one with its key may have."""
    UNKNOWN = "outcome_unknown"
    """A statement with it was lost or is still under way: it may be applied yet."""
    FAILED = "internal_error"
    """This request changed nothing: its statement failed, for this change and no other."""


Outcome = Applied | Refused | Undecided


def is_same(one: Change, other: Change) -> bool:
    """Whether a second change under a key is the first one again."""
    return one.amount == other.amount and one.reference == other.reference
