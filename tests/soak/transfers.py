"""Transfers: to one, to many, to nobody, to who is full; and what the journal says of them on both sides."""

import random
from collections import defaultdict
from typing import Any, NamedTuple

from tests.soak.accounts import BUSY, NOBODY, Accounts
from tests.soak.asking import Caller, Reply, once_or_again
from tests.soak.journal import SETTLEMENT, Journal, Row
from tests.soak.updates import each

_BULK = 20


class TransferAsked(NamedTuple):
    """A transfer that was asked for, once or with its key several times, and the answers.

    `payees`: amounts by user id. `all_exist`: whether all of its users were known to exist before it was first asked.
    """

    payer: int
    payees: dict[int, int]
    key: str | None
    reference: str
    all_exist: bool
    replies: list[Reply]

    def body(self) -> dict[str, object]:
        """The request, without its key."""
        return {"fromUserId": self.payer, "to": to_pay(self.payees), "reference": self.reference}


class Transfers:
    """Asks for transfers. `asked`: all of them, with the answers."""

    def __init__(self, caller: Caller, accounts: Accounts, chance: random.Random) -> None:
        self.asked: list[TransferAsked] = []
        self._caller = caller
        self._accounts = accounts
        self._chance = chance

    async def one(self) -> None:
        """One transfer, mostly with a key; then now and then asked again, at once or afterwards."""
        repeats = self._chance.choice((None, 0, 0, 1, 3))
        asked = self._next(keyed=repeats is not None)
        await once_or_again(lambda: self._ask(asked), repeats or 0, self._chance)

    async def bulk(self) -> None:
        """Twenty in one request."""
        batch = [self._next(keyed=self._chance.random() < 0.5) for _ in range(_BULK)]
        body = {"transfers": [asked.body() | {"idempotencyKey": asked.key} for asked in batch]}
        reply = await self._caller.ask("POST", "/api/balance/transfers", body)
        for asked, one in zip(batch, each(reply, len(batch)), strict=True):
            asked.replies.append(one)

    def _next(self, keyed: bool) -> TransferAsked:
        opened = self._accounts.opened
        payer = self._accounts.someone() if self._chance.random() < 0.6 else self._chance.choice(BUSY)
        payees = self._accounts.payees(payer, self._chance.choice((1, 1, 1, 2, 5)))
        number = len(self.asked)
        asked = TransferAsked(
            payer,
            {user_id: self._chance.choice((1, 2, 7, 40, 300)) for user_id in payees},
            f"transfer-{number}" if keyed else None,
            f"transfer-{number}",
            {*payees} <= opened,
            [],
        )
        self.asked.append(asked)
        return asked

    async def _ask(self, asked: TransferAsked) -> None:
        asked.replies.append(await self._caller.ask("POST", "/api/balance/transfer", asked.body(), asked.key))


def to_pay(payees: dict[int, int]) -> list[dict[str, int]]:
    """Amounts by user id as a request has them."""
    return [{"userId": user_id, "amount": amount} for user_id, amount in payees.items()]


def paid(body: dict[str, Any], payer: int) -> dict[int, int] | None:
    """The balances that an answer says payer and payees have, by user id; None if it says that nobody was paid."""
    if "to" not in body:
        return None
    return {payer: body["newBalance"]} | {one["userId"]: one["newBalance"] for one in body["to"]}


def judge_transfers(asked: list[TransferAsked], journal: Journal) -> list[str]:
    """What was answered about transfers and is not so on either side, a line each."""
    legs: dict[str | None, list[Row]] = defaultdict(list)
    for row in journal.rows:
        if row.hold_amount is None and not is_credit_of_a_hold(row) and (row.payees or row.payer is not None):
            legs[row.reference].append(row)
    wrong = []
    for one in asked:
        found = legs.pop(one.reference, [])
        if reason := _contradiction(one, found):
            wrong.append(f"{reason}: {one}, {found}")
    return wrong + [f"a transfer that nobody asked for: {rows}" for rows in legs.values()]


def is_credit_of_a_hold(row: Row) -> bool:
    """Whether this pays somebody what a hold was captured to them."""
    return row.payer is not None and row.key.startswith(f" {row.payer} {SETTLEMENT}")


def _contradiction(asked: TransferAsked, legs: list[Row]) -> str | None:
    statuses = {reply.status for reply in asked.replies}
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
        "another key": asked.key is not None and any(leg.key != asked.key for leg in own),
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
        "other balances": any(paid(reply.body, asked.payer) not in (None, told) for reply in asked.replies),
        "a replay without a key": asked.key is None and any(reply.replayed for reply in asked.replies),
    }
    return next((text for text, holds in contradictions.items() if holds), None)
