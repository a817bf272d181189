"""Reading the bodies of requests: each has a limit and a time of its own, and those that are under way share a room."""

import asyncio

from aiohttp import web

from atomic_balance.http.errors import ApiError

CONNECTION_BYTES = 64 * 1024
"""What aiohttp may buffer for a connection (twice as much, and what came last) before it reads no further."""

_OWN_BYTES = 8 * 1024
"""What a body may have without asking for room: less than its connection's buffer. No bulk keeps a lone update out."""


class Bodies:
    """Reads bodies. `bytes_max`: what those that are under way may have together; `seconds`: how long each may take."""

    def __init__(self, bytes_max: int, seconds: float) -> None:
        self._free = bytes_max
        self._seconds = seconds

    async def read(self, request: web.Request, bytes_max: int) -> bytes | bytearray:
        """The body of `request`, of at most `bytes_max`.

        Raises ApiError: too large, no room, not in time, or not all of it, as when the caller has gone away.
        """
        content = request.content
        try:
            if not content.is_eof():
                return await self._arriving(request, bytes_max)
            body = content.read_nowait()  # it came with its head, as nearly all do
        except (ConnectionError, web.RequestPayloadError):
            raise ApiError("invalid_request", "body: expected all of it") from None
        if len(body) > bytes_max:
            raise ApiError("body_too_large")
        return body

    async def _arriving(self, request: web.Request, bytes_max: int) -> bytearray:
        if (request.content_length or 0) > bytes_max:
            raise ApiError("body_too_large")
        body = bytearray()  # and no list of its parts: each would take more than its bytes
        taken = 0
        try:
            async with asyncio.timeout(self._seconds):
                while part := await request.content.readany():
                    body += part
                    if len(body) > bytes_max:
                        raise ApiError("body_too_large")
                    more = max(0, len(body) - _OWN_BYTES) - taken
                    if more > self._free:
                        raise ApiError("unavailable")
                    self._free -= more
                    taken += more
        except TimeoutError:
            raise ApiError("request_timeout") from None
        finally:
            self._free += taken
        return body
