"""Callers: each request goes to one of the services, with the token of now, and may stay without an answer."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp

PATIENCE_SECONDS = 120
"""The longest that anything is waited for, however slow the machine; then the run fails and says what did not come."""

_ANSWER_SECONDS = 10
_PAUSE_SECONDS = 0.02  # after a request without an answer, or callers of a dead service would keep the machine busy


class Reply(NamedTuple):
    """An answer: its status (0: none came), its body, and whether it says that it repeats an earlier one."""

    status: int
    body: dict[str, Any]
    replayed: bool

    def told(self) -> str:
        """The answer in short, to be counted: its status, and why it is no success."""
        return f"{self.status} {self.body.get('error', '')}".partition(":")[0].strip()


NO_REPLY = Reply(0, {}, False)


class Caller:
    """Asks the services at `urls`. `token`: what is sent from now on; `refused`: requests whose token was not taken."""

    def __init__(self, session: aiohttp.ClientSession, urls: Sequence[str], token: str, chance: random.Random) -> None:
        self.token = token
        self.refused: list[str] = []
        self._session = session
        self._urls = urls
        self._chance = chance
        self._under_way: Counter[str] = Counter()

    async def ask(
        self, method: str, path: str, body: Any = None, key: str | None = None, query: Mapping[str, str] = {}
    ) -> Reply:
        """Ask one of the services, once."""
        token = self.token
        headers = {"Authorization": f"Bearer {token}"} | ({"Idempotency-Key": key} if key else {})
        url = self._chance.choice(self._urls) + path
        self._under_way[token] += 1
        try:
            async with self._session.request(method, url, json=body, params=query, headers=headers) as answer:
                reply = Reply(answer.status, await answer.json(), "Idempotent-Replayed" in answer.headers)
        except (aiohttp.ClientError, TimeoutError):
            await asyncio.sleep(_PAUSE_SECONDS)
            return NO_REPLY
        finally:
            self._under_way[token] -= 1
        if reply.status in (401, 403):
            self.refused.append(f"{method} {path} with the token {token}: {reply}")
        return reply

    async def status_with(self, url: str, token: str) -> int:
        """What the service at `url` answers to a reader with another token; 0: nothing."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            headers = {"Authorization": f"Bearer {token}", "Connection": "close"}
            async with self._session.get(f"{url}/api/users?limit=1", headers=headers) as answer:
                return answer.status
        return 0

    async def move(self, token: str) -> None:
        """Send another token from now on; ends when no request with the one before is under way any more."""
        before, self.token = self.token, token
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self._under_way[before]:  # noqa: ASYNC110 - what ends is a request, not an event
                await asyncio.sleep(0.02)


async def once_or_again(ask: Callable[[], Awaitable[None]], repeats: int, chance: random.Random) -> None:
    """Ask, and `repeats` times again: half of the time all at once, otherwise one after the other."""
    if repeats and chance.random() < 0.5:
        await asyncio.gather(*(ask() for _ in range(1 + repeats)))
    else:
        for _ in range(1 + repeats):
            await ask()


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client with as many connections as there are requests, which sends none of them again by itself."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
    ) as client:
        client._retry_connection = False  # as aiohttp's own TestClient does: each answer belongs to one request
        yield client
