"""Reads the bodies of requests, within limits: of size and time for each, and of memory for all that are arriving."""

import asyncio

from aiohttp import web

from atomic_balance.http.errors import ApiError

CONNECTION_BYTES = 64 * 1024
"""aiohttp reads no further from a connection while more than twice as much is buffered."""

_OWN_BYTES = 8 * 1024
"""How much of each body does not count towards the memory of all, so that large bodies never keep a lone update out.

Less than a connection's buffer, which is there anyway.
"""


class Bodies:
    """Reads bodies. `bytes_max`: what all that are arriving may hold together; `seconds`: how long each may take."""

    def __init__(self, bytes_max: int, seconds: float) -> None:
        self._free = bytes_max
        self._seconds = seconds

    async def read(self, request: web.Request, bytes_max: int) -> bytes | bytearray:
        """The body of `request`, of at most `bytes_max`.

        Raises ApiError if it is too large or too slow, if too much is arriving already, or if it ends early, as when
        the caller has gone away.
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
        body = bytearray()  # not a list of parts, which would take more than their bytes
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
