"""The mixed load: callers that ask for one thing after the other, of every kind."""

import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.soak.accounts import Accounts
from tests.soak.asking import Caller
from tests.soak.feed import Feed
from tests.soak.holds import Holds
from tests.soak.imports import Imports
from tests.soak.past import Reads
from tests.soak.transfers import Transfers
from tests.soak.updates import Updates


class Load:
    """Everything that is asked for, and what was answered. Imports go to the database at once, from `directory`."""

    def __init__(self, caller: Caller, database_url: str, directory: Path, chance: random.Random) -> None:
        self.accounts = Accounts(caller, random.Random(chance.random()))
        self.updates = Updates(caller, self.accounts, random.Random(chance.random()))
        self.transfers = Transfers(caller, self.accounts, random.Random(chance.random()))
        self.holds = Holds(caller, self.accounts, random.Random(chance.random()))
        self.reads = Reads(caller, self.accounts, random.Random(chance.random()))
        self.feed = Feed(caller, random.Random(chance.random()))
        self.imports = Imports(self.accounts, database_url, directory, random.Random(chance.random()))
        self._chance = chance
        self._kinds: dict[Callable[[], Awaitable[None]], int] = {
            self.updates.one: 38,
            self.updates.bulk: 8,
            self.transfers.one: 24,
            self.transfers.bulk: 6,
            self.holds.one: 20,
            self.accounts.one: 4,
            self.reads.now: 4,
            self.reads.past: 6,
        }

    async def work(self, until: float) -> None:
        """Ask until the time is over."""
        kinds, weights = [*self._kinds], [*self._kinds.values()]
        while time.monotonic() < until:
            await self._chance.choices(kinds, weights)[0]()
