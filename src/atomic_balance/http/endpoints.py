"""The contract as a table: every endpoint with its handler, what it takes and all that it may answer."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args

from aiohttp.typedefs import Handler
from msgspec import Struct

from atomic_balance.changes import Account
from atomic_balance.http import feed, handlers, holds, live, transfers
from atomic_balance.http.errors import PROBLEMS
from atomic_balance.http.messages import (
    AccountOpening,
    AccountPatch,
    AccountPath,
    AccountQuery,
    AccountsPage,
    AccountsQuery,
    BalanceUpdate,
    BalanceUpdates,
    BoundOutcome,
    ChangePath,
    FeedPage,
    FeedQuery,
    Health,
    Hold,
    HoldCapture,
    HoldPath,
    HoldPlacement,
    HoldRelease,
    HoldsPage,
    HoldsQuery,
    JournalPage,
    PageQuery,
    PastAccount,
    Readiness,
    RingQuery,
    RingTotal,
    Transfer,
    TransferredBalances,
    TransferResults,
    Transfers,
    UpdatedBalance,
    UpdateResults,
)

_ENCODED = "unsupported_content_encoding"
_ACCESS_ERRORS = ("unauthorized", _ENCODED, "misdirected_request")
_BODY_ERRORS = (
    *_ACCESS_ERRORS,
    "forbidden",
    "request_timeout",
    "invalid_request",
    "body_too_large",
    "unsupported_media_type",
    "internal_error",
    "unavailable",
)
_CHANGE_ERRORS = (
    "insufficient_funds",
    "user_not_found",
    "idempotency_key_reused",
    "turned_away",
    "outcome_unknown",
)
_SETTLEMENT_ERRORS = ("hold_not_found", "turned_away", "outcome_unknown")
_READ_ERRORS = (*_ACCESS_ERRORS, "invalid_request", "internal_error", "unavailable")


class Reply(Struct, frozen=True):
    """One status that is no error: its body, and an example of it."""

    body: type[Struct] | UnionType | None
    text: str
    example: Mapping[str, Any] = {}
    content_type: str = "application/json"

    @property
    def shapes(self) -> tuple[type[Struct], ...]:
        """What the body may be: one of these; none if no Struct says it."""
        return get_args(self.body) or ((self.body,) if self.body else ())


class Endpoint(Struct, frozen=True):
    """One method of one path. `errors`: codes of errors.py."""

    method: str
    path: str
    handler: Handler
    summary: str
    replies: Mapping[int, Reply]
    errors: tuple[str, ...] = ()
    parameters: tuple[type[Struct], ...] = ()
    body: type[Struct] | None = None
    examples: Mapping[str, Any] = {}
    idempotent: bool = False
    """Whether it takes an Idempotency-Key."""
    replays: bool = False
    """Whether its own path is the key, so that it can be repeated."""
    body_required: bool = True

    @property
    def query(self) -> list[str]:
        """The names of the parameters that its query may have."""
        names = (name for shape in self.parameters for name in shape.__struct_encode_fields__)
        return [name for name in names if f"{{{name}}}" not in self.path]

    @property
    def statuses(self) -> list[int]:
        """Every status that it may answer, in ascending order."""
        return sorted({*self.replies, *(PROBLEMS[code].status for code in self.errors)})


_ACCOUNT = {"userId": 1, "balance": 9998, "held": 0, "available": 9998, "minimumBalance": 0, "version": 1}
_HOLD = {
    "userId": 1,
    "holdId": "order-4711",
    "amount": 500,
    "reference": None,
    "status": "held",
    "expiresAt": "2026-01-31T12:15:00.000000Z",
}
_CAPTURED = {**_HOLD, "status": "captured", "captured": 450, "newBalance": 9550}
_ENTRY = {
    "version": 1,
    "amount": -2,
    "holdAmount": 0,
    "balance": 9998,
    "reference": "order 4711",
    "idempotencyKey": "4711-1",
    "createdAt": "2026-01-31T12:00:00.000000Z",
}
_TRANSFERRED = {
    "fromUserId": 1,
    "newBalance": 9500,
    "to": [{"userId": 2, "newBalance": 450}, {"userId": 3, "newBalance": 50}],
}
_CHECKS = {"stopping": "ok", "overload": "ok", "database": "ok", "commits": "ok", "schema": "ok"}

ENDPOINTS = (
    Endpoint(
        "POST",
        "/api/balance/update",
        handlers.update_balance,
        "Change one user's balance",
        {200: Reply(UpdatedBalance, "The change was applied", {"userId": 1, "newBalance": 9998})},
        errors=(*_BODY_ERRORS, *_CHANGE_ERRORS, "balance_limit_exceeded"),
        body=BalanceUpdate,
        examples={
            "withdraw": {"userId": 1, "amount": -2},
            "deposit": {"userId": 1, "amount": 100, "reference": "gift"},
        },
        idempotent=True,
    ),
    Endpoint(
        "POST",
        "/api/balance/updates",
        handlers.update_balances,
        "Change many balances, each on its own",
        {
            200: Reply(
                UpdateResults,
                "One result per update, in order; each as it would have been answered alone",
                {
                    "results": [
                        {"status": 200, "userId": 1, "newBalance": 98},
                        {"status": 400, "error": "Insufficient funds"},
                    ]
                },
            )
        },
        errors=_BODY_ERRORS,
        body=BalanceUpdates,
        examples={
            "two": {
                "updates": [{"userId": 1, "amount": -2}, {"userId": 2, "amount": -500, "idempotencyKey": "4711-2"}],
            }
        },
    ),
    Endpoint(
        "POST",
        "/api/balance/transfer",
        transfers.transfer_balance,
        "Move money from one user to one or many, all or nothing",
        {200: Reply(TransferredBalances, "The transfer was applied", _TRANSFERRED)},
        errors=(*_BODY_ERRORS, *_CHANGE_ERRORS, "balance_limit_exceeded"),
        body=Transfer,
        examples={
            "pay": {"fromUserId": 1, "to": [{"userId": 2, "amount": 450}]},
            "split": {
                "fromUserId": 1,
                "to": [{"userId": 2, "amount": 450}, {"userId": 3, "amount": 50}],
                "reference": "order 4711",
            },
        },
        idempotent=True,
    ),
    Endpoint(
        "POST",
        "/api/balance/transfers",
        transfers.transfer_balances,
        "Many transfers, each on its own",
        {
            200: Reply(
                TransferResults,
                "One result per transfer, in order; each as it would have been answered alone",
                {"results": [{"status": 200, **_TRANSFERRED}, {"status": 400, "error": "Insufficient funds"}]},
            )
        },
        errors=_BODY_ERRORS,
        body=Transfers,
        examples={
            "two": {
                "transfers": [
                    {"fromUserId": 1, "to": [{"userId": 2, "amount": 450}, {"userId": 3, "amount": 50}]},
                    {"fromUserId": 2, "to": [{"userId": 1, "amount": 9000}], "idempotencyKey": "4711-3"},
                ]
            }
        },
    ),
    Endpoint(
        "PUT",
        "/api/users/{userId}",
        handlers.open_account,
        "Open an account",
        {
            201: Reply(Account, "The account was opened", {**_ACCOUNT, "balance": 10_000, "version": 0}),
            200: Reply(Account, "It had been opened with the same values before; this is what it holds now", _ACCOUNT),
        },
        errors=(*_BODY_ERRORS, "account_exists"),
        parameters=(AccountPath,),
        body=AccountOpening,
        examples={"plain": {"balance": 10_000}, "overdraft": {"balance": 0, "minimumBalance": -500}},
    ),
    Endpoint(
        "PATCH",
        "/api/users/{userId}",
        handlers.change_account,
        "Set an account's minimum balance",
        {200: Reply(Account, "The minimum balance was set", {**_ACCOUNT, "minimumBalance": -500})},
        errors=(*_BODY_ERRORS, "user_not_found", "balance_below_minimum"),
        parameters=(AccountPath,),
        body=AccountPatch,
        examples={"overdraft": {"minimumBalance": -500}},
    ),
    Endpoint(
        "GET",
        "/api/users/{userId}",
        handlers.read_account,
        "Read an account, as it is now or as it was at a time",
        {200: Reply(Account | PastAccount, "The account now, or what it had then", _ACCOUNT)},
        errors=(*_READ_ERRORS, "user_not_found"),
        parameters=(AccountPath, AccountQuery),
    ),
    Endpoint(
        "GET",
        "/api/users",
        handlers.read_accounts,
        "Read all accounts, by user id",
        {200: Reply(AccountsPage, "A page of accounts", {"users": [_ACCOUNT], "next": None})},
        errors=_READ_ERRORS,
        parameters=(AccountsQuery,),
    ),
    Endpoint(
        "GET",
        "/api/users/{userId}/changes",
        handlers.read_changes,
        "Read an account's journal, newest first, or oldest first from a version on",
        {200: Reply(JournalPage, "A page of applied changes", {"changes": [_ENTRY], "next": None})},
        errors=(*_READ_ERRORS, "user_not_found"),
        parameters=(AccountPath, PageQuery),
    ),
    Endpoint(
        "GET",
        "/api/users/{userId}/changes/{key}",
        handlers.read_change,
        "Read the outcome bound to an idempotency key",
        {
            200: Reply(
                BoundOutcome,
                "The change was applied, or refused, with this outcome",
                {
                    "status": 200,
                    "userId": 1,
                    "idempotencyKey": "4711-1",
                    "amount": -2,
                    "reference": None,
                    "createdAt": _ENTRY["createdAt"],
                    "version": 1,
                    "newBalance": 9998,
                },
            )
        },
        errors=(*_READ_ERRORS, "key_not_found"),
        parameters=(ChangePath,),
    ),
    Endpoint(
        "GET",
        "/api/changes",
        feed.read_feed,
        "Follow the changes of all accounts, oldest first",
        {
            200: Reply(
                FeedPage,
                "Applied changes that came after `after`; none came within `wait` seconds: an empty page",
                {"changes": [{"userId": 1, **_ENTRY}], "next": "1767225600000123.1.1"},
            )
        },
        errors=(*_READ_ERRORS, "feed_not_offered"),
        parameters=(FeedQuery,),
    ),
    Endpoint(
        "PUT",
        "/api/users/{userId}/holds/{holdId}",
        holds.place_hold,
        "Set money aside, until it is captured, released, or the hold expires",
        {
            201: Reply(Hold, "The hold was placed", _HOLD),
            200: Reply(Hold, "It had been placed before; this is what has become of it", _HOLD),
        },
        errors=(*_BODY_ERRORS, *_CHANGE_ERRORS, "hold_exists"),
        parameters=(HoldPath,),
        body=HoldPlacement,
        examples={
            "quarter": {"amount": 500, "expiresInSeconds": 900, "reference": "order 4711"},
            "week": {"amount": 500},
        },
        replays=True,
    ),
    Endpoint(
        "POST",
        "/api/users/{userId}/holds/{holdId}/capture",
        holds.capture_hold,
        "Withdraw what is held or a part of it, or pay it to others; the rest is released",
        {200: Reply(Hold, "The hold is captured", {**_CAPTURED, "to": [{"userId": 2, "newBalance": 450}]})},
        errors=(
            *_BODY_ERRORS,
            *_SETTLEMENT_ERRORS,
            "balance_limit_exceeded",
            "user_not_found",
            "hold_captured",
            "hold_released",
            "hold_expired",
        ),
        parameters=(HoldPath,),
        body=HoldCapture,
        body_required=False,
        examples={"all": {}, "part": {"amount": 450}, "pay": {"to": [{"userId": 2, "amount": 450}]}},
        replays=True,
    ),
    Endpoint(
        "POST",
        "/api/users/{userId}/holds/{holdId}/release",
        holds.release_hold,
        "Let go of what is held",
        {200: Reply(Hold, "The hold is released, or has expired", {**_HOLD, "status": "released"})},
        errors=(*_BODY_ERRORS, *_SETTLEMENT_ERRORS, "hold_captured"),
        parameters=(HoldPath,),
        body=HoldRelease,
        body_required=False,
        examples={"nothing": {}},
        replays=True,
    ),
    Endpoint(
        "GET",
        "/api/users/{userId}/holds/{holdId}",
        holds.read_hold,
        "Read a hold, whatever has become of it",
        {200: Reply(Hold, "The hold", _CAPTURED)},
        errors=(*_READ_ERRORS, "hold_not_found"),
        parameters=(HoldPath,),
    ),
    Endpoint(
        "GET",
        "/api/users/{userId}/holds",
        holds.read_holds,
        "Read an account's open holds, by id",
        {200: Reply(HoldsPage, "A page of open holds", {"holds": [_HOLD], "next": None})},
        errors=(*_READ_ERRORS, "user_not_found"),
        parameters=(AccountPath, HoldsQuery),
    ),
    Endpoint(
        "GET",
        "/healthz",
        handlers.healthz,
        "Whether the process lives",
        {200: Reply(Health, "It does", {"status": "ok"})},
        errors=(_ENCODED,),
    ),
    Endpoint(
        "GET",
        "/readyz",
        handlers.readyz,
        "Whether to send changes here",
        {
            200: Reply(Readiness, "Yes", {"status": "ok", "checks": _CHECKS}),
            503: Reply(
                Readiness,
                "No, and why: stopping, full, behind, or for DEADLINE_SECONDS without a database or a commit",
                {"status": "unavailable", "checks": {**_CHECKS, "database": "has not answered for 12.3 s"}},
            ),
        },
        errors=(_ENCODED,),
    ),
    Endpoint(
        "GET",
        "/metrics",
        handlers.metrics,
        "What is counted and measured, for Prometheus",
        {200: Reply(None, "The metrics", content_type="text/plain")},
        errors=_ACCESS_ERRORS,
    ),
    Endpoint(
        "GET",
        "/openapi.json",
        handlers.openapi,
        "This contract, as OpenAPI 3.1",
        {200: Reply(None, "The document")},
        errors=_ACCESS_ERRORS,
    ),
    Endpoint(
        "GET",
        "/docs",
        handlers.docs,
        "This contract, as a page",
        {
            200: Reply(None, "The page", content_type="text/html"),
            401: Reply(None, "The page, which holds no data, for those who sent no token", content_type="text/html"),
        },
        errors=(_ENCODED, "misdirected_request"),
    ),
    Endpoint(
        "GET",
        "/",
        live.page,
        "The live page",
        {
            200: Reply(None, "The page", content_type="text/html"),
            401: Reply(None, "The page, which asks those for a token who sent none", content_type="text/html"),
        },
        errors=(_ENCODED, "misdirected_request"),
    ),
    Endpoint(
        "GET",
        "/live/events",
        live.events,
        "What happened in each second, as server-sent events",
        {200: Reply(None, "A stream without an end", content_type="text/event-stream")},
        errors=(*_ACCESS_ERRORS, "unavailable"),
    ),
    Endpoint(
        "GET",
        "/live/total",
        live.ring_total,
        "What a hundred accounts have together, for the live page's ring",
        {200: Reply(RingTotal, "The sum of their balances at one moment", {"total": 100_000})},
        errors=(*_READ_ERRORS, "not_found"),
        parameters=(RingQuery,),
    ),
)
