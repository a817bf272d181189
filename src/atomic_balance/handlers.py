"""From a request to its answer: parse, ask the store, answer."""

from typing import TypeVar

import msgspec
from aiohttp import web

from atomic_balance.changes import Applied, Change, Refused
from atomic_balance.errors import ApiError, error_response
from atomic_balance.expectations import explain
from atomic_balance.messages import Account, AccountOpening, BalanceUpdate, Health, UpdatedBalance, UserId
from atomic_balance.store import OutcomeUnknownError, Store, UnavailableError

STORE = web.AppKey("store", Store)

T = TypeVar("T", bound=msgspec.Struct)


class Path(msgspec.Struct, rename="camel"):
    """The variable part of a path."""

    user_id: UserId


_decode_update = msgspec.json.Decoder(BalanceUpdate)
_decode_opening = msgspec.json.Decoder(AccountOpening)
_encode = msgspec.json.Encoder().encode


async def update_balance(request: web.Request) -> web.Response:
    """POST /api/balance/update: change one balance."""
    update = await _body(request, _decode_update)
    outcome = await request.app[STORE].update(Change(update.user_id, update.amount))
    if isinstance(outcome, Applied):
        return _answer(UpdatedBalance(update.user_id, outcome.balance))
    return error_response(outcome.reason if isinstance(outcome, Refused) else "user_not_found")


async def open_account(request: web.Request) -> web.Response:
    """PUT /api/users/{userId}: open an account; asked again with the same values, it is the same."""
    user_id = _user_id(request)
    asked = await _body(request, _decode_opening)
    found = await request.app[STORE].open_account(user_id, asked.balance)
    if found.opening_balance != asked.balance:
        raise ApiError("account_exists")
    return _answer(Account(user_id, found.balance), status=201 if found.opened else 200)


async def read_account(request: web.Request) -> web.Response:
    """GET /api/users/{userId}: the balance now."""
    user_id = _user_id(request)
    balance = await request.app[STORE].balance(user_id)
    if balance is None:
        raise ApiError("user_not_found")
    return _answer(Account(user_id, balance))


async def healthz(_: web.Request) -> web.Response:
    """GET /healthz: the process answers."""
    return _answer(Health("ok"))


async def readyz(request: web.Request) -> web.Response:
    """GET /readyz: the database answers, and its schema is current."""
    try:
        missing = await request.app[STORE].missing_migrations()
    except (UnavailableError, OutcomeUnknownError):
        return _answer(Health("unavailable", "the database does not answer"), status=503)
    if missing:
        return _answer(Health("unavailable", f"the schema is behind: {', '.join(missing)}"), status=503)
    return _answer(Health("ok"))


async def _body(request: web.Request, decoder: msgspec.json.Decoder[T]) -> T:
    if request.content_type != "application/json":
        raise ApiError("unsupported_media_type")
    body = await request.read()
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError("invalid_request", explain(error, decoder.type)) from None


def _user_id(request: web.Request) -> int:
    text = request.match_info["user_id"]
    try:
        return msgspec.convert({"userId": int(text) if text.isascii() and text.isdigit() else text}, Path).user_id
    except msgspec.ValidationError as error:
        raise ApiError("invalid_request", explain(error, Path)) from None


def _answer(body: msgspec.Struct, status: int = 200) -> web.Response:
    return web.Response(status=status, body=_encode(body), content_type="application/json")
