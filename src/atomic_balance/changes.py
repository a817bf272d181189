"""The domain: what is asked of an account and what comes of it. Values only, no I/O."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

BALANCE_LIMIT = 2**53 - 1
"""The largest balance, amount and user id: what every JSON client can hold exactly."""

UserId = Annotated[int, Meta(ge=1, le=BALANCE_LIMIT, description=f"an integer from 1 to {BALANCE_LIMIT}")]
Balance = Annotated[
    int,
    Meta(
        ge=-BALANCE_LIMIT,
        le=BALANCE_LIMIT,
        description=f"an integer from minimumBalance (0 unless given) to {BALANCE_LIMIT}",
    ),
]
MinimumBalance = Annotated[
    int,
    Meta(ge=-BALANCE_LIMIT, le=BALANCE_LIMIT, description=f"an integer from -{BALANCE_LIMIT} to {BALANCE_LIMIT}"),
]


class Account(Struct, frozen=True, gc=False, rename="camel"):
    """An account as it is now. It is answered as it is here.

    `held`: the part of the balance that open holds have set aside. `available`: what can be withdrawn or held, which is
    balance - held - minimum_balance. `version`: how many changes it has had.
    """

    user_id: int
    balance: int
    held: int
    available: int
    minimum_balance: int
    version: int


class Credit(NamedTuple):
    """What a transfer adds to the balance of one of its payees."""

    user_id: int
    amount: int


class Change(Struct, frozen=True, gc=False):
    """One requested change of an account.

    `amount`: minor units, what it adds to the balance. `hold_amount`: what it adds to what is held: positive for a
    hold, negative for the settlement that ends one. One of the two is not 0. `key`: the caller's - a hold's is its id -
    or a settlement's, made from the hold's id; None if there is none. `hold_id`: which hold a settlement ends.
    `lasting_seconds`: of a hold, for how long it holds; 0 for a settlement that is the hold's expiry.
    `payees`: of a transfer, who is credited with how much of what the account pays, by user id; together -amount.
    """

    user_id: int
    amount: int
    key: str | None = None
    reference: str | None = None
    hold_amount: int = 0
    hold_id: str | None = None
    lasting_seconds: int | None = None
    payees: tuple[Credit, ...] = ()

    @property
    def is_expiry(self) -> bool:
        """Whether it settles a hold because that has expired."""
        return self.lasting_seconds == 0

    @property
    def accounts(self) -> list[int]:
        """The user ids of all accounts that it moves, its own first."""
        return [self.user_id, *(credit.user_id for credit in self.payees)]


def hold(user_id: int, hold_id: str, amount: int, lasting_seconds: int, reference: str | None) -> Change:
    """The change that sets `amount` aside, under the key `hold_id`."""
    return Change(user_id, 0, hold_id, reference, amount, lasting_seconds=lasting_seconds)


def transfer(user_id: int, payees: Iterable[Credit], key: str | None, reference: str | None) -> Change:
    """The change that moves money from one user, who pays, to `payees`."""
    by_id = tuple(sorted(payees))
    return Change(user_id, -sum(credit.amount for credit in by_id), key, reference, payees=by_id)


def capture(user_id: int, hold_id: str, held: int, amount: int, payees: Iterable[Credit] = ()) -> Change:
    """The settlement that withdraws `amount` of the `held` that a hold has set aside, and releases the rest.

    `payees`: who gets the amount, all of it; empty: it leaves.
    """
    return Change(user_id, -amount, settlement_key(hold_id), None, -held, hold_id, payees=tuple(sorted(payees)))


def release(user_id: int, hold_id: str, held: int, expired: bool = False) -> Change:
    """The settlement that releases all that a hold has set aside; `expired`: because its time is over."""
    return Change(user_id, 0, settlement_key(hold_id), None, -held, hold_id, 0 if expired else None)


def settlement_key(hold_id: str) -> str:
    """The key of whatever settles a hold: all that try meet at it. It begins with a space, so no caller can send it."""
    return f" settlement {hold_id}"


def credit_key(payer_id: int, key: str) -> str:
    """The key of a payee's credit, made of the payer and the key of the payer's change. No caller can send it."""
    return f" {payer_id} {key}"


def transfer_key(payer_id: int, credit_key: str) -> str:
    """The key of the payer's change, from that of a payee's credit."""
    return credit_key.removeprefix(f" {payer_id} ")


class Refusal(StrEnum):
    """Why a change was refused."""

    INSUFFICIENT_FUNDS = "insufficient_funds"
    BALANCE_LIMIT_EXCEEDED = "balance_limit_exceeded"


class Applied(Struct, frozen=True, gc=False):
    """The change was committed; `balance` is the account's right after it. `replayed`: by an earlier request.

    `expires_at`: of a hold that has just been placed, until when it holds; None of one that the journal had: what has
    become of it since is not known. `payee_balances`: of a transfer, each payee's right after it, by id.
    """

    balance: int
    replayed: bool = False
    expires_at: datetime | None = None
    payee_balances: Mapping[int, int] | None = None


class Refused(Struct, frozen=True, gc=False):
    """The change was not applied, for `reason`. `replayed`: an earlier request with its key was refused."""

    reason: Refusal
    replayed: bool = False


class NoSuchPayee(Struct, frozen=True, gc=False):
    """The transfer was not applied, because this user, who was to be paid, does not exist. It binds no key."""

    user_id: int


class Undecided(StrEnum):
    """Every other outcome; none of them binds the key. Its value is the error's code in errors.py."""

    NO_SUCH_USER = "user_not_found"
    KEY_REUSED = "idempotency_key_reused"
    """The key belongs to another change: of another kind, or with another amount, reference or payees."""
    TURNED_AWAY = "turned_away"
    """This request changed nothing, for want of a place, a connection or time; an earlier one with its key may have."""
    UNKNOWN = "outcome_unknown"
    """A statement with it was lost or is still under way: it may be applied yet."""
    FAILED = "internal_error"
    """This request changed nothing: its statement failed, for this change and no other."""


Outcome = Applied | Refused | NoSuchPayee | Undecided


def is_same(one: Change, other: Change) -> bool:
    """Whether a second change under a key is the first one again. How long a hold lasts is not compared."""
    return (
        one.amount == other.amount
        and one.hold_amount == other.hold_amount
        and one.reference == other.reference
        and one.is_expiry == other.is_expiry
        and one.payees == other.payees
    )
