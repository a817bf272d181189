"""From a request to its answer, one function for each endpoint: parse, submit or query, answer."""

import logging
from collections.abc import Sequence
from datetime import datetime

import msgspec
from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from atomic_balance.changes import Applied, Change, NoSuchPayee, Outcome, Refused, Undecided, transfer_key
from atomic_balance.http.app_keys import ACCOUNTS, GROUP_COMMIT, METRICS, OPENAPI, READINESS
from atomic_balance.http.errors import PROBLEMS, ApiError, error_response
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
    Health,
    JournalEntry,
    JournalPage,
    PageQuery,
    PastAccount,
    Payee,
    Readiness,
    UpdatedBalance,
    UpdateResult,
    UpdateResults,
)
from atomic_balance.http.pages import DOCS, page_response
from atomic_balance.http.parsing import is_key, parse_body, parse_idempotency_key, parse_path, parse_query
from atomic_balance.postgres.accounts import JournalRow

log = logging.getLogger("atomic_balance")

REPLAYED = {"Idempotent-Replayed": "true"}
TEXTS_FOR_HOLDS = {  # which need no other key than the hold's id
    Undecided.TURNED_AWAY: "Service unavailable: this request changed nothing, ask again",
    Undecided.UNKNOWN: "Outcome unknown: ask again",
}

_decode_update = msgspec.json.Decoder(BalanceUpdate)
_decode_updates = msgspec.json.Decoder(BalanceUpdates)
_decode_opening = msgspec.json.Decoder(AccountOpening)
_decode_patch = msgspec.json.Decoder(AccountPatch)
_encode = msgspec.json.Encoder().encode


async def update_balance(request: web.Request) -> web.Response:
    """POST /api/balance/update: change one balance."""
    update = await parse_body(request, _decode_update)
    change = Change(update.user_id, update.amount, parse_idempotency_key(request), update.reference)
    outcome = await request.app[GROUP_COMMIT].submit(change)
    if not isinstance(outcome, Applied):
        return answer_without(request, change, outcome)
    return marked(answer_with(UpdatedBalance(update.user_id, outcome.balance)), outcome.replayed)


def answer_without(request: web.Request, change: Change, outcome: Refused | NoSuchPayee | Undecided) -> web.Response:
    """The answer to a change that was not applied, or of which that is not known."""
    if isinstance(outcome, Refused):
        return marked(error_response(request, outcome.reason), outcome.replayed)
    if isinstance(outcome, NoSuchPayee):
        return error_response(request, Undecided.NO_SUCH_USER, user_id=outcome.user_id)
    if outcome in (Undecided.FAILED, Undecided.UNKNOWN):
        log.error("a change of user %d: %s", change.user_id, outcome)
    return error_response(request, outcome, TEXTS_FOR_HOLDS.get(outcome) if change.hold_amount else None)


def marked(response: web.Response, replayed: bool) -> web.Response:
    """`response`, which says of itself if it repeats what an earlier request was answered."""
    if replayed:
        response.headers.update(REPLAYED)
    return response


async def update_balances(request: web.Request) -> web.Response:
    """POST /api/balance/updates: change many balances, each on its own."""
    updates = (await parse_body(request, _decode_updates)).updates
    changes = [Change(update.user_id, update.amount, update.idempotency_key, update.reference) for update in updates]
    outcomes = await submit_all(request, "updates", changes)
    return answer_with(UpdateResults([_result(*each) for each in zip(changes, outcomes, strict=True)]))


async def submit_all(request: web.Request, member: str, changes: Sequence[Change]) -> list[Outcome]:
    """What becomes of changes that were asked for together, in the array `member`; the log has a line for faults."""
    submit = request.app[GROUP_COMMIT].submit
    futures = [submit(change) for change in changes]
    outcomes = [await future for future in futures]
    for fault in (Undecided.FAILED, Undecided.UNKNOWN):
        if fault in outcomes:
            first = outcomes.index(fault)
            user_id, count = changes[first].user_id, outcomes.count(fault)
            log.error(
                "%d of %d changes, the first %s[%d] of user %d: %s", count, len(changes), member, first, user_id, fault
            )
    return outcomes


async def open_account(request: web.Request) -> web.Response:
    """PUT /api/users/{userId}: open an account; asked again with the same values, it is the same."""
    user_id = parse_path(AccountPath, request).user_id
    asked = await parse_body(request, _decode_opening)
    found = await request.app[ACCOUNTS].open_account(user_id, asked.balance, asked.minimum_balance)
    if (found.opening_balance, found.opening_minimum_balance) != (asked.balance, asked.minimum_balance):
        raise ApiError("account_exists")
    return answer_with(found.account, status=201 if found.opened else 200)


async def change_account(request: web.Request) -> web.Response:
    """PATCH /api/users/{userId}: set the minimum balance."""
    user_id = parse_path(AccountPath, request).user_id
    asked = await parse_body(request, _decode_patch)
    found = await request.app[ACCOUNTS].set_minimum_balance(user_id, asked.minimum_balance)
    if found is None:
        raise ApiError("user_not_found")
    account, changed = found
    if not changed:
        raise ApiError("balance_below_minimum")
    return answer_with(account)


async def read_account(request: web.Request) -> web.Response:
    """GET /api/users/{userId}: the account now, or what it had at a time."""
    user_id = parse_path(AccountPath, request).user_id
    time = parse_query(AccountQuery, request).time
    if time:
        return await _read_past_account(request, user_id, time)
    account = await request.app[ACCOUNTS].account(user_id)
    if account is None:
        raise ApiError("user_not_found")
    return answer_with(account)


async def _read_past_account(request: web.Request, user_id: int, time: datetime) -> web.Response:
    past = await request.app[ACCOUNTS].balance_at(user_id, time)
    if past and not past.over:
        raise ApiError("invalid_request", "at: expected a time that is over")
    if not past or not past.opened:
        raise ApiError("user_not_found")
    return answer_with(PastAccount(user_id, past.balance, past.version, time))


async def read_accounts(request: web.Request) -> web.Response:
    """GET /api/users: a page of accounts, by id."""
    page = parse_query(AccountsQuery, request)
    found = await request.app[ACCOUNTS].accounts(page.after or 0, page.limit + 1)
    shown = found[: page.limit]
    more = len(found) > len(shown)
    return answer_with(
        AccountsPage(shown, f"/api/users?limit={page.limit}&after={shown[-1].user_id}" if more else None)
    )


async def read_changes(request: web.Request) -> web.Response:
    """GET /api/users/{userId}/changes: a page of the journal, newest first, or oldest first from a version on."""
    user_id = parse_path(AccountPath, request).user_id
    page = parse_query(PageQuery, request)
    accounts = request.app[ACCOUNTS]
    if page.after is None:
        direction = "before"
        rows = await accounts.changes(user_id, page.before, page.limit + 1)
    else:
        direction = "after"
        rows = await accounts.changes_after(user_id, page.after, page.limit + 1)
    if not rows and await accounts.account(user_id) is None:
        raise ApiError("user_not_found")
    shown = rows[: page.limit]
    entries = [journal_entry(row) for row in shown]
    more = len(rows) > len(shown)
    following = f"/api/users/{user_id}/changes?limit={page.limit}&{direction}={entries[-1].version}" if more else None
    return answer_with(JournalPage(entries, following))


def journal_entry(row: JournalRow) -> JournalEntry:
    """An applied change, as it is shown."""
    entry = JournalEntry(
        version=row.version or 0,
        amount=row.amount,
        hold_amount=row.hold_amount,
        balance=row.balance,
        reference=row.reference,
        idempotency_key=row.idempotency_key if is_key(row.idempotency_key) else None,
        created_at=row.created_at,
    )
    if row.payees:
        counterparty_id = row.payees[0].user_id if len(row.payees) == 1 else None
        return msgspec.structs.replace(entry, counterparty_id=counterparty_id, to=_paid(row))
    if row.payer is not None:
        key = transfer_key(row.payer, row.idempotency_key)
        return msgspec.structs.replace(entry, counterparty_id=row.payer, transfer_key=key if is_key(key) else None)
    return entry


def _paid(row: JournalRow) -> list[Payee]:
    return [Payee(credit.user_id, credit.amount) for credit in row.payees]


async def read_change(request: web.Request) -> web.Response:
    """GET /api/users/{userId}/changes/{key}: the outcome bound to an idempotency key."""
    path = parse_path(ChangePath, request)
    row = await request.app[ACCOUNTS].change(path.user_id, path.key)
    if row is None or row.created_at is None:  # None of an old opening alone, to which no key is bound
        raise ApiError("key_not_found")
    is_hold = row.hold_amount > 0
    bound = BoundOutcome(201 if is_hold else 200, path.user_id, path.key, row.amount, row.reference, row.created_at)
    if is_hold:
        bound = msgspec.structs.replace(bound, hold_amount=row.hold_amount)
    if row.payees:
        bound = msgspec.structs.replace(bound, to=_paid(row))
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
    return answer_with(Readiness("ok" if ready else "unavailable", says), status=200 if ready else 503)


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics: what was counted and measured."""
    return web.Response(body=request.app[METRICS].text(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_PLAIN_0_0_4})


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json: the contract."""
    return web.Response(body=request.app[OPENAPI], headers={hdrs.CONTENT_TYPE: "application/json"})


async def docs(_: web.Request) -> web.Response:
    """GET /docs: the contract, as a page that draws /openapi.json."""
    return page_response(DOCS)


def _result(change: Change, outcome: Outcome) -> UpdateResult:
    if isinstance(outcome, Applied):
        return UpdateResult(200, change.user_id, outcome.balance, replayed=outcome.replayed)
    if isinstance(outcome, Refused):
        problem = PROBLEMS[outcome.reason]
        return UpdateResult(problem.status, error=problem.text, replayed=outcome.replayed)
    problem = PROBLEMS[Undecided.NO_SUCH_USER if isinstance(outcome, NoSuchPayee) else outcome]
    return UpdateResult(problem.status, error=problem.text)


def answer_with(body: msgspec.Struct, status: int = 200) -> web.Response:
    """The answer with `body` as JSON."""
    return web.Response(status=status, body=_encode(body), headers={hdrs.CONTENT_TYPE: "application/json"})
