"""The bodies of requests and answers. A type's description is what an error says was expected."""

from typing import Annotated

from msgspec import Meta, Struct

from atomic_balance.changes import BALANCE_LIMIT

UserId = Annotated[int, Meta(ge=1, le=BALANCE_LIMIT, description=f"an integer from 1 to {BALANCE_LIMIT}")]
Amount = Annotated[
    int,
    Meta(
        ge=-BALANCE_LIMIT,
        le=BALANCE_LIMIT,
        description=f"an integer other than 0, from -{BALANCE_LIMIT} to {BALANCE_LIMIT}",
    ),
]
Balance = Annotated[int, Meta(ge=0, le=BALANCE_LIMIT, description=f"an integer from 0 to {BALANCE_LIMIT}")]
Reference = Annotated[
    str,
    Meta(max_length=255, pattern=r"\A[^\x00]*\Z", description="a string of up to 255 characters without NUL, or null"),
]


class Request(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """A request's body: an unknown member is an error."""


class Answer(Struct, frozen=True, rename="camel"):
    """An answer's body."""


class BalanceUpdate(Request, frozen=True):
    """A change of one user's balance; a negative amount withdraws."""

    user_id: UserId
    amount: Amount

    def __post_init__(self) -> None:
        if self.amount == 0:
            raise ValueError("amount")


class UpdatedBalance(Answer, frozen=True):
    """The balance right after the change."""

    user_id: int
    new_balance: int


class AccountOpening(Request, frozen=True):
    """The balance that an account is opened with."""

    balance: Balance


class Account(Answer, frozen=True):
    """An account as it is now."""

    user_id: int
    balance: int


class Health(Answer, frozen=True):
    """Whether the service lives, or is ready to serve; `reason` says why it is not."""

    status: str
    reason: str | None = None


class Error(Answer, frozen=True):
    """What went wrong, in one line."""

    error: str
