"""Who may do what: where there are tokens, a request needs one, which allows it everything or only to read."""

import hashlib
import hmac

from aiohttp import web
from aiohttp.typedefs import Handler

from atomic_balance.http.errors import ApiError
from atomic_balance.settings import Settings

OPEN_PATHS = ("/healthz", "/readyz")
PAGES = ("/", "/docs")
"""Pages hold no data. Without a token they are sent too, with status 401, so that they can ask for one."""

READING = ("GET", "HEAD")


class Tokens:
    """The tokens that are accepted, as their hashes. They can be exchanged while requests are under way."""

    def __init__(self, settings: Settings) -> None:
        self.accept(settings)

    def accept(self, settings: Settings) -> None:
        """Accept the tokens of `settings` from now on, and no others."""
        self.writing = [_hash(token) for token in settings.api_tokens]
        self.reading = [_hash(token) for token in settings.read_tokens]


async def answer_if_allowed(tokens: Tokens, request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let `handler` answer those who send `Authorization: Bearer` with one of `tokens` that allows the method.

    Tokens are compared by their hashes, all of them, in constant time: the time says neither how long one is nor which
    one was nearly right. Raises ApiError.
    """
    if request.path in OPEN_PATHS:
        return await handler(request)
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    hashed = _hash(given.strip())
    may_write = [hmac.compare_digest(hashed, one) for one in tokens.writing]
    may_read = [hmac.compare_digest(hashed, one) for one in tokens.reading]
    if scheme.lower() == "bearer":
        if any(may_write) or (any(may_read) and request.method in READING):
            return await handler(request)
        if any(may_read):
            raise ApiError("forbidden")
    if request.method == "GET" and request.path in PAGES:
        page = await handler(request)
        page.set_status(401)
        page.headers["WWW-Authenticate"] = "Bearer"
        return page
    raise ApiError("unauthorized")


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()
