"""Clients of several services that pay each other, at once or by holds, and note what they are told: a history."""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Container, Sequence

import aiohttp

from atomic_balance.changes import settlement_key
from tests.client import Told, hold, settle, transfer, update
from tests.database import Database
from tests.history import Applied, Operation, Snapshot, Transfer, contradictions_between

AMOUNTS = (1, 4, 17, 30)
HELD_SECONDS = 3600
_NAMED = """
    SELECT CASE WHEN payer IS NULL THEN coalesce(reference, idempotency_key)
                ELSE coalesce(reference, substr(idempotency_key, length(payer::text) + 3)) END,
           amount, balance, coalesce(hold_amount, 0)
      FROM balance_changes
     WHERE user_id = %s AND version IS NOT NULL
     ORDER BY version
"""
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
            user_id: [Applied(*row) for row in self._database.execute(_NAMED, user_id)] for user_id in self.updates
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
            elif kind < 0.55:
                await self._pay(client, urls, name, chance)
            elif kind < 0.7:
                await self._hold(client, urls, name, chance)
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

    async def _hold(self, client: aiohttp.ClientSession, urls: Sequence[str], name: str, chance: random.Random) -> None:
        """Set money aside, then have it paid to others, all or a part, or let it go."""
        payer, *payees = chance.sample(list(self.updates), 3)
        amount = chance.choice(AMOUNTS)
        told, asked, answered = await self._outcome(
            urls, chance, lambda url: hold(client, name, amount, payer, url, expiresInSeconds=HELD_SECONDS)
        )
        placed = 0 if told.status == 201 else None
        self.updates[payer].append(Operation(name, 0, asked, answered, placed, told.replayed, amount, told=False))
        if told.status == 400:
            return
        ending = settlement_key(name)
        if chance.random() < 0.3:
            told, asked, answered = await self._outcome(
                urls, chance, lambda url: settle(client, "release", name, payer, url)
            )
            self.updates[payer].append(Operation(ending, 0, asked, answered, 0, told.replayed, -amount, told=False))
            return
        paid = dict.fromkeys(payees[: 2 if amount % 2 == 0 else 1], (amount + 1) // 2)
        to = [{"userId": user_id, "amount": part} for user_id, part in paid.items()]
        for _ in range(chance.choice((1, 1, 2))):
            told, asked, answered = await self._outcome(
                urls, chance, lambda url: settle(client, "capture", name, payer, url, to=to)
            )
            balances = {payer: told.body["newBalance"]}
            balances |= {one["userId"]: one["newBalance"] for one in told.body["to"]}
            self.transfers.append(Transfer(ending, payer, paid, asked, answered, balances, told.replayed))

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
        assert told.status in (200, 201, 400), told
        return told, asked, time.monotonic()
