"""Who may ask: whoever sends one of the API's tokens, as soon as there are any."""

import hashlib
import hmac
from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from atomic_balance.errors import ApiError

OPEN_PATHS = ("/healthz", "/readyz")
PAGES = ("/", "/docs")
"""Pages hold no data; without a token they are answered all the same, as 401, so that they can ask for one."""


def require_token(tokens: Sequence[str]) -> Middleware:
    """A middleware that lets only those pass who send `Authorization: Bearer` with one of `tokens`.

    Tokens are compared by their hashes, all of them, in constant time: the time says neither how long one is nor which
    one was nearly right. Raises ApiError.
    """
    accepted = [_hash(token) for token in tokens]

    @web.middleware
    async def check_token(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in OPEN_PATHS:
            return await handler(request)
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        hashed = _hash(given.strip())
        matches = [hmac.compare_digest(hashed, one) for one in accepted]
        if scheme.lower() == "bearer" and any(matches):
            return await handler(request)
        if request.method == "GET" and request.path in PAGES:
            page = await handler(request)
            page.set_status(401)
            page.headers["WWW-Authenticate"] = "Bearer"
            return page
        raise ApiError("unauthorized")

    return check_token


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()
