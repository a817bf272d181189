"""From a request to its answer: parse, submit or ask the store, answer."""

import asyncio
import logging
import re
from collections.abc import Mapping
from importlib import resources
from typing import TypeVar

import msgspec
from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from atomic_balance.changes import Applied, Change, Outcome, Refused, Undecided
from atomic_balance.commit.group_commit import GroupCommit
from atomic_balance.commit.hold_reader import HoldReader
from atomic_balance.expectations import expected, explain
from atomic_balance.http.bodies import Bodies
from atomic_balance.http.errors import PROBLEMS, ApiError, error_response
from atomic_balance.http.messages import (
    AccountOpening,
    AccountPatch,
    AccountPath,
    BalanceUpdate,
    BalanceUpdates,
    Body,
    BoundOutcome,
    ChangePath,
    Health,
    JournalEntry,
    JournalPage,
    PageQuery,
    UpdatedBalance,
    UpdateResult,
    UpdateResults,
)
from atomic_balance.http.messages import Readiness as ReadinessAnswer
from atomic_balance.http.readiness import Readiness
from atomic_balance.observe.metrics import Metrics
from atomic_balance.postgres.accounts import Accounts

log = logging.getLogger("atomic_balance")

BODIES = web.AppKey("bodies", Bodies)
DRAINING = web.AppKey("draining", asyncio.Event)
GROUP_COMMIT = web.AppKey("group_commit", GroupCommit)
HOLDS = web.AppKey("holds", HoldReader)
METRICS = web.AppKey("metrics", Metrics)
OPENAPI = web.AppKey("openapi", bytes)
READINESS = web.AppKey("readiness", Readiness)
ACCOUNTS = web.AppKey("store", Accounts)

IDEMPOTENCY_KEY = "Idempotency-Key"
REPLAYED = {"Idempotent-Replayed": "true"}
PAGE_HEADERS = {
    hdrs.CONTENT_TYPE: "text/html; charset=utf-8",
    "Content-Security-Policy": (
        "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

B = TypeVar("B", bound=Body)
T = TypeVar("T", bound=msgspec.Struct)

KEY = re.compile(r"[\x21-\x7e]{1,255}")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')
_decode_update = msgspec.json.Decoder(BalanceUpdate)
_decode_updates = msgspec.json.Decoder(BalanceUpdates)
_decode_opening = msgspec.json.Decoder(AccountOpening)
_decode_patch = msgspec.json.Decoder(AccountPatch)
_encode = msgspec.json.Encoder().encode
_DOCS_PAGE = resources.files("atomic_balance.http.pages").joinpath("docs.html").read_bytes()


async def update_balance(request: web.Request) -> web.Response:
    """POST /api/balance/update: change one balance."""
    update = await read_body(request, _decode_update)
    change = Change(update.user_id, update.amount, _idempotency_key(request), update.reference)
    outcome = await request.app[GROUP_COMMIT].submit(change)
    if not isinstance(outcome, Applied):
        return answer_without(request, change, outcome)
    return marked(answer_with(UpdatedBalance(update.user_id, outcome.balance)), outcome.replayed)


def answer_without(request: web.Request, change: Change, outcome: Refused | Undecided) -> web.Response:
    """The answer to a change that was not applied, or of which that is not known."""
    if isinstance(outcome, Refused):
        return marked(error_response(request, outcome.reason), outcome.replayed)
    if outcome in (Undecided.FAILED, Undecided.UNKNOWN):
        log.error("a change of user %d: %s", change.user_id, outcome)
    return error_response(request, outcome)


def marked(response: web.Response, replayed: bool) -> web.Response:
    """`response`, which says of itself if it repeats what an earlier request was answered."""
    if replayed:
        response.headers.update(REPLAYED)
    return response


async def update_balances(request: web.Request) -> web.Response:
    """POST /api/balance/updates: change many balances, each on its own."""
    updates = (await read_body(request, _decode_updates)).updates
    submit = request.app[GROUP_COMMIT].submit
    changes = [Change(update.user_id, update.amount, update.idempotency_key, update.reference) for update in updates]
    futures = [submit(change) for change in changes]
    outcomes = [await future for future in futures]
    for fault in (Undecided.FAILED, Undecided.UNKNOWN):
        if fault in outcomes:
            first = outcomes.index(fault)
            user_id, count = changes[first].user_id, outcomes.count(fault)
            log.error(
                "%d of %d changes, the first updates[%d] of user %d: %s", count, len(changes), first, user_id, fault
            )
    return answer_with(UpdateResults([_result(*each) for each in zip(changes, outcomes, strict=True)]))


async def open_account(request: web.Request) -> web.Response:
    """PUT /api/users/{userId}: open an account; asked again with the same values, it is the same."""
    user_id = parameters_of(AccountPath, request.match_info).user_id
    asked = await read_body(request, _decode_opening)
    found = await request.app[ACCOUNTS].open_account(user_id, asked.balance, asked.minimum_balance)
    if (found.opening_balance, found.opening_minimum_balance) != (asked.balance, asked.minimum_balance):
        raise ApiError("account_exists")
    return answer_with(found.account, status=201 if found.opened else 200)


async def change_account(request: web.Request) -> web.Response:
    """PATCH /api/users/{userId}: set the minimum balance."""
    user_id = parameters_of(AccountPath, request.match_info).user_id
    asked = await read_body(request, _decode_patch)
    found = await request.app[ACCOUNTS].set_minimum_balance(user_id, asked.minimum_balance)
    if found is None:
        raise ApiError("user_not_found")
    account, changed = found
    if not changed:
        raise ApiError("balance_below_minimum")
    return answer_with(account)


async def read_account(request: web.Request) -> web.Response:
    """GET /api/users/{userId}: the account now."""
    user_id = parameters_of(AccountPath, request.match_info).user_id
    account = await request.app[ACCOUNTS].account(user_id)
    if account is None:
        raise ApiError("user_not_found")
    return answer_with(account)


async def read_changes(request: web.Request) -> web.Response:
    """GET /api/users/{userId}/changes: a page of the journal, newest first."""
    user_id = parameters_of(AccountPath, request.match_info).user_id
    page = query_of(PageQuery, request)
    store = request.app[ACCOUNTS]
    rows = await store.changes(user_id, page.before, page.limit + 1)
    if not rows and await store.account(user_id) is None:
        raise ApiError("user_not_found")
    shown = rows[: page.limit]
    entries = [
        JournalEntry(
            version=row.version or 0,
            amount=row.amount,
            hold_amount=row.hold_amount,
            balance=row.balance,
            reference=row.reference,
            idempotency_key=row.idempotency_key if KEY.fullmatch(row.idempotency_key) else None,
            created_at=row.created_at,
        )
        for row in shown
    ]
    more = len(rows) > len(shown)
    following = f"/api/users/{user_id}/changes?limit={page.limit}&before={entries[-1].version}" if more else None
    return answer_with(JournalPage(entries, following))


async def read_change(request: web.Request) -> web.Response:
    """GET /api/users/{userId}/changes/{key}: the outcome bound to an idempotency key."""
    path = parameters_of(ChangePath, request.match_info)
    row = await request.app[ACCOUNTS].change(path.user_id, path.key)
    if row is None:
        raise ApiError("key_not_found")
    is_hold = row.hold_amount > 0
    bound = BoundOutcome(201 if is_hold else 200, path.user_id, path.key, row.amount, row.reference, row.created_at)
    if is_hold:
        bound = msgspec.structs.replace(bound, hold_amount=row.hold_amount)
    if row.refusal is None:
        bound = msgspec.structs.replace(bound, version=row.version, new_balance=row.balance)
    else:
        problem = PROBLEMS[row.refusal]
        bound = msgspec.structs.replace(bound, status=problem.status, error=problem.text)
    return answer_with(bound)


async def healthz(_: web.Request) -> web.Response:
    """GET /healthz: the process answers."""
    return answer_with(Health("ok"))


async def readyz(request: web.Request) -> web.Response:
    """GET /readyz: whether to send changes here, by each check."""
    ready, says = await request.app[READINESS].check()
    return answer_with(ReadinessAnswer("ok" if ready else "unavailable", says), status=200 if ready else 503)


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics: what was counted and measured."""
    return web.Response(body=request.app[METRICS].text(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_PLAIN_0_0_4})


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json: the contract."""
    return web.Response(body=request.app[OPENAPI], headers={hdrs.CONTENT_TYPE: "application/json"})


async def docs(_: web.Request) -> web.Response:
    """GET /docs: the contract, as a page that draws /openapi.json."""
    return web.Response(body=_DOCS_PAGE, headers=PAGE_HEADERS)


async def read_body(request: web.Request, decoder: msgspec.json.Decoder[B], default: B | None = None) -> B:
    """The body of `request`; `default`, if there is one, for a request without a body. Raises ApiError."""
    if default is not None and not request.body_exists:
        return default
    if request.content_type != "application/json":
        raise ApiError("unsupported_media_type")
    body = await request.app[BODIES].read(request, decoder.type.bytes_max)
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError("invalid_request", explain(error, decoder.type)) from None


def parameters_of(shape: type[T], given: Mapping[str, str]) -> T:
    """`given`, the variable parts of a path or a query, as a `shape`. A number has one spelling: plain digits.

    Raises ApiError.
    """
    try:
        values = msgspec.convert(dict(given), shape, strict=False)
    except msgspec.ValidationError as error:
        raise ApiError("invalid_request", explain(error, shape)) from None
    for name, value in msgspec.to_builtins(values).items():
        if name in given and given[name] != str(value):
            raise ApiError("invalid_request", f"{name}: expected {expected(shape)[name]}")
    return values


def query_of(shape: type[T], request: web.Request) -> T:
    """The query of `request` as a `shape`. Raises ApiError."""
    if len(set(request.query)) < len(request.query):
        raise ApiError("invalid_request", "query: expected each parameter at most once")
    return parameters_of(shape, request.query)


def _idempotency_key(request: web.Request) -> str | None:
    """The caller's key; None if it sent none. What begins with a quote is a structured field's string (RFC 8941)."""
    headers = request.headers
    key = headers.get(IDEMPOTENCY_KEY)
    if key is None:
        return None
    if key[:1] == '"':
        quoted = _QUOTED.fullmatch(key)
        if not quoted:
            raise ApiError("invalid_request", f"{IDEMPOTENCY_KEY}: expected a quoted string, as it begins with a quote")
        key = re.sub(r"\\(.)", r"\1", quoted[1])
    if not KEY.fullmatch(key) or len(headers.getall(IDEMPOTENCY_KEY)) > 1:
        raise ApiError("invalid_request", f"{IDEMPOTENCY_KEY}: expected one, of 1 to 255 visible ASCII characters")
    return key


def _result(change: Change, outcome: Outcome) -> UpdateResult:
    if isinstance(outcome, Applied):
        return UpdateResult(200, change.user_id, outcome.balance, replayed=outcome.replayed)
    if isinstance(outcome, Refused):
        problem = PROBLEMS[outcome.reason]
        return UpdateResult(problem.status, error=problem.text, replayed=outcome.replayed)
    problem = PROBLEMS[outcome]
    return UpdateResult(problem.status, error=problem.text)


def answer_with(body: msgspec.Struct, status: int = 200) -> web.Response:
    """The answer with `body` as JSON."""
    return web.Response(status=status, body=_encode(body), headers={hdrs.CONTENT_TYPE: "application/json"})
