"""One table: what can go wrong -> the status and the text that the caller gets."""

from collections.abc import Mapping
from typing import NamedTuple

from aiohttp import web
from msgspec import UNSET, UnsetType, json

from atomic_balance.http.messages import Error, ProblemDetails


class Problem(NamedTuple):
    """How one kind of error is answered."""

    status: int
    text: str


PROBLEMS: Mapping[str, Problem] = {
    "invalid_request": Problem(400, "Bad request"),
    "insufficient_funds": Problem(400, "Insufficient funds"),
    "balance_limit_exceeded": Problem(400, "Balance limit exceeded"),
    "unauthorized": Problem(401, "Authorization: expected Bearer and a token of this API"),
    "forbidden": Problem(403, "Authorization: expected a token that may write, this one may only read"),
    "user_not_found": Problem(404, "User not found"),
    "hold_not_found": Problem(404, "Hold not found"),
    "key_not_found": Problem(404, "Nothing is bound to this key"),
    "not_found": Problem(404, "Not found"),
    "method_not_allowed": Problem(405, "Method not allowed"),
    "request_timeout": Problem(408, "The request did not arrive in time"),
    "account_exists": Problem(409, "User exists with other opening values"),
    "balance_below_minimum": Problem(409, "The balance is below this minimum"),
    "hold_exists": Problem(409, "Hold exists with another amount or reference"),
    "hold_captured": Problem(409, "The hold was captured"),
    "hold_released": Problem(409, "The hold was released"),
    "hold_expired": Problem(409, "The hold has expired"),
    "body_too_large": Problem(413, "Body too large"),
    "unsupported_media_type": Problem(415, "Content-Type: expected application/json"),
    "unsupported_content_encoding": Problem(415, "Content-Encoding: expected none, or identity"),
    "misdirected_request": Problem(421, "Host: expected a name of this service (the setting ALLOWED_HOSTS adds names)"),
    "idempotency_key_reused": Problem(422, "Idempotency-Key: already used for another change of this user"),
    "internal_error": Problem(500, "Internal server error"),
    "feed_not_offered": Problem(
        501, "The feed is not offered with Citus: its nodes have no common order; use logical replication"
    ),
    "turned_away": Problem(
        503, "Service unavailable: this request changed nothing, ask again with the same Idempotency-Key"
    ),
    "unavailable": Problem(503, "Service unavailable: try again"),
    "outcome_unknown": Problem(
        504,
        "Outcome unknown: ask again with the same Idempotency-Key, or, if you sent none, look at the account's changes",
    ),
}

RETRY_AFTER_SECONDS = 1

_BODIES = {code: json.encode(Error(problem.text)) for code, problem in PROBLEMS.items()}
_BY_STATUS = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class ApiError(Exception):
    """Ends a request with the error `code` of the table, and with `text` instead of the table's if it is given."""

    def __init__(self, code: str, text: str | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.text = text


def problem_type(code: str) -> str:
    """The stable identifier of an error in problem details."""
    return f"urn:problem-type:atomic-balance:{code.replace('_', '-')}"


def error_response(
    request: web.BaseRequest, code: str, text: str | None = None, user_id: int | UnsetType = UNSET
) -> web.Response:
    """The answer for the error `code` of the table: `{"error": ...}`, or problem details if `request` accepts them.

    `text`: instead of the table's. `user_id`: whom it is about, where a request names several users.
    """
    problem = PROBLEMS[code]
    headers = {"Content-Type": "application/json", "Vary": "Accept"}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if code == "unsupported_content_encoding":
        headers["Accept-Encoding"] = "identity"
    if problem.status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if "application/problem+json" in request.headers.get("Accept", ""):
        headers["Content-Type"] = "application/problem+json"
        details = ProblemDetails(problem_type(code), problem.text, problem.status, text or problem.text, user_id)
        return web.Response(status=problem.status, body=json.encode(details), headers=headers)
    body = json.encode(Error(text)) if text else _BODIES[code]
    return web.Response(status=problem.status, body=body, headers=headers)


def of_http_exception(request: web.BaseRequest, error: web.HTTPException) -> web.Response:
    """The answer for an error that aiohttp itself raised: unknown path, wrong method, body too large."""
    code = _BY_STATUS.get(error.status)
    if code is None:
        raise error
    response = error_response(request, code)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response
