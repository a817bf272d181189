"""Clients of several services that pay each other, and note what they are told: a history to be checked."""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Container, Sequence

import aiohttp

from tests.client import Told, transfer, update
from tests.database import Database
from tests.history import Applied, Operation, Snapshot, Transfer, contradictions_between

AMOUNTS = (1, 4, 17, 30)
SHARED_NAMES = 300
"""So many transfers are asked for by several clients, with the same key."""


class History:
    """What clients of `urls` ask about some accounts, opened with `opening`, and what they are told.

    `again`: the statuses on which they ask again, here or there, with the key that every change has.
    """

    def __init__(self, database: Database, user_ids: Sequence[int], opening: int, again: Container[int] = ()) -> None:
        self.updates: dict[int, list[Operation]] = {user_id: [] for user_id in user_ids}
        self.transfers: list[Transfer] = []
        self.snapshots: list[Snapshot] = []
        self._database = database
        self._opening = opening
        self._again = again
        database.open(dict.fromkeys(user_ids, opening))

    async def load(self, client: aiohttp.ClientSession, urls: Sequence[str], clients: int, seconds: float) -> None:
        """Have so many clients ask for so long, while all accounts are read at once and one by one."""
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as tasks:
            for number in range(clients):
                tasks.create_task(self._work(client, urls, number, until))
            while time.monotonic() < until:
                asked = time.monotonic()
                accounts = self._database.accounts()
                self.snapshots.append(Snapshot(asked, time.monotonic(), accounts))
                await asyncio.sleep(0.05)

    def contradictions(self) -> list[str]:
        """Why what was told is not linearizable, by the journal as it is in the end."""
        journals = {
            user_id: [Applied(row.reference or row.key, row.amount, row.balance) for row in rows if row.version]
            for user_id in self.updates
            for rows in [self._database.journal(user_id)]
        }
        openings = dict.fromkeys(self.updates, self._opening)
        return contradictions_between(self.updates, self.transfers, self.snapshots, journals, openings)

    async def _work(self, client: aiohttp.ClientSession, urls: Sequence[str], number: int, until: float) -> None:
        chance = random.Random(number)
        step = 0
        while time.monotonic() < until:
            step += 1
            name, kind = f"{number}-{step}", chance.random()
            if kind < 0.2:
                await self._pay(client, urls, f"shared-{chance.randrange(SHARED_NAMES)}", chance)
            elif kind < 0.7:
                await self._pay(client, urls, name, chance)
            elif kind < 0.9:
                await self._change(client, urls, name, chance)
            else:
                await self._read(client, chance.choice(urls), chance.choice(list(self.updates)))

    async def _pay(self, client: aiohttp.ClientSession, urls: Sequence[str], name: str, chance: random.Random) -> None:
        """Make the transfer that the name stands for."""
        of_name = random.Random(name)
        payer, *others = of_name.sample(list(self.updates), of_name.choice((2, 2, 2, 3)))
        payees = {user_id: of_name.choice(AMOUNTS) for user_id in others}
        told, asked, answered = await self._outcome(
            urls, chance, lambda url: transfer(client, payer, payees, url, name, reference=name)
        )
        balances = None
        if told.status == 200:
            balances = {payer: told.body["newBalance"]}
            balances |= {one["userId"]: one["newBalance"] for one in told.body["to"]}
        self.transfers.append(Transfer(name, payer, payees, asked, answered, balances, told.replayed))

    async def _change(
        self, client: aiohttp.ClientSession, urls: Sequence[str], name: str, chance: random.Random
    ) -> None:
        """Have money come or go."""
        user_id, amount = chance.choice(list(self.updates)), chance.choice((-25, -9, 3, 8))

        async def ask(url: str) -> Told:
            status, text = await update(client, amount, user_id, url, headers={"Idempotency-Key": name}, reference=name)
            return Told(status, json.loads(text), replayed=False)

        told, asked, answered = await self._outcome(urls, chance, ask)
        self.updates[user_id].append(Operation(name, amount, asked, answered, told.body.get("newBalance")))

    async def _read(self, client: aiohttp.ClientSession, url: str, user_id: int) -> None:
        asked = time.monotonic()
        async with client.get(f"{url}/api/users/{user_id}") as answer:
            found = await answer.json()
        if answer.status == 200:
            account = {user_id: (found["version"], found["balance"])}
            self.snapshots.append(Snapshot(asked, time.monotonic(), account))
        else:
            assert answer.status in self._again, found

    async def _outcome(
        self, urls: Sequence[str], chance: random.Random, ask: Callable[[str], Awaitable[Told]]
    ) -> tuple[Told, float, float]:
        """What is told in the end, when it was first asked, and when it was answered."""
        asked = time.monotonic()
        while (told := await ask(chance.choice(urls))).status in self._again:
            pass
        assert told.status in (200, 400), told
        return told, asked, time.monotonic()
