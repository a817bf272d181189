"""A reader of the feed, which takes it page by page as a consumer does."""

from typing import Any

from tests.client import Caller

CHANGES = "/api/changes"


class Reader:
    """Follows the feed of the service at `url`. `changes`: what it has read; `after`: where it goes on."""

    def __init__(self, client: Caller, url: str = "", limit: int = 1_000) -> None:
        self.changes: list[dict[str, Any]] = []
        self.after: str | None = None
        self._client = client
        self._url = url
        self._limit = limit

    async def page(self, wait: int = 0) -> list[dict[str, Any]]:
        """Read the next page; empty: nothing came within `wait` seconds."""
        query = {"limit": str(self._limit), "wait": str(wait)} | ({"after": self.after} if self.after else {})
        async with self._client.get(self._url + CHANGES, params=query) as answer:
            body = await answer.json()
            assert answer.status == 200, body
        changes: list[dict[str, Any]] = body["changes"]
        assert len(changes) <= self._limit
        self.changes += changes
        self.after = body["next"]
        return changes

    async def read_all(self) -> None:
        """Read until a page is empty."""
        while await self.page():
            pass

    def read(self) -> list[tuple[int, int]]:
        """User and version of every change that it has read, in order."""
        return [(change["userId"], change["version"]) for change in self.changes]
