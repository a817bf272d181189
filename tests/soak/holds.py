"""Holds that last for seconds: placed, captured (all, a part, to others), released, expired; and how each ended."""

import asyncio
import random
from collections import defaultdict
from typing import NamedTuple

from tests.soak.accounts import NOBODY, Accounts
from tests.soak.asking import Caller, Reply
from tests.soak.journal import SETTLEMENT, Journal, Row
from tests.soak.transfers import is_credit_of_a_hold, paid, to_pay

_LONG_SECONDS = 3_600
_SAID = {
    "The hold was captured": "captured",
    "The hold was released": "released",
    "The hold has expired": "expired",
}


class Ending(NamedTuple):
    """An attempt to end a hold: capture or release, the amounts of a capture to others by user id, and the answer."""

    how: str
    payees: dict[int, int]
    reply: Reply

    @property
    def said(self) -> str | None:
        """What the answer says has become of the hold."""
        found: str | None = self.reply.body.get("status") or _SAID.get(self.reply.body.get("error", ""))
        return found if self.reply.status in (200, 409) else None


class HoldAsked(NamedTuple):
    """A hold that was asked for, then to be ended in one way or another, or left to expire; and the answers."""

    user_id: int
    amount: int
    hold_id: str
    placings: list[Reply]
    endings: list[Ending]


class Holds:
    """Asks for holds and their ends. `asked`: all of them, with the answers."""

    def __init__(self, caller: Caller, accounts: Accounts, chance: random.Random) -> None:
        self.asked: list[HoldAsked] = []
        self._caller = caller
        self._accounts = accounts
        self._chance = chance

    async def one(self) -> None:
        """Place a hold, which lasts for a second or two now and then, and end it, once or several times at once."""
        amount = self._chance.choice((2, 7, 40))
        asked = HoldAsked(self._accounts.someone(), amount, f"hold-{len(self.asked)}", [], [])
        self.asked.append(asked)
        lasting = self._chance.choice((1, 1, 2, _LONG_SECONDS))
        body = {"amount": amount, "expiresInSeconds": lasting}
        path = f"/api/users/{asked.user_id}/holds/{asked.hold_id}"
        for _ in range(self._chance.choice((1, 1, 2))):
            asked.placings.append(await self._caller.ask("PUT", path, body))
        if lasting < _LONG_SECONDS and self._chance.random() < 0.6:
            await asyncio.sleep(self._chance.uniform(0, 1.5 * lasting))
        hows = self._chance.choices(("capture", "release"), k=self._chance.choice((0, 1, 1, 3)))
        await asyncio.gather(*(self._end(asked, path, how) for how in hows))

    async def _end(self, asked: HoldAsked, path: str, how: str) -> None:
        body: dict[str, object] = {}
        payees: dict[int, int] = {}
        kind = self._chance.random() if how == "capture" else 1
        if kind < 0.3:
            body = {"amount": 1}
        elif kind < 0.6:
            some = self._accounts.payees(asked.user_id, self._chance.choice((1, 1, 2)))
            payees = {user_id: self._chance.choice((1, asked.amount // 2)) for user_id in some}
            body = {"to": to_pay(payees)}
        reply = await self._caller.ask("POST", f"{path}/{how}", body)
        asked.endings.append(Ending(how, payees, reply))


class _Found(NamedTuple):
    """What the journal has of a hold: the row of its placing, that of its settlement, and whom that paid."""

    placed: Row | None
    settled: Row | None
    credits: list[Row]

    @property
    def end(self) -> str | None:
        """What became of it; None: it is still held."""
        if self.settled is None:
            return None
        if self.settled.amount < 0:
            return "captured"
        return "expired" if self.settled.expires_at else "released"


def judge_holds(asked: list[HoldAsked], journal: Journal) -> list[str]:
    """What was answered about holds and is not so, a line each."""
    placed: dict[tuple[int, str], Row] = {}
    settled: dict[tuple[int, str], Row] = {}
    credited: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in journal.rows:
        if row.payer is not None and is_credit_of_a_hold(row):
            credited[row.payer, row.key.removeprefix(f" {row.payer} {SETTLEMENT}")].append(row)
        elif row.hold_amount is not None:
            rows = placed if row.hold_amount > 0 else settled
            rows[row.user_id, row.key.removeprefix(SETTLEMENT)] = row
    wrong = [f"{journal.overdue} holds have expired and are still open"] if journal.overdue else []
    for one in asked:
        name = one.user_id, one.hold_id
        found = _Found(placed.pop(name, None), settled.pop(name, None), credited.pop(name, []))
        if reason := _contradiction(one, found):
            wrong.append(f"{reason}: {one}, {found}")
    unasked = [*placed.values(), *settled.values(), *credited.values()]
    return wrong + [f"a hold or an end that nobody asked for: {row}" for row in unasked]


def _contradiction(asked: HoldAsked, found: _Found) -> str | None:
    placings = {reply.status for reply in asked.placings}
    held = found.placed is not None and found.placed.version is not None
    said = {ending.said for ending in asked.endings} - {None}
    may_have_ended = {ending.how for ending in asked.endings if ending.reply.status in (0, 200, 504)}
    contradictions = {
        "an answer that may never be given": not placings <= {0, 200, 201, 400, 503, 504}
        or any(not _may_be(ending) for ending in asked.endings),
        "another amount": found.placed is not None and found.placed.hold_amount != asked.amount,
        "answered as placed and not placed": bool(placings & {200, 201}) and not held,
        "two ends of its time": len({r.body.get("expiresAt") for r in asked.placings if r.status in (200, 201)}) > 1,
        "refused and placed": 400 in placings and (found.placed is None or held),
        "answered 503 and placed": placings == {503} and found.placed is not None,
        "ended and never placed": (bool(said) or found.settled is not None) and not held,
        "another end": bool(said) and not said <= {found.end},
        "an end that nobody asked for": found.end in ("captured", "released")
        and {"captured": "capture", "released": "release"}[found.end] not in may_have_ended,
        "not found and placed": bool(placings & {200, 201})
        and any(ending.reply.told() == "404 Hold not found" for ending in asked.endings),
        "released more or less than was held": found.settled is not None and found.settled.hold_amount != -asked.amount,
    }
    return next((text for text, holds in contradictions.items() if holds), None) or _contradiction_of_capture(
        asked, found
    )


def _may_be(ending: Ending) -> bool:
    """Whether this may be answered at all."""
    to_others = bool(ending.payees)
    wants_nobody = NOBODY in ending.payees
    allowed = {0, 200, 404, 409, 503, 504} - ({200} if wants_nobody else set()) | ({400} if to_others else set())
    return ending.reply.status in allowed


def _contradiction_of_capture(asked: HoldAsked, found: _Found) -> str | None:
    captured = -found.settled.amount if found.settled else 0
    payees = found.settled.payees or [] if found.settled else []
    owed = dict(zip(payees[::2], payees[1::2], strict=True))
    answered = [ending for ending in asked.endings if ending.how == "capture" and ending.reply.status == 200]
    told = {row.user_id: row.balance for row in ([found.settled] if found.settled else []) + found.credits}
    contradictions = {
        "another sum": any(ending.reply.body.get("captured") != captured for ending in answered),
        "other payees": any(ending.payees != owed for ending in answered),
        "not exactly its credits": {row.user_id: row.amount for row in found.credits} != owed
        or len(found.credits) != len(owed),
        "captured to whom nobody named": bool(owed) and owed not in [ending.payees for ending in asked.endings],
        "other balances": any(paid(ending.reply.body, asked.user_id) not in (None, told) for ending in answered)
        or any(ending.reply.body.get("newBalance") != told.get(asked.user_id) for ending in answered),
        "more than is held": captured > asked.amount,
    }
    return next((text for text, holds in contradictions.items() if holds), None)
