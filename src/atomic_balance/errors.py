"""One table: what can go wrong -> the status and the text that the caller gets."""

from collections.abc import Mapping
from typing import NamedTuple

from aiohttp import web
from msgspec import json

from atomic_balance.messages import Error


class Problem(NamedTuple):
    """How one kind of error is answered."""

    status: int
    text: str


PROBLEMS: Mapping[str, Problem] = {
    "invalid_request": Problem(400, "Bad request"),
    "insufficient_funds": Problem(400, "Insufficient funds"),
    "balance_limit_exceeded": Problem(400, "Balance limit exceeded"),
    "user_not_found": Problem(404, "User not found"),
    "not_found": Problem(404, "Not found"),
    "method_not_allowed": Problem(405, "Method not allowed"),
    "account_exists": Problem(409, "User exists with another opening balance"),
    "body_too_large": Problem(413, "Body too large"),
    "unsupported_media_type": Problem(415, "Content-Type: expected application/json"),
    "internal_error": Problem(500, "Internal server error"),
    "unavailable": Problem(503, "Service unavailable: nothing was changed, try again"),
    "outcome_unknown": Problem(504, "Outcome unknown: look at the account before you ask again"),
}

_BY_STATUS = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_HEADERS: Mapping[str, Mapping[str, str]] = {"unavailable": {"Retry-After": "1"}}


class ApiError(Exception):
    """Ends a request with the error `code` of the table, `text` in place of the table's where it is given."""

    def __init__(self, code: str, text: str | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.text = text


def error_response(code: str, text: str | None = None, headers: Mapping[str, str] | None = None) -> web.Response:
    """The answer for the error `code` of the table."""
    problem = PROBLEMS[code]
    return web.Response(
        status=problem.status,
        body=json.encode(Error(text or problem.text)),
        content_type="application/json",
        headers={**_HEADERS.get(code, {}), **(headers or {})},
    )


def of_http_exception(error: web.HTTPException) -> web.Response:
    """The answer for an error that aiohttp itself raised: unknown path, wrong method, body too large."""
    code = _BY_STATUS.get(error.status)
    if code is None:
        raise error
    return error_response(code, headers={name: error.headers[name] for name in ("Allow",) if name in error.headers})
