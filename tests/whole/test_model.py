"""Random sequences of everything that an account can be asked, against a plain model in Python."""

import itertools
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.client import Client

pytestmark = pytest.mark.over_both_statements

LIMIT = 2**53 - 1
_users = itertools.count(1)

amounts = st.one_of(st.integers(-20, 20), st.sampled_from([-LIMIT, LIMIT, LIMIT - 3])).filter(bool)
updates = st.tuples(
    st.just("update"), amounts, st.sampled_from([None, "a", "b", "c"]), st.sampled_from([None, None, "order"])
)
minimums = st.tuples(st.just("minimum"), st.integers(-30, 10))
restarts = st.tuples(st.just("open again"))
ids = st.sampled_from(["a", "b", "h"])  # some are keys of updates too
holds = st.tuples(st.just("hold"), ids, st.integers(1, 12), st.sampled_from([None, None, "order"]))
captures = st.tuples(st.just("capture"), ids, st.none() | st.integers(1, 12))
releases = st.tuples(st.just("release"), ids)
steps = st.lists(
    st.one_of(updates, updates, updates, holds, holds, captures, releases, minimums, restarts), max_size=30
)
openings = st.tuples(st.integers(-5, 5), st.integers(0, 20)).map(lambda pair: (pair[0] + pair[1], pair[0]))


class Model:
    """What an account must answer, one request after the other."""

    def __init__(self, user_id: int, balance: int, minimum: int) -> None:
        self.user_id = user_id
        self.balance = balance
        self.minimum = minimum
        self.journal: list[dict[str, Any]] = []
        self.bound: dict[str, tuple[tuple[int, int, str | None], tuple[int, dict[str, Any]]]] = {}
        self.holds: dict[str, dict[str, Any]] = {}

    def held(self) -> int:
        return sum(hold["amount"] for hold in self.open_holds())

    def open_holds(self) -> list[dict[str, Any]]:
        return [hold for _, hold in sorted(self.holds.items()) if hold["status"] == "held"]

    def account(self) -> dict[str, Any]:
        return {
            "userId": self.user_id,
            "balance": self.balance,
            "held": self.held(),
            "available": self.balance - self.held() - self.minimum,
            "minimumBalance": self.minimum,
            "version": len(self.journal),
        }

    def update(self, amount: int, key: str | None, reference: str | None) -> tuple[int, dict[str, Any], bool]:
        if key in self.bound:
            change, outcome = self.bound[key]
            if change != (amount, 0, reference):
                return 422, {"error": "Idempotency-Key: already used for another change of this user"}, False
            return *outcome, True
        outcome = self.refusal(amount, 0) or self.applied(amount, 0, key, reference)
        if key is not None:
            self.bound[key] = (amount, 0, reference), outcome
        return *outcome, False

    def refusal(self, amount: int, hold_amount: int) -> tuple[int, dict[str, Any]] | None:
        if self.balance + amount - self.held() - hold_amount < self.minimum:
            return 400, {"error": "Insufficient funds"}
        if self.balance + amount > LIMIT:
            return 400, {"error": "Balance limit exceeded"}
        return None

    def applied(
        self, amount: int, hold_amount: int, key: str | None, reference: str | None
    ) -> tuple[int, dict[str, Any]]:
        self.balance += amount
        self.journal.append(
            {
                "version": len(self.journal) + 1,
                "amount": amount,
                "holdAmount": hold_amount,
                "balance": self.balance,
                "reference": reference,
                "idempotencyKey": key,
            }
        )
        return 200, {"userId": self.user_id, "newBalance": self.balance}

    def hold(self, hold_id: str, amount: int, reference: str | None) -> tuple[int, dict[str, Any], bool]:
        if hold_id in self.bound:
            change, outcome = self.bound[hold_id]
            if change != (0, amount, reference) and hold_id in self.holds:
                return 409, {"error": "Hold exists with another amount or reference"}, False
            if change != (0, amount, reference):
                error = "holdId: already used as the key of another change of this user"
                return 422, {"error": error}, False
            return (200, self.holds[hold_id], True) if hold_id in self.holds else (*outcome, True)
        outcome = self.refusal(0, amount) or (201, {})
        self.bound[hold_id] = (0, amount, reference), outcome
        if outcome[0] == 400:
            return *outcome, False
        self.applied(0, amount, hold_id, reference)
        placed = {"userId": self.user_id, "holdId": hold_id, "amount": amount, "reference": reference, "status": "held"}
        self.holds[hold_id] = placed
        return 201, placed, False

    def capture(self, hold_id: str, asked: int | None) -> tuple[int, dict[str, Any], bool]:
        hold = self.holds.get(hold_id)
        if hold is None:
            return 404, {"error": "Hold not found"}, False
        amount = asked or hold["amount"]
        if amount > hold["amount"]:
            return 400, {"error": f"amount: expected no more than is held, {hold['amount']}"}, False
        if hold["status"] == "released":
            return 409, {"error": "The hold was released"}, False
        if hold["status"] == "captured":
            if hold["captured"] == amount:
                return 200, hold, True
            return 409, {"error": "The hold was captured"}, False
        _, body = self.applied(-amount, -hold["amount"], None, None)
        captured = {"status": "captured", "captured": amount, "newBalance": body["newBalance"]}
        self.holds[hold_id] = {**hold, **captured}
        return 200, self.holds[hold_id], False

    def release(self, hold_id: str) -> tuple[int, dict[str, Any], bool]:
        hold = self.holds.get(hold_id)
        if hold is None:
            return 404, {"error": "Hold not found"}, False
        if hold["status"] == "captured":
            return 409, {"error": "The hold was captured"}, False
        if hold["status"] == "released":
            return 200, hold, True
        self.applied(0, -hold["amount"], None, None)
        self.holds[hold_id] = {**hold, "status": "released"}
        return 200, self.holds[hold_id], False

    def set_minimum(self, minimum: int) -> tuple[int, dict[str, Any]]:
        if self.balance - self.held() < minimum:
            return 409, {"error": "The balance is below this minimum"}
        self.minimum = minimum
        return 200, self.account()


@given(openings, steps)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_bodies_versions_and_journal_are_those_of_the_model(
    client: Client, database_url: str, opening: tuple[int, int], steps: list[tuple[Any, ...]]
) -> None:
    user_id = next(_users)
    path = f"/api/users/{user_id}"
    opened_with = {"balance": opening[0], "minimumBalance": opening[1]}
    model = Model(user_id, *opening)
    assert await ask(client, "PUT", path, opened_with) == (201, model.account(), False)
    for kind, *arguments in steps:
        if kind == "update":
            amount, key, reference = arguments
            body = {"userId": user_id, "amount": amount, "reference": reference}
            answered = await ask(client, "POST", "/api/balance/update", body, key)
            assert answered == model.update(amount, key, reference)
        elif kind == "hold":
            hold_id, amount, reference = arguments
            body = {"amount": amount, "reference": reference}
            answered = await ask(client, "PUT", f"{path}/holds/{hold_id}", body)
            assert without_times(answered) == model.hold(hold_id, amount, reference)
        elif kind == "capture":
            hold_id, amount = arguments
            answered = await ask(client, "POST", f"{path}/holds/{hold_id}/capture", {"amount": amount})
            assert without_times(answered) == model.capture(hold_id, amount)
        elif kind == "release":
            answered = await ask(client, "POST", f"{path}/holds/{arguments[0]}/release")
            assert without_times(answered) == model.release(arguments[0])
        elif kind == "minimum":
            status, body, _ = await ask(client, "PATCH", path, {"minimumBalance": arguments[0]})
            assert (status, body) == model.set_minimum(arguments[0])
        else:
            assert await ask(client, "PUT", path, opened_with) == (200, model.account(), False)
        assert await ask(client, "GET", path) == (200, model.account(), False)
    for hold_id, hold in model.holds.items():
        assert without_times(await ask(client, "GET", f"{path}/holds/{hold_id}")) == (200, hold, False)
    _, page, _ = await ask(client, "GET", f"{path}/holds")
    assert [without_times((200, hold, False))[1] for hold in page["holds"]] == model.open_holds()
    _, page, _ = await ask(client, "GET", f"{path}/changes?limit=1000")
    for entry in page["changes"]:
        del entry["createdAt"]
    assert page == {"changes": [*model.journal[::-1], opening_entry(opening[0])], "next": None}
    with psycopg.connect(database_url) as connection:
        refused = connection.execute(
            "SELECT idempotency_key FROM balance_changes WHERE user_id = %s AND version IS NULL", (user_id,)
        ).fetchall()
    assert {key for (key,) in refused} == {key for key, (_, outcome) in model.bound.items() if outcome[0] == 400}


def opening_entry(balance: int) -> dict[str, Any]:
    """What the journal shows of an opening."""
    entry = {"version": 0, "amount": balance, "holdAmount": 0, "balance": balance}
    return {**entry, "reference": None, "idempotencyKey": None}


def without_times(answer: tuple[int, dict[str, Any], bool]) -> tuple[int, dict[str, Any], bool]:
    """An answer without what only the clock knows."""
    status, body, replayed = answer
    return status, {name: value for name, value in body.items() if name != "expiresAt"}, replayed


async def ask(
    client: Client, method: str, path: str, body: Any = None, key: str | None = None
) -> tuple[int, dict[str, Any], bool]:
    """Status, body, and whether the answer is marked as replayed."""
    headers = {"Idempotency-Key": key} if key else {}
    async with client.request(method, path, json=body, headers=headers) as answer:
        return answer.status, await answer.json(), "Idempotent-Replayed" in answer.headers
