"""The bodies of requests and answers. A type's description is what an error says was expected."""

from datetime import UTC, datetime
from typing import Annotated, ClassVar

from msgspec import UNSET, Meta, Struct, UnsetType

from atomic_balance.changes import BALANCE_LIMIT, Account, Balance, MinimumBalance, UserId

UPDATES_MAX = 1_000
PAYEES_MAX = 100
PAYEES_IN_ALL_MAX = 1_000
LASTING_SECONDS_MAX = 365 * 24 * 3600
PAGE_MAX = 1_000
WAIT_SECONDS_MAX = 30

UPDATE_BYTES_MAX = 5 * 1024
"""The most bytes of an update, alone or one of many. All escaped, a reference has up to 255 characters of 12 bytes
(\\ud83d\\ude00), a key 255 of 6 (\\u0021), names and numbers 250 bytes: 4,900 in all. The rest is for white space.
"""
PAYEE_BYTES_MAX = 256
"""The most bytes of one payee. Names and numbers have 130, all escaped; the rest is for white space."""
ACCOUNT_BYTES_MAX = 1024
"""The most bytes of an opening or a patch. Names and numbers have 170, all escaped; the rest is for white space."""

Amount = Annotated[
    int,
    Meta(
        ge=-BALANCE_LIMIT,
        le=BALANCE_LIMIT,
        description=f"an integer other than 0, from -{BALANCE_LIMIT} to {BALANCE_LIMIT}",
        extra_json_schema={"not": {"const": 0}},
    ),
]
Reference = Annotated[
    str,
    Meta(max_length=255, pattern=r"^[^\x00]*$", description="a string of up to 255 characters without NUL, or null"),
]
PositiveAmount = Annotated[int, Meta(ge=1, le=BALANCE_LIMIT, description=f"an integer from 1 to {BALANCE_LIMIT}")]
PageLimit = Annotated[int, Meta(ge=1, le=PAGE_MAX, description=f"an integer from 1 to {PAGE_MAX}")]
Time = Annotated[
    str,
    Meta(
        pattern=r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)\Z",
        description="a time with an offset, such as 2026-01-31T23:59:59Z (in a URL, + is %2B)",
        extra_json_schema={"format": "date-time", "pattern": "T.+(Z|[+-][0-9:]+)$"},
    ),
]
IdempotencyKey = Annotated[
    str,
    Meta(
        pattern=r"\A[!-~]{1,255}\Z",
        description="1 to 255 visible ASCII characters",
        extra_json_schema={"pattern": "^[!-~]{1,255}$"},  # JSON Schema has neither \A nor \Z
    ),
]

FeedCursor = Annotated[
    str,
    Meta(
        pattern=r"\A[0-9]{1,16}\.[0-9]{1,16}\.[0-9]{1,18}\Z",  # which all fit into 64 bits
        description="what an earlier answer had as next",
        extra_json_schema={"pattern": r"^[0-9]{1,16}\.[0-9]{1,16}\.[0-9]{1,18}$"},
    ),
]


class Request(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """A request's body, or its parameters: an unknown member is an error."""


class Body(Request, frozen=True):
    """A request's body, of at most `bytes_max` bytes."""

    bytes_max: ClassVar[int]


class Answer(Struct, frozen=True, rename="camel"):
    """An answer's body."""


class BalanceUpdate(Body, frozen=True, gc=False):
    """A change of one user's balance; a negative amount withdraws."""

    bytes_max = UPDATE_BYTES_MAX

    user_id: UserId
    amount: Amount
    reference: Reference | None = None

    def __post_init__(self) -> None:
        if self.amount == 0:
            raise ValueError("amount")


class KeyedBalanceUpdate(BalanceUpdate, frozen=True, gc=False):
    """One of many updates, with its idempotency key if it is to be repeatable."""

    idempotency_key: IdempotencyKey | None = None


class BalanceUpdates(Body, frozen=True):
    """Updates, each applied or refused on its own."""

    bytes_max = UPDATES_MAX * UPDATE_BYTES_MAX

    updates: Annotated[
        list[KeyedBalanceUpdate],
        Meta(min_length=1, max_length=UPDATES_MAX, description=f"an array of 1 to {UPDATES_MAX} updates"),
    ]


class Payee(Request, frozen=True, gc=False):
    """A user who is paid, and how much."""

    user_id: UserId
    amount: PositiveAmount


Payees = Annotated[
    list[Payee],
    Meta(
        min_length=1,
        max_length=PAYEES_MAX,
        description=f"an array of 1 to {PAYEES_MAX} payees, each user once and none of them the payer, "
        f"who get {BALANCE_LIMIT} at most in all",
    ),
]


class Transfer(Body, frozen=True):
    """Money that one user pays to others: all of it, or nothing."""

    bytes_max = UPDATE_BYTES_MAX + PAYEES_MAX * PAYEE_BYTES_MAX

    from_user_id: UserId
    to: Payees
    reference: Reference | None = None

    def __post_init__(self) -> None:
        check_payees(self.from_user_id, self.to)


class KeyedTransfer(Transfer, frozen=True):
    """One of many transfers, with its idempotency key if it is to be repeatable."""

    idempotency_key: IdempotencyKey | None = None


class Transfers(Body, frozen=True):
    """Transfers, each applied or refused on its own."""

    bytes_max = PAYEES_IN_ALL_MAX * (UPDATE_BYTES_MAX + PAYEE_BYTES_MAX)

    transfers: Annotated[
        list[KeyedTransfer],
        Meta(
            min_length=1,
            max_length=PAYEES_IN_ALL_MAX,
            description=f"an array of 1 to {PAYEES_IN_ALL_MAX} transfers, {PAYEES_IN_ALL_MAX} payees at most in all",
        ),
    ]

    def __post_init__(self) -> None:
        if sum(len(transfer.to) for transfer in self.transfers) > PAYEES_IN_ALL_MAX:
            raise ValueError("transfers")


def check_payees(payer_id: int, to: list[Payee]) -> None:
    """Raise ValueError, with the member's name, unless these are payees of one transfer of the payer's."""
    users = {payee.user_id for payee in to}
    if len(users) < len(to) or payer_id in users or sum(payee.amount for payee in to) > BALANCE_LIMIT:
        raise ValueError("to")


class HoldPlacement(Body, frozen=True):
    """What is to be set aside, and for how long. The hold's id stands in the path."""

    bytes_max = UPDATE_BYTES_MAX

    amount: PositiveAmount
    expires_in_seconds: Annotated[
        int, Meta(ge=1, le=LASTING_SECONDS_MAX, description=f"a number of seconds, 1 to {LASTING_SECONDS_MAX}")
    ] = 7 * 24 * 3600
    reference: Reference | None = None


class HoldCapture(Body, frozen=True):
    """How much of what is held is withdrawn, or to whom it is paid; nothing: all of it is withdrawn."""

    bytes_max = ACCOUNT_BYTES_MAX + PAYEES_MAX * PAYEE_BYTES_MAX

    amount: PositiveAmount | None = None
    to: Payees | None = None


class HoldRelease(Body, frozen=True):
    """Nothing needs to be said."""

    bytes_max = ACCOUNT_BYTES_MAX


class AccountOpening(Body, frozen=True):
    """What an account is opened with. A negative minimum balance is an overdraft."""

    bytes_max = ACCOUNT_BYTES_MAX

    balance: Balance
    minimum_balance: MinimumBalance = 0

    def __post_init__(self) -> None:
        if self.balance < self.minimum_balance:
            raise ValueError("balance")


class AccountPatch(Body, frozen=True):
    """The least balance that the account may have from now on."""

    bytes_max = ACCOUNT_BYTES_MAX

    minimum_balance: MinimumBalance


class AccountPath(Request, frozen=True):
    """The path of an account."""

    user_id: UserId


class AccountQuery(Request, frozen=True):
    """As of when: `at`, or now."""

    at: Time | None = None

    def __post_init__(self) -> None:
        try:
            _ = self.time
        except (ValueError, OverflowError):
            raise ValueError("at") from None

    @property
    def time(self) -> datetime | None:
        """`at`, in UTC."""
        return datetime.fromisoformat(self.at).astimezone(UTC) if self.at else None


class AccountsQuery(Request, frozen=True):
    """Which page of accounts: those with a user id above `after`, or the first."""

    limit: PageLimit = 50
    after: UserId | None = None


class ChangePath(AccountPath, frozen=True):
    """The path of what is bound to an idempotency key."""

    key: IdempotencyKey


class HoldPath(AccountPath, frozen=True):
    """The path of a hold."""

    hold_id: IdempotencyKey


class HoldsQuery(Request, frozen=True):
    """Which page of open holds: those with an id above `after`, or the first."""

    limit: PageLimit = 50
    after: IdempotencyKey | None = None


class PageQuery(Request, frozen=True):
    """Which page of a journal: the newest, the newest below version `before`, or the oldest above version `after`."""

    limit: PageLimit = 50
    before: Annotated[int, Meta(ge=1, le=2**63 - 1, description="a version, an integer from 1")] | None = None
    after: (
        Annotated[int, Meta(ge=0, le=2**63 - 1, description="a version, an integer from 0, and no before beside it")]
        | None
    ) = None

    def __post_init__(self) -> None:
        if self.before is not None and self.after is not None:
            raise ValueError("after")


class FeedQuery(Request, frozen=True):
    """Which page of the feed: what comes after `after`, or its beginning. `wait`: for how long, if nothing is there."""

    after: FeedCursor | None = None
    limit: PageLimit = PAGE_MAX
    wait: Annotated[
        int, Meta(ge=0, le=WAIT_SECONDS_MAX, description=f"a number of seconds, 0 to {WAIT_SECONDS_MAX}")
    ] = 0


class RingQuery(Request, frozen=True):
    """Which accounts run in a ring on the live page: `first` and those with the next ids."""

    first: UserId


class RingTotal(Answer, frozen=True):
    """What the accounts of a ring have together, at one moment."""

    total: int


class UpdatedBalance(Answer, frozen=True, gc=False):
    """The balance right after the change."""

    user_id: int
    new_balance: int


class UpdateResult(Answer, frozen=True, gc=False, omit_defaults=True):
    """The result of one of many updates: as it would have been answered alone."""

    status: int
    user_id: int | UnsetType = UNSET
    new_balance: int | UnsetType = UNSET
    error: str | UnsetType = UNSET
    replayed: bool = False


class UpdateResults(Answer, frozen=True):
    """The results of many updates, in their order."""

    results: list[UpdateResult]


class PaidBalance(Answer, frozen=True, gc=False):
    """A payee's balance right after the transfer."""

    user_id: int
    new_balance: int


class TransferredBalances(Answer, frozen=True):
    """The balances right after the transfer: the payer's, and each payee's in the order of the request."""

    from_user_id: int
    new_balance: int
    to: list[PaidBalance]


class TransferResult(Answer, frozen=True, omit_defaults=True):
    """The result of one of many transfers: as it would have been answered alone.

    `userId`: which user there is not, if it is a payee.
    """

    status: int
    from_user_id: int | UnsetType = UNSET
    new_balance: int | UnsetType = UNSET
    to: list[PaidBalance] | UnsetType = UNSET
    error: str | UnsetType = UNSET
    user_id: int | UnsetType = UNSET
    replayed: bool = False


class TransferResults(Answer, frozen=True):
    """The results of many transfers, in their order."""

    results: list[TransferResult]


class JournalEntry(Answer, frozen=True):
    """An applied change: `balance` is the one right after it. A key that the service made is not shown.

    Version 0 is the opening: `amount` is what the account was opened with, `createdAt` null if that was before version
    0.2.0, which first noted it.

    `holdAmount`: what it added to what is held: negative for a settlement, 0 if it has nothing to do with a hold. Of a
    transfer: `counterpartyId` is the other account, null if there are several; a payer's entry has `to`, a payee's
    `transferKey`, which is the payer's key, null if the caller gave none.
    """

    version: int
    amount: int
    hold_amount: int
    balance: int
    reference: str | None
    idempotency_key: str | None
    created_at: datetime | None
    counterparty_id: int | UnsetType | None = UNSET
    to: list[Payee] | UnsetType = UNSET
    transfer_key: str | UnsetType | None = UNSET


class JournalPage(Answer, frozen=True):
    """Applied changes; `next` is the path of the page that follows, null on the last.

    Newest first, the opening the last; asked for with `after` oldest first, without the opening.
    """

    changes: list[JournalEntry]
    next: str | None


class PastAccount(Answer, frozen=True):
    """What an account had `at` a time."""

    user_id: int
    balance: int
    version: int
    at: datetime


class AccountsPage(Answer, frozen=True):
    """Accounts, by user id; `next` is the path of the page that follows, null on the last."""

    users: list[Account]
    next: str | None


class FeedEntry(JournalEntry, frozen=True, kw_only=True):
    """An applied change, and of which user, as the journal's page of that user shows it."""

    user_id: int


class FeedPage(Answer, frozen=True):
    """Applied changes of all accounts, oldest first; `next` is where what follows begins, now or later."""

    changes: list[FeedEntry]
    next: str


class BoundOutcome(Answer, frozen=True):
    """The outcome bound to an idempotency key: `status` and `newBalance` or `error`, as they were answered.

    `holdAmount`: of a hold. `to`: of a transfer, by user id.
    """

    status: int
    user_id: int
    idempotency_key: str
    amount: int
    reference: str | None
    created_at: datetime
    hold_amount: int | UnsetType = UNSET
    to: list[Payee] | UnsetType = UNSET
    version: int | UnsetType = UNSET
    new_balance: int | UnsetType = UNSET
    error: str | UnsetType = UNSET


class Hold(Answer, frozen=True):
    """A hold, and what has become of it: `status` is held, captured, released or expired.

    Of a captured one `captured` is how much was withdrawn, and `newBalance` the balance right after that. The answer to
    a capture with payees has their balances, too.
    """

    user_id: int
    hold_id: str
    amount: int
    reference: str | None
    status: str
    expires_at: datetime
    captured: int | UnsetType = UNSET
    new_balance: int | UnsetType = UNSET
    to: list[PaidBalance] | UnsetType = UNSET


class HoldsPage(Answer, frozen=True):
    """Open holds, by id; `next` is the path of the page that follows, null on the last."""

    holds: list[Hold]
    next: str | None


class Health(Answer, frozen=True):
    """Whether the process lives."""

    status: str


class Readiness(Answer, frozen=True):
    """Whether to send changes here, and what each check says: `ok`, or what is wrong."""

    status: str
    checks: dict[str, str]


class Error(Answer, frozen=True):
    """What went wrong, in one line."""

    error: str


class ProblemDetails(Answer, frozen=True):
    """What went wrong, as RFC 9457 has it: `type` is stable, `detail` is the line that `error` holds otherwise.

    `userId`: whom it is about, where a request names several users.
    """

    type: str
    title: str
    status: int
    detail: str
    user_id: int | UnsetType = UNSET
