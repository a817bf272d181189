"""Holds: from a request to its answer. A hold and its settlement are changes like any other."""

from urllib.parse import quote

import msgspec
from aiohttp import web
from msgspec import UNSET

from atomic_balance.changes import Applied, Credit, Undecided, capture, hold, release
from atomic_balance.expectations import explain
from atomic_balance.http.app_keys import ACCOUNTS, GROUP_COMMIT, HOLDS
from atomic_balance.http.errors import ApiError
from atomic_balance.http.handlers import TEXTS_FOR_HOLDS, answer_with, answer_without, marked
from atomic_balance.http.messages import (
    AccountPath,
    Hold,
    HoldCapture,
    HoldPath,
    HoldPlacement,
    HoldRelease,
    HoldsPage,
    HoldsQuery,
    check_payees,
)
from atomic_balance.http.parsing import parse_body, parse_path, parse_query
from atomic_balance.http.transfers import credits_of, paid_balances
from atomic_balance.postgres.accounts import Hold as StoredHold
from atomic_balance.postgres.accounts import HoldStatus
from atomic_balance.postgres.failures import UnreachableError

_decode_placement = msgspec.json.Decoder(HoldPlacement)
_decode_capture = msgspec.json.Decoder(HoldCapture)
_decode_release = msgspec.json.Decoder(HoldRelease)
_ENDED = {
    HoldStatus.CAPTURED: "hold_captured",
    HoldStatus.RELEASED: "hold_released",
    HoldStatus.EXPIRED: "hold_expired",
}


async def place_hold(request: web.Request) -> web.Response:
    """PUT /api/users/{userId}/holds/{holdId}: set money aside; asked again, it is the same hold."""
    path = parse_path(HoldPath, request)
    asked = await parse_body(request, _decode_placement)
    change = hold(path.user_id, path.hold_id, asked.amount, asked.expires_in_seconds, asked.reference)
    outcome = await request.app[GROUP_COMMIT].submit(change)
    if isinstance(outcome, Applied):
        if outcome.replayed:
            return marked(answer_with(_answer(await _found(request, path))), replayed=True)
        if outcome.expires_at:
            placed = StoredHold(
                path.user_id, path.hold_id, asked.amount, asked.reference, outcome.expires_at, HoldStatus.HELD
            )
        else:
            placed = await _placed_or_unknown(request, path)
        return answer_with(_answer(placed), status=201 if placed.status is HoldStatus.HELD else 200)
    if outcome is Undecided.KEY_REUSED:
        bound = await request.app[ACCOUNTS].change(path.user_id, path.hold_id)
        if bound is not None and (bound.hold_amount == 0 or bound.refusal):
            raise ApiError("idempotency_key_reused", "holdId: already used as the key of another change of this user")
        raise ApiError("hold_exists")
    return answer_without(request, change, outcome)


async def capture_hold(request: web.Request) -> web.Response:
    """POST /api/users/{userId}/holds/{holdId}/capture: withdraw what is held, or a part; the rest is released."""
    path = parse_path(HoldPath, request)
    asked = await parse_body(request, _decode_capture, HoldCapture())
    payees = _payees(path, asked)
    placed = await _placed(request, path)
    amount = sum(credit.amount for credit in payees) or asked.amount or placed.amount
    if amount > placed.amount:
        member = "to: expected no more in all" if payees else "amount: expected no more"
        raise ApiError("invalid_request", f"{member} than is held, {placed.amount}")
    submit = request.app[GROUP_COMMIT].submit
    captured = capture(path.user_id, path.hold_id, placed.amount, amount, payees)
    # One that is overdue ends as expired, unless a capture that came in time is still under way.
    change = release(path.user_id, path.hold_id, placed.amount, expired=True) if placed.overdue else captured
    outcome = await submit(change)
    if outcome is Undecided.KEY_REUSED or (isinstance(outcome, Applied) and placed.overdue):
        found = await _settled(request, path)
        if found.status is not HoldStatus.CAPTURED or (found.captured, found.payees) != (amount, captured.payees):
            raise ApiError(_ENDED[found.status])
        outcome = await submit(captured)  # which the journal has
    if not isinstance(outcome, Applied):
        return answer_without(request, change, outcome)
    answer = _answer(placed._replace(status=HoldStatus.CAPTURED, captured=amount, balance=outcome.balance))
    if asked.to:
        answer = msgspec.structs.replace(answer, to=paid_balances(asked.to, outcome.payee_balances))
    return marked(answer_with(answer), outcome.replayed)


def _payees(path: HoldPath, asked: HoldCapture) -> list[Credit]:
    """To whom a hold is to be captured; empty: to nobody. Raises ApiError."""
    if asked.to is None:
        return []
    if asked.amount is not None:
        raise ApiError("invalid_request", "amount: expected none beside to, whose amounts are captured")
    try:
        check_payees(path.user_id, asked.to)
    except ValueError as error:
        raise ApiError("invalid_request", explain(msgspec.ValidationError(str(error)), HoldCapture)) from None
    return list(credits_of(asked.to))


async def release_hold(request: web.Request) -> web.Response:
    """POST /api/users/{userId}/holds/{holdId}/release: let go of what is held."""
    path = parse_path(HoldPath, request)
    await parse_body(request, _decode_release, HoldRelease())
    placed = await _placed(request, path)
    change = release(path.user_id, path.hold_id, placed.amount, expired=placed.overdue)
    outcome = await request.app[GROUP_COMMIT].submit(change)
    if isinstance(outcome, Applied):
        status = HoldStatus.EXPIRED if placed.overdue else HoldStatus.RELEASED
        return marked(answer_with(_answer(placed._replace(status=status))), outcome.replayed)
    if outcome is not Undecided.KEY_REUSED:
        return answer_without(request, change, outcome)
    found = await _settled(request, path)
    if found.status is HoldStatus.CAPTURED:
        raise ApiError(_ENDED[found.status])
    return marked(answer_with(_answer(found)), replayed=True)


async def read_hold(request: web.Request) -> web.Response:
    """GET /api/users/{userId}/holds/{holdId}: a hold, whatever has become of it."""
    return answer_with(_answer(await _found(request, parse_path(HoldPath, request))))


async def read_holds(request: web.Request) -> web.Response:
    """GET /api/users/{userId}/holds: a page of the open holds."""
    user_id = parse_path(AccountPath, request).user_id
    page = parse_query(HoldsQuery, request)
    accounts = request.app[ACCOUNTS]
    rows = await accounts.open_holds(user_id, page.after or "", page.limit + 1)
    if not rows and await accounts.account(user_id) is None:
        raise ApiError("user_not_found")
    shown = rows[: page.limit]
    following = None
    if len(rows) > len(shown):
        following = f"/api/users/{user_id}/holds?limit={page.limit}&after={quote(shown[-1].hold_id, safe='')}"
    return answer_with(HoldsPage([_answer(row) for row in shown], following))


async def _placed_or_unknown(request: web.Request, path: HoldPath) -> StoredHold:
    """The hold, which a lost statement of this request may have placed. Raises ApiError, also where that is unknown."""
    try:
        return await _found(request, path)
    except UnreachableError as error:
        raise ApiError("outcome_unknown", TEXTS_FOR_HOLDS[Undecided.UNKNOWN]) from error


async def _settled(request: web.Request, path: HoldPath) -> StoredHold:
    """The hold, which is known to be settled. Raises ApiError where the database has forgotten that."""
    found = await _found(request, path)
    if found.status is HoldStatus.HELD:
        raise ApiError("unavailable")
    return found


async def _placed(request: web.Request, path: HoldPath) -> StoredHold:
    placed = await request.app[HOLDS].read(path.user_id, path.hold_id)
    if placed is None:
        raise ApiError("hold_not_found")
    return placed


async def _found(request: web.Request, path: HoldPath) -> StoredHold:
    found = await request.app[ACCOUNTS].hold(path.user_id, path.hold_id)
    if found is None:
        raise ApiError("hold_not_found")
    return found


def _answer(stored: StoredHold) -> Hold:
    is_captured = stored.status is HoldStatus.CAPTURED
    return Hold(
        stored.user_id,
        stored.hold_id,
        stored.amount,
        stored.reference,
        stored.status.value,
        stored.expires_at,
        stored.captured if is_captured and stored.captured is not None else UNSET,
        stored.balance if is_captured and stored.balance is not None else UNSET,
    )
