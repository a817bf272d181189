"""What a request asks: its body, its parameters and its idempotency key, each checked as its type says."""

import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from aiohttp import web

from atomic_balance.expectations import expected, explain
from atomic_balance.http.app_keys import BODIES
from atomic_balance.http.errors import ApiError
from atomic_balance.http.messages import Body

IDEMPOTENCY_KEY = "Idempotency-Key"

B = TypeVar("B", bound=Body)
T = TypeVar("T", bound=msgspec.Struct)

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')


async def parse_body(request: web.Request, decoder: msgspec.json.Decoder[B], default: B | None = None) -> B:
    """The body of `request`, as what `decoder` gives; of a request without one the `default`, if there is any.

    Raises ApiError.
    """
    is_json = request.content_type == "application/json"
    if default is None and not is_json:
        raise ApiError("unsupported_media_type")
    body = await request.app[BODIES].read(request, decoder.type.bytes_max)
    if default is not None and not body:
        return default
    if not is_json:
        raise ApiError("unsupported_media_type")
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError("invalid_request", explain(error, decoder.type)) from None


def parse_path(shape: type[T], request: web.Request) -> T:
    """The variable parts of the path of `request`, as a `shape`. Raises ApiError."""
    return _parameters(shape, request.match_info)


def parse_query(shape: type[T], request: web.Request) -> T:
    """The parameters in the query of `request`, each given at most once, as a `shape`. Raises ApiError."""
    if len(set(request.query)) < len(request.query):
        raise ApiError("invalid_request", "query: expected each parameter at most once")
    return _parameters(shape, request.query)


def _parameters(shape: type[T], given: Mapping[str, str]) -> T:
    """`given` as a `shape`. A number has one spelling: plain digits."""
    try:
        values = msgspec.convert(dict(given), shape, strict=False)
    except msgspec.ValidationError as error:
        raise ApiError("invalid_request", explain(error, shape)) from None
    for name, value in msgspec.to_builtins(values).items():
        if name in given and given[name] != str(value):
            raise ApiError("invalid_request", f"{name}: expected {expected(shape)[name]}")
    return values


def parse_idempotency_key(request: web.Request) -> str | None:
    """The caller's key; None if it sent none. Raises ApiError.

    A key in quotes is a structured field's string (RFC 8941), and stands for what is between them.
    """
    headers = request.headers
    key = headers.get(IDEMPOTENCY_KEY)
    if key is None:
        return None
    if key[:1] == '"':
        quoted = _QUOTED.fullmatch(key)
        if not quoted:
            raise ApiError("invalid_request", f"{IDEMPOTENCY_KEY}: expected a quoted string, as it begins with a quote")
        key = re.sub(r"\\(.)", r"\1", quoted[1])
    if not is_key(key) or len(headers.getall(IDEMPOTENCY_KEY)) > 1:
        raise ApiError("invalid_request", f"{IDEMPOTENCY_KEY}: expected one, of 1 to 255 visible ASCII characters")
    return key


def is_key(text: str) -> bool:
    """Whether `text` can be a key that a caller sent; those that the service makes can't."""
    return _KEY.fullmatch(text) is not None
