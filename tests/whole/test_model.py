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
steps = st.lists(st.one_of(updates, updates, updates, minimums, restarts), max_size=25)
openings = st.tuples(st.integers(-5, 5), st.integers(0, 20)).map(lambda pair: (pair[0] + pair[1], pair[0]))


class Model:
    """What an account must answer, one request after the other."""

    def __init__(self, user_id: int, balance: int, minimum: int) -> None:
        self.user_id = user_id
        self.balance = balance
        self.minimum = minimum
        self.journal: list[dict[str, Any]] = []
        self.bound: dict[str, tuple[tuple[int, str | None], tuple[int, dict[str, Any]]]] = {}

    def account(self) -> dict[str, Any]:
        return {
            "userId": self.user_id,
            "balance": self.balance,
            "held": 0,
            "available": self.balance - self.minimum,
            "minimumBalance": self.minimum,
            "version": len(self.journal),
        }

    def update(self, amount: int, key: str | None, reference: str | None) -> tuple[int, dict[str, Any], bool]:
        if key in self.bound:
            change, outcome = self.bound[key]
            if change != (amount, reference):
                return 422, {"error": "Idempotency-Key: already used for another change of this user"}, False
            return *outcome, True
        after = self.balance + amount
        if after < self.minimum:
            outcome = 400, {"error": "Insufficient funds"}
        elif after > LIMIT:
            outcome = 400, {"error": "Balance limit exceeded"}
        else:
            self.balance = after
            outcome = 200, {"userId": self.user_id, "newBalance": after}
            self.journal.append(
                {
                    "version": len(self.journal) + 1,
                    "amount": amount,
                    "balance": after,
                    "reference": reference,
                    "idempotencyKey": key,
                }
            )
        if key is not None:
            self.bound[key] = (amount, reference), outcome
        return *outcome, False

    def set_minimum(self, minimum: int) -> tuple[int, dict[str, Any]]:
        if self.balance < minimum:
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
        elif kind == "minimum":
            status, body, _ = await ask(client, "PATCH", path, {"minimumBalance": arguments[0]})
            assert (status, body) == model.set_minimum(arguments[0])
        else:
            assert await ask(client, "PUT", path, opened_with) == (200, model.account(), False)
        assert await ask(client, "GET", path) == (200, model.account(), False)
    _, page, _ = await ask(client, "GET", f"{path}/changes?limit=1000")
    for entry in page["changes"]:
        del entry["createdAt"]
    assert page == {"changes": model.journal[::-1], "next": None}
    with psycopg.connect(database_url) as connection:
        refused = connection.execute(
            "SELECT idempotency_key FROM balance_changes WHERE user_id = %s AND version IS NULL", (user_id,)
        ).fetchall()
    assert {key for (key,) in refused} == {key for key, (_, outcome) in model.bound.items() if outcome[0] == 400}


async def ask(
    client: Client, method: str, path: str, body: Any = None, key: str | None = None
) -> tuple[int, dict[str, Any], bool]:
    """Status, body, and whether the answer is marked as replayed."""
    headers = {"Idempotency-Key": key} if key else {}
    async with client.request(method, path, json=body, headers=headers) as answer:
        return answer.status, await answer.json(), "Idempotent-Replayed" in answer.headers
