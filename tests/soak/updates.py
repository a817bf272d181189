"""Updates: one or many, with a key or without, asked once or again and again; and what the journal says of them."""

import random
from collections import defaultdict
from typing import NamedTuple

from tests.soak.accounts import Accounts
from tests.soak.asking import NO_REPLY, Caller, Reply, once_or_again
from tests.soak.journal import Journal, Row

_BULK = 20


class UpdateAsked(NamedTuple):
    """A change that was asked for, once or with its key several times, and the answers."""

    user_id: int
    amount: int
    key: str | None
    reference: str
    replies: list[Reply]

    def body(self) -> dict[str, object]:
        """The request, without its key."""
        return {"userId": self.user_id, "amount": self.amount, "reference": self.reference}


class Updates:
    """Asks for updates. `asked`: all of them, with the answers."""

    def __init__(self, caller: Caller, accounts: Accounts, chance: random.Random) -> None:
        self.asked: list[UpdateAsked] = []
        self._caller = caller
        self._accounts = accounts
        self._chance = chance

    async def one(self) -> None:
        """One change; half of them with a key, and then now and then asked again, at once or afterwards."""
        repeats = self._chance.choice((0, 0, 0, 1, 3)) if self._chance.random() < 0.5 else None
        asked = self._next(keyed=repeats is not None)
        await once_or_again(lambda: self._ask(asked), repeats or 0, self._chance)

    async def bulk(self) -> None:
        """Twenty in one request."""
        batch = [self._next(keyed=self._chance.random() < 0.5) for _ in range(_BULK)]
        body = {"updates": [asked.body() | {"idempotencyKey": asked.key} for asked in batch]}
        reply = await self._caller.ask("POST", "/api/balance/updates", body)
        for asked, one in zip(batch, each(reply, len(batch)), strict=True):
            asked.replies.append(one)

    def _next(self, keyed: bool) -> UpdateAsked:
        number = len(self.asked)
        amount = self._chance.choice((-300, -40, -7, -2, 1, 5, 40))
        key = f"key-{number}" if keyed else None
        asked = UpdateAsked(self._accounts.someone(), amount, key, f"request-{number}", [])
        self.asked.append(asked)
        return asked

    async def _ask(self, asked: UpdateAsked) -> None:
        asked.replies.append(await self._caller.ask("POST", "/api/balance/update", asked.body(), asked.key))


def each(reply: Reply, count: int) -> list[Reply]:
    """The answer to each part of a request in bulk; the same for all if there is none for each."""
    if reply.status != 200:
        return [reply if reply.status else NO_REPLY] * count
    return [Reply(one["status"], one, one.get("replayed", False)) for one in reply.body["results"]]


def judge_updates(asked: list[UpdateAsked], journal: Journal) -> list[str]:
    """What was answered about updates and is not so, a line each."""
    rows: dict[tuple[int, str | None], list[Row]] = defaultdict(list)
    for row in journal.rows:
        if row.hold_amount is None and row.payees is None and row.payer is None:
            rows[row.user_id, row.reference].append(row)
    wrong = []
    for one in asked:
        found = rows.pop((one.user_id, one.reference), [])
        if reason := _contradiction(one, found):
            wrong.append(f"{reason}: {one}, {found}")
    return wrong + [f"an update that nobody asked for: {row}" for row in rows.values()]


def _contradiction(asked: UpdateAsked, rows: list[Row]) -> str | None:
    statuses = {reply.status for reply in asked.replies}
    applied = [row for row in rows if row.version is not None]
    balances = {reply.body.get("newBalance") for reply in asked.replies if reply.status == 200}
    contradictions = {
        "an answer that may never be given": not statuses <= {0, 200, 400, 503, 504},
        "one change, several rows": len(rows) > 1,
        "another amount": any(row.amount != asked.amount for row in rows),
        "another key": asked.key is not None and any(row.key != asked.key for row in rows),
        "two outcomes": {200, 400} <= statuses,
        "answered 200 and not applied": 200 in statuses and not applied,
        "refused and applied": 400 in statuses and bool(applied),
        "a refusal that is not bound to its key": 400 in statuses and asked.key is not None and not rows,
        "answered 503 and applied": statuses == {503} and bool(applied),
        "another balance": bool(applied) and not balances <= {applied[0].balance},
        "a replay without a key": asked.key is None and any(reply.replayed for reply in asked.replies),
    }
    return next((text for text, holds in contradictions.items() if holds), None)
