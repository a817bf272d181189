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

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')
_decode_update = msgspec.json.Decoder(BalanceUpdate)
_decode_updates = msgspec.json.Decoder(BalanceUpdates)
_decode_opening = msgspec.json.Decoder(AccountOpening)
_decode_patch = msgspec.json.Decoder(AccountPatch)
_encode = msgspec.json.Encoder().encode
_DOCS_PAGE = resources.files("atomic_balance.http.pages").joinpath("docs.html").read_bytes()


async def update_balance(request: web.Request) -> web.Response:
    """POST /api/balance/update: change one balance."""
    update = await _body(request, _decode_update)
    change = Change(update.user_id, update.amount, _idempotency_key(request), update.reference)
    outcome = await request.app[GROUP_COMMIT].submit(change)
    if isinstance(outcome, Applied):
        response = _answer(UpdatedBalance(update.user_id, outcome.balance))
    elif isinstance(outcome, Refused):
        response = error_response(request, outcome.reason)
    else:
        if outcome in (Undecided.FAILED, Undecided.UNKNOWN):
            log.error("a change of user %d: %s", update.user_id, outcome)
        return error_response(request, outcome)
    if outcome.replayed:
        response.headers.update(REPLAYED)
    return response


async def update_balances(request: web.Request) -> web.Response:
    """POST /api/balance/updates: change many balances, each on its own."""
    updates = (await _body(request, _decode_updates)).updates
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
    return _answer(UpdateResults([_result(*each) for each in zip(changes, outcomes, strict=True)]))


async def open_account(request: web.Request) -> web.Response:
    """PUT /api/users/{userId}: open an account; asked again with the same values, it is the same."""
    user_id = _parameters(AccountPath, request.match_info).user_id
    asked = await _body(request, _decode_opening)
    found = await request.app[ACCOUNTS].open_account(user_id, asked.balance, asked.minimum_balance)
    if (found.opening_balance, found.opening_minimum_balance) != (asked.balance, asked.minimum_balance):
        raise ApiError("account_exists")
    return _answer(found.account, status=201 if found.opened else 200)


async def change_account(request: web.Request) -> web.Response:
    """PATCH /api/users/{userId}: set the minimum balance."""
    user_id = _parameters(AccountPath, request.match_info).user_id
    asked = await _body(request, _decode_patch)
    found = await request.app[ACCOUNTS].set_minimum_balance(user_id, asked.minimum_balance)
    if found is None:
        raise ApiError("user_not_found")
    account, changed = found
    if not changed:
        raise ApiError("balance_below_minimum")
    return _answer(account)


async def read_account(request: web.Request) -> web.Response:
    """GET /api/users/{userId}: the account now."""
    user_id = _parameters(AccountPath, request.match_info).user_id
    account = await request.app[ACCOUNTS].account(user_id)
    if account is None:
        raise ApiError("user_not_found")
    return _answer(account)


async def read_changes(request: web.Request) -> web.Response:
    """GET /api/users/{userId}/changes: a page of the journal, newest first."""
    user_id = _parameters(AccountPath, request.match_info).user_id
    if len(set(request.query)) < len(request.query):
        raise ApiError("invalid_request", "query: expected each parameter at most once")
    page = _parameters(PageQuery, request.query)
    store = request.app[ACCOUNTS]
    rows = await store.changes(user_id, page.before, page.limit + 1)
    if not rows and await store.account(user_id) is None:
        raise ApiError("user_not_found")
    shown = rows[: page.limit]
    entries = [
        JournalEntry(
            version=row.version or 0,
            amount=row.amount,
            balance=row.balance,
            reference=row.reference,
            idempotency_key=row.idempotency_key if _KEY.fullmatch(row.idempotency_key) else None,
            created_at=row.created_at,
        )
        for row in shown
    ]
    more = len(rows) > len(shown)
    following = f"/api/users/{user_id}/changes?limit={page.limit}&before={entries[-1].version}" if more else None
    return _answer(JournalPage(entries, following))


async def read_change(request: web.Request) -> web.Response:
    """GET /api/users/{userId}/changes/{key}: the outcome bound to an idempotency key."""
    path = _parameters(ChangePath, request.match_info)
    row = await request.app[ACCOUNTS].change(path.user_id, path.key)
    if row is None:
        raise ApiError("key_not_found")
    bound = BoundOutcome(200, path.user_id, path.key, row.amount, row.reference, row.created_at)
    if row.refusal is None:
        bound = msgspec.structs.replace(bound, version=row.version, new_balance=row.balance)
    else:
        problem = PROBLEMS[row.refusal]
        bound = msgspec.structs.replace(bound, status=problem.status, error=problem.text)
    return _answer(bound)


async def healthz(_: web.Request) -> web.Response:
    """GET /healthz: the process answers."""
    return _answer(Health("ok"))


async def readyz(request: web.Request) -> web.Response:
    """GET /readyz: whether to send changes here, by each check."""
    ready, says = await request.app[READINESS].check()
    return _answer(ReadinessAnswer("ok" if ready else "unavailable", says), status=200 if ready else 503)


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics: what was counted and measured."""
    return web.Response(body=request.app[METRICS].text(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_PLAIN_0_0_4})


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json: the contract."""
    return web.Response(body=request.app[OPENAPI], headers={hdrs.CONTENT_TYPE: "application/json"})


async def docs(_: web.Request) -> web.Response:
    """GET /docs: the contract, as a page that draws /openapi.json."""
    return web.Response(body=_DOCS_PAGE, headers=PAGE_HEADERS)


async def _body(request: web.Request, decoder: msgspec.json.Decoder[B]) -> B:
    if request.content_type != "application/json":
        raise ApiError("unsupported_media_type")
    body = await request.app[BODIES].read(request, decoder.type.bytes_max)
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError("invalid_request", explain(error, decoder.type)) from None


def _parameters(shape: type[T], given: Mapping[str, str]) -> T:
    """`given`, the variable parts of a path or a query, as a `shape`. A number has one spelling: plain digits."""
    try:
        values = msgspec.convert(dict(given), shape, strict=False)
    except msgspec.ValidationError as error:
        raise ApiError("invalid_request", explain(error, shape)) from None
    for name, value in msgspec.to_builtins(values).items():
        if name in given and given[name] != str(value):
            raise ApiError("invalid_request", f"{name}: expected {expected(shape)[name]}")
    return values


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
    if not _KEY.fullmatch(key) or len(headers.getall(IDEMPOTENCY_KEY)) > 1:
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


def _answer(body: msgspec.Struct, status: int = 200) -> web.Response:
    return web.Response(status=status, body=_encode(body), headers={hdrs.CONTENT_TYPE: "application/json"})
