"""The domain: what is asked of an account and what comes of it. Values only, no I/O."""

from enum import StrEnum

import msgspec

BALANCE_LIMIT = 2**53 - 1
"""The largest balance, amount and user id: what every JSON client can hold exactly."""


class Refusal(StrEnum):
    """Why a change was refused."""

    INSUFFICIENT_FUNDS = "insufficient_funds"
    BALANCE_LIMIT_EXCEEDED = "balance_limit_exceeded"


class Change(msgspec.Struct, frozen=True):
    """One requested update of an account: `amount` in minor units, not 0; a negative one withdraws."""

    user_id: int
    amount: int


class Applied(msgspec.Struct, frozen=True):
    """The change was committed; `balance` is the account's right after it."""

    balance: int


class Refused(msgspec.Struct, frozen=True):
    """The change was not applied, for `reason`; the balance is as it was."""

    reason: Refusal


class NoSuchUser(msgspec.Struct, frozen=True):
    """There is no account of that user id."""


Outcome = Applied | Refused | NoSuchUser
