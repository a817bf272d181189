"""Readers of the feed: each keeps its position, loses an answer at times, and must see every change exactly once."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests.soak.asking import PATIENCE_SECONDS, Caller
from tests.soak.journal import Journal

_READERS = 4
_LOST_SHARE = 0.1
_PAUSE_SECONDS = 0.1
_CHANGES = "/api/changes"


class Entry(NamedTuple):
    """What the feed has of a change."""

    user_id: int
    version: int
    amount: int
    hold_amount: int
    balance: int
    reference: str | None


class Reader:
    """Follows the feed. `seen`: every change that it was given; `wrong`: what it may not be told, a line each."""

    def __init__(self, caller: Caller, chance: random.Random, told: Counter[str]) -> None:
        self.seen: list[Entry] = []
        self.wrong: list[str] = []
        self.is_at_the_end = False
        self._caller = caller
        self._chance = chance
        self._told = told
        self._after: str | None = None
        self._lost: list[Entry] = []

    async def follow(self, until: float) -> None:
        """Read what comes until the time is over."""
        while time.monotonic() < until:
            await self.read_page(self._chance.choice((0, 1, 2)), self._chance.choice((30, 200, 1_000)))

    async def read_to_the_end(self, count: int) -> None:
        """Read until it has `count` changes and there are no more."""
        self.is_at_the_end = False
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not (self.is_at_the_end and len(self.seen) >= count):
                    await self.read_page(0, 1_000)
        except TimeoutError:
            self.wrong.append(f"a reader has {len(self.seen)} changes of {count}, and does not get any more")

    async def read_page(self, wait: int, limit: int) -> None:
        """Ask once for what comes next."""
        query = {"limit": str(limit), "wait": str(wait)} | ({"after": self._after} if self._after else {})
        reply = await self._caller.ask("GET", _CHANGES, query=query)
        self._told[reply.told()] += 1
        if reply.status not in (0, 200, 503):
            self.wrong.append(f"an answer that may never be given: {query}: {reply}")
        if reply.status != 200:
            await asyncio.sleep(_PAUSE_SECONDS)
            return
        entries = [_entry(change) for change in reply.body["changes"]]
        again = self._lost[:limit]
        if entries[: len(again)] != again:
            self.wrong.append(f"other changes after the same position: {query}: {self._lost}, then {entries}")
        if self._chance.random() < _LOST_SHARE:
            self._lost = entries  # as if it had died before it kept the new position
            self._told["read again"] += 1
            return
        self._lost = []
        self.seen += entries
        self._after = reply.body["next"]
        self.is_at_the_end = not entries


class Feed:
    """The readers. `told`: how often they were answered what."""

    def __init__(self, caller: Caller, chance: random.Random) -> None:
        self.told: Counter[str] = Counter()
        self.readers = [Reader(caller, random.Random(chance.random()), self.told) for _ in range(_READERS)]
        self._late = Reader(caller, chance, self.told)

    async def read_to_the_end(self, count: int) -> None:
        """Have all of them read the rest, when nobody writes any more, and one all of it; `count`: of all changes."""
        self.readers.append(self._late)
        async with asyncio.TaskGroup() as tasks:
            for reader in self.readers:
                tasks.create_task(reader.read_to_the_end(count))


def _entry(change: dict[str, Any]) -> Entry:
    return Entry(
        change["userId"],
        change["version"],
        change["amount"],
        change["holdAmount"],
        change["balance"],
        change["reference"],
    )


def judge_feed(readers: Sequence[Sequence[Entry]], journal: Journal) -> list[str]:
    """What readers have seen and is not the journal, all of it and nothing else in its order, a line each."""
    applied = sorted(
        (row.feed_position, row.user_id, row.version, row) for row in journal.rows if row.version is not None
    )
    expected = [
        Entry(user_id, version, row.amount, row.hold_amount or 0, row.balance, row.reference)
        for _, user_id, version, row in applied
    ]
    wrong = []
    for number, seen in enumerate(readers):
        if seen == expected:
            continue
        missing = Counter(expected) - Counter(seen)
        too_many = Counter(seen) - Counter(expected)
        wrong += [f"reader {number} was not given {entry}" for entry in missing.elements()]
        wrong += [f"reader {number} was given once too often, or wrongly, {entry}" for entry in too_many.elements()]
        if not missing and not too_many:
            wrong.append(f"reader {number} was given everything in another order")
    return wrong
