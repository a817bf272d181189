"""The transfers of the soak test: who is asked to pay whom, what is answered, and what the journal says of it."""

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import Collection
from typing import Any, NamedTuple

import aiohttp
import psycopg

BUSY = (1, 2, 3)
"""Users who pay and are paid more often than others; their rows are blocked now and then."""
NOBODY = 1_000
"""A user who is never opened."""


class TransferAnswer(NamedTuple):
    """One answer to a transfer; status 0: none came. `balances`: what it said of payer and payees, by user id."""

    status: int
    balances: dict[int, int] | None
    replayed: bool


class TransferAsked(NamedTuple):
    """A transfer that was asked for, once or with its key several times, and the answers.

    `payees`: amounts by user id. `all_exist`: whether all of its users were known to exist before it was first asked.
    """

    payer: int
    payees: dict[int, int]
    key: str | None
    reference: str
    all_exist: bool
    answers: list[TransferAnswer]

    def body(self) -> dict[str, Any]:
        """The request, without its key."""
        to = [{"userId": user_id, "amount": amount} for user_id, amount in self.payees.items()]
        return {"fromUserId": self.payer, "to": to, "reference": self.reference}


class Leg(NamedTuple):
    """A row of the journal: the payer's, or a payee's, who has a `payer`."""

    user_id: int
    version: int | None
    amount: int
    balance: int
    payees: list[int] | None
    payer: int | None


class TransferLoad:
    """Asks for transfers, and notes what it is told. `opened`: the users who are known to exist."""

    def __init__(self, urls: list[str], chance: random.Random, opened: Collection[int], users: Collection[int]) -> None:
        self.asked: list[TransferAsked] = []
        self._urls = urls
        self._chance = chance
        self._opened = opened
        self._payees = [*users, NOBODY]

    async def one(self, client: aiohttp.ClientSession) -> None:
        """One transfer, mostly with a key; then now and then asked again, at once or afterwards."""
        repeats = self._chance.choice((None, 0, 0, 1, 3))
        asked = self._next(keyed=repeats is not None)
        if repeats and self._chance.random() < 0.5:
            await asyncio.gather(*(self._ask(client, asked) for _ in range(1 + repeats)))
        else:
            for _ in range(1 + (repeats or 0)):
                await self._ask(client, asked)

    async def bulk(self, client: aiohttp.ClientSession) -> None:
        """Twenty in one request."""
        batch = [self._next(keyed=self._chance.random() < 0.5) for _ in range(20)]
        body = {"transfers": [asked.body() | {"idempotencyKey": asked.key} for asked in batch]}
        answers = [TransferAnswer(0, None, False)] * len(batch)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with client.post(f"{self._url()}/api/balance/transfers", json=body) as reply:
                assert reply.status == 200, (reply.status, await reply.text())
                answers = [
                    TransferAnswer(one["status"], _balances(one), one.get("replayed", False))
                    for one in (await reply.json())["results"]
                ]
        for asked, answer in zip(batch, answers, strict=True):
            asked.answers.append(answer)

    def _next(self, keyed: bool) -> TransferAsked:
        opened = sorted(self._opened)
        payer = self._chance.choice(opened if self._chance.random() < 0.6 else BUSY)
        kind = self._chance.random()
        known = opened if kind < 0.5 else BUSY if kind < 0.9 else self._payees
        others = [user_id for user_id in known if user_id != payer]
        payees = self._chance.sample(others, min(len(others), self._chance.choice((1, 1, 1, 2, 5))))
        number = len(self.asked)
        asked = TransferAsked(
            payer,
            {user_id: self._chance.choice((1, 2, 7, 40, 300)) for user_id in payees},
            f"transfer-{number}" if keyed else None,
            f"transfer-{number}",
            {*payees} <= {*self._opened},
            [],
        )
        self.asked.append(asked)
        return asked

    async def _ask(self, client: aiohttp.ClientSession, asked: TransferAsked) -> None:
        headers = {"Idempotency-Key": asked.key} if asked.key else {}
        answer = TransferAnswer(0, None, False)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            url = f"{self._url()}/api/balance/transfer"
            async with client.post(url, json=asked.body(), headers=headers) as reply:
                found = await reply.json()
                answer = TransferAnswer(reply.status, _balances(found), "Idempotent-Replayed" in reply.headers)
        asked.answers.append(answer)

    def _url(self) -> str:
        return self._chance.choice(self._urls)


def _balances(answer: dict[str, Any]) -> dict[int, int] | None:
    """What an answer says of payer and payees; None if the transfer was not applied."""
    if "to" not in answer:
        return None
    return {answer["fromUserId"]: answer["newBalance"]} | {one["userId"]: one["newBalance"] for one in answer["to"]}


def transfers_against_the_journal(asked: list[TransferAsked], url: str) -> list[str]:
    """What was answered about transfers and is not so on either side, a line each."""
    legs: dict[str, list[Leg]] = defaultdict(list)
    with psycopg.connect(url) as connection:
        for reference, *row in connection.execute(
            "SELECT reference, user_id, version, amount, balance, payees, payer FROM balance_changes"
            " WHERE hold_amount IS NULL AND (payees IS NOT NULL OR payer IS NOT NULL)"
        ):
            legs[reference].append(Leg(*row))
    wrong = []
    for one in asked:
        found = legs.pop(one.reference, [])
        if reason := _contradiction(one, found):
            wrong.append(f"{reason}: {one}, {found}")
    return wrong + [f"a transfer that nobody asked for: {rows}" for rows in legs.values()]


def _contradiction(asked: TransferAsked, legs: list[Leg]) -> str | None:
    statuses = {answer.status for answer in asked.answers}
    own = [leg for leg in legs if leg.payer is None]
    credits_by_user = {leg.user_id: leg for leg in legs if leg.payer is not None}
    applied = any(leg.version is not None for leg in own)
    payees = [part for pair in sorted(asked.payees.items()) for part in pair]
    told = {leg.user_id: leg.balance for leg in legs}
    contradictions = {
        "an answer that may never be given": not statuses <= {0, 200, 400, 404, 503, 504},
        "one transfer, several rows": len(own) > 1 or len(legs) > len(own) + len(credits_by_user),
        "another transfer": any(
            (leg.user_id, leg.amount, leg.payees) != (asked.payer, -sum(asked.payees.values()), payees) for leg in own
        ),
        "not exactly its credits": {user_id: leg.amount for user_id, leg in credits_by_user.items()}
        != (asked.payees if applied else {}),
        "a credit by another": any(leg.payer != asked.payer for leg in credits_by_user.values()),
        "two outcomes": {200, 400} <= statuses,
        "answered 200 and not applied": 200 in statuses and not applied,
        "refused and applied": 400 in statuses and applied,
        "a refusal that is not bound to its key": 400 in statuses and asked.key is not None and not own,
        "answered that nothing was changed, and it was": statuses <= {404, 503} and bool(legs),
        "not found though all exist": 404 in statuses and asked.all_exist,
        "applied to nobody": NOBODY in asked.payees and (200 in statuses or applied),
        "other balances": any(answer.balances not in (None, told) for answer in asked.answers),
        "a replay without a key": asked.key is None and any(answer.replayed for answer in asked.answers),
    }
    return next((text for text, holds in contradictions.items() if holds), None)
