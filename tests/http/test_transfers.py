"""The contract of transfers, and of captures that pay others: each answer as a caller gets it."""

import json
from typing import Any

import pytest

from atomic_balance.postgres.verify import verify
from tests.client import Client, opened
from tests.database import Database
from tests.http.test_holds import HOLD, account, ask, placed

pytestmark = pytest.mark.on_a_cluster

LIMIT = 2**53 - 1
TRANSFER = "/api/balance/transfer"
TRANSFERS = "/api/balance/transfers"
PAYEES = (
    "to: expected an array of 1 to 100 payees, each user once and none of them the payer,"
    f" who get {LIMIT} at most in all"
)
FUNDS = {"error": "Insufficient funds"}
FULL = {"error": "Balance limit exceeded"}
NO_USER = {"error": "User not found"}
KEY_REUSED = {"error": "Idempotency-Key: already used for another change of this user"}


def paying(*to: tuple[int, int], payer: int = 1, **more: Any) -> dict[str, Any]:
    """A transfer's body."""
    return {"fromUserId": payer, "to": [{"userId": user_id, "amount": amount} for user_id, amount in to], **more}


def paid(balance: int, *to: tuple[int, int], payer: int = 1) -> dict[str, Any]:
    """The answer to one that was applied."""
    return {
        "fromUserId": payer,
        "newBalance": balance,
        "to": [{"userId": user_id, "newBalance": balance} for user_id, balance in to],
    }


@pytest.fixture(autouse=True)
async def accounts(client: Client) -> None:
    for user_id, balance in ((1, 1_000), (2, 0), (3, 5)):
        await opened(client, balance, user_id)


async def test_a_transfer_pays_everybody_and_says_so_again(client: Client, database: Database) -> None:
    asked = paying((3, 50), (2, 450), reference="order 1")
    expected = paid(500, (3, 55), (2, 450))
    assert await ask(client, "POST", TRANSFER, asked, key="k") == (200, expected, False)
    assert (await ask(client, "POST", TRANSFER, paying((2, 1))))[:2] == (200, paid(499, (2, 451)))
    assert await ask(client, "POST", TRANSFER, asked, key="k") == (200, expected, True)
    in_another_order = paying((2, 450), (3, 50), reference="order 1")
    assert await ask(client, "POST", TRANSFER, in_another_order, key="k") == (200, paid(500, (2, 450), (3, 55)), True)
    assert [await account(client, user_id) for user_id in (1, 2, 3)] == [
        (499, 0, 499, 2),
        (451, 0, 451, 2),
        (55, 0, 55, 1),
    ]
    assert verify(database.url).differences == []


async def test_the_same_key_with_anything_else_is_422(client: Client) -> None:
    await ask(client, "POST", TRANSFER, paying((2, 4), (3, 5), reference="r"), key="k")
    others = [
        paying((2, 5), (3, 4), reference="r"),
        paying((2, 9), reference="r"),
        paying((2, 4), (3, 5)),
        paying((2, 4), (3, 5), reference="s"),
    ]
    for other in others:
        assert await ask(client, "POST", TRANSFER, other, key="k") == (422, KEY_REUSED, False)
    update = {"userId": 1, "amount": -9, "reference": "r"}
    assert await ask(client, "POST", "/api/balance/update", update, key="k") == (422, KEY_REUSED, False)
    assert await ask(client, "POST", "/api/balance/update", update, key="l") == (
        200,
        {"userId": 1, "newBalance": 982},
        False,
    )
    assert await ask(client, "POST", TRANSFER, paying((2, 9), reference="r"), key="l") == (422, KEY_REUSED, False)
    assert await account(client) == (982, 0, 982, 2)


async def test_a_payer_without_the_money_pays_nobody_and_that_is_bound(client: Client) -> None:
    asked = paying((2, 600), (3, 401))
    assert await ask(client, "POST", TRANSFER, asked, key="k") == (400, FUNDS, False)
    await ask(client, "POST", "/api/balance/update", {"userId": 1, "amount": 1})
    assert await ask(client, "POST", TRANSFER, asked, key="k") == (400, FUNDS, True)
    assert await ask(client, "POST", TRANSFER, paying((2, 1_001)), key="k") == (422, KEY_REUSED, False)
    assert (await account(client, 2))[3] == 0
    assert await ask(client, "POST", TRANSFER, asked, key="l") == (200, paid(0, (2, 600), (3, 406)), False)


async def test_a_payee_that_is_full_is_paid_nothing_and_that_is_bound(client: Client) -> None:
    await opened(client, LIMIT - 1, 4)
    asked = paying((2, 10), (4, 2))
    assert await ask(client, "POST", TRANSFER, asked, key="k") == (400, FULL, False)
    await ask(client, "POST", "/api/balance/update", {"userId": 4, "amount": -5})
    assert await ask(client, "POST", TRANSFER, asked, key="k") == (400, FULL, True)
    assert await ask(client, "POST", TRANSFER, asked, key="l") == (200, paid(988, (2, 10), (4, LIMIT - 4)), False)


async def test_users_that_do_not_exist_are_404_and_bind_nothing(client: Client) -> None:
    asked = paying((2, 10), (9, 2))
    assert await ask(client, "POST", TRANSFER, asked, key="k") == (404, NO_USER, False)
    headers = {"Accept": "application/problem+json", "Idempotency-Key": "k"}
    async with client.post(TRANSFER, json=asked, headers=headers) as answer:
        assert (answer.status, (await answer.json())["userId"]) == (404, 9)
    async with client.post(TRANSFER, json=paying((2, 1), payer=8), headers=headers) as answer:
        problem = await answer.json()
        assert (answer.status, problem["detail"], "userId" in problem) == (404, "User not found", False)
    await opened(client, 0, 9)
    assert await ask(client, "POST", TRANSFER, asked, key="k") == (200, paid(988, (2, 10), (9, 2)), False)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, f"fromUserId: expected an integer from 1 to {LIMIT}"),
        ({"fromUserId": 1}, PAYEES),
        (paying(), PAYEES),
        (paying(*((user_id, 1) for user_id in range(2, 103))), PAYEES),
        (paying((2, 1), (2, 2)), PAYEES),
        (paying((2, 1), (1, 1)), PAYEES),
        (paying((2, LIMIT), (3, 1)), PAYEES),
        ({"fromUserId": 1, "to": {"userId": 2, "amount": 1}}, PAYEES),
        ({"fromUserId": 1, "to": [5]}, "to[0]: expected a JSON object"),
        (paying((2, 1), (3, 0)), f"to[1].amount: expected an integer from 1 to {LIMIT}"),
        (paying((2, -1)), f"to[0].amount: expected an integer from 1 to {LIMIT}"),
        (paying((2, LIMIT + 1)), f"to[0].amount: expected an integer from 1 to {LIMIT}"),
        (paying((0, 1)), f"to[0].userId: expected an integer from 1 to {LIMIT}"),
        ({"fromUserId": 1, "to": [{"userId": 2}]}, f"to[0].amount: expected an integer from 1 to {LIMIT}"),
        ({"fromUserId": 1, "to": [{"userId": 2, "amount": 1, "x": 1}]}, "to[0].x: expected no such member"),
        (paying((2, 1), currency="EUR"), "currency: expected no such member"),
        (paying((2, 1), reference=5), "reference: expected a string of up to 255 characters without NUL, or null"),
        (paying((2, 1), idempotencyKey="k"), "idempotencyKey: expected no such member"),
    ],
)
async def test_bad_input_names_the_member_and_pays_nobody(client: Client, body: Any, error: str) -> None:
    assert await ask(client, "POST", TRANSFER, body) == (400, {"error": error}, False)
    in_bulk = error
    if not error.startswith("idempotencyKey"):
        in_bulk = f"transfers[1].{error}"
        bulk = {"transfers": [paying((2, 1)), body]}
        assert await ask(client, "POST", TRANSFERS, bulk) == (400, {"error": in_bulk}, False)
    assert await account(client) == (1_000, 0, 1_000, 0)


async def test_in_bulk_each_stands_for_itself(client: Client) -> None:
    bulk = {
        "transfers": [
            paying((2, 100), idempotencyKey="k"),
            paying((2, 5_000), idempotencyKey="l"),
            paying((9, 1)),
            paying((2, 1), payer=8),
            paying((2, 100), idempotencyKey="k"),
            paying((1, 1), (3, 1), payer=2),
        ]
    }
    expected = [
        {"status": 200, **paid(900, (2, 100))},
        {"status": 400, **FUNDS},
        {"status": 404, **NO_USER, "userId": 9},
        {"status": 404, **NO_USER},
        {"status": 200, **paid(900, (2, 100)), "replayed": True},
    ]
    status, body, _ = await ask(client, "POST", TRANSFERS, bulk)
    assert status == 200
    assert body["results"][:5] == expected
    assert body["results"][5]["status"] in (200, 400)  # it came before its money or after it


@pytest.mark.parametrize(
    "transfers",
    [
        [],
        [paying((2, 1))] * 1_001,
        [paying(*((user_id, 1) for user_id in range(2, 102)))] * 10 + [paying((2, 1))],
    ],
)
async def test_a_bulk_request_has_its_limits(client: Client, transfers: list[Any]) -> None:
    error = "transfers: expected an array of 1 to 1000 transfers, 1000 payees at most in all"
    assert await ask(client, "POST", TRANSFERS, {"transfers": transfers}) == (400, {"error": error}, False)


async def test_a_hundred_payees_and_a_thousand_in_bulk(client: Client, database: Database) -> None:
    database.open(dict.fromkeys(range(100, 200), 0))
    many = paying(*((user_id, 1) for user_id in range(100, 200)))
    status, body, _ = await ask(client, "POST", TRANSFER, many)
    assert (status, body["newBalance"], body["to"]) == (
        200,
        900,
        [{"userId": user_id, "newBalance": 1} for user_id in range(100, 200)],
    )
    status, body, _ = await ask(client, "POST", TRANSFERS, {"transfers": [many] * 10})
    assert [result["status"] for result in body["results"]] == [200] * 9 + [400]
    assert verify(database.url).differences == []


async def test_both_journals_show_a_transfer(client: Client) -> None:
    await ask(client, "POST", TRANSFER, paying((3, 4), (2, 6), reference="r"), key="k")
    await ask(client, "POST", TRANSFER, paying((2, 1)))
    await ask(client, "POST", "/api/balance/update", {"userId": 1, "amount": -1})

    async def journal(user_id: int) -> list[dict[str, Any]]:
        _, body, _ = await ask(client, "GET", f"/api/users/{user_id}/changes")
        changes = [entry for entry in body["changes"] if entry["version"]]
        return [{name: value for name, value in entry.items() if name != "createdAt"} for entry in changes]

    of_both = {"holdAmount": 0, "reference": "r"}
    alone = {"holdAmount": 0, "reference": None, "idempotencyKey": None}
    assert await journal(1) == [
        {"version": 3, "amount": -1, "balance": 988, **alone},
        {
            "version": 2,
            "amount": -1,
            "balance": 989,
            **alone,
            "counterpartyId": 2,
            "to": [{"userId": 2, "amount": 1}],
        },
        {
            "version": 1,
            "amount": -10,
            "balance": 990,
            **of_both,
            "idempotencyKey": "k",
            "counterpartyId": None,
            "to": [{"userId": 2, "amount": 6}, {"userId": 3, "amount": 4}],
        },
    ]
    assert await journal(2) == [
        {"version": 2, "amount": 1, "balance": 7, **alone, "counterpartyId": 1, "transferKey": None},
        {
            "version": 1,
            "amount": 6,
            "balance": 6,
            **of_both,
            "idempotencyKey": None,
            "counterpartyId": 1,
            "transferKey": "k",
        },
    ]


@pytest.mark.parametrize(
    ("amount", "outcome"), [(6, {"status": 200, "version": 1, "newBalance": 994}), (6_000, {"status": 400, **FUNDS})]
)
async def test_the_outcome_of_a_transfer_can_be_read_by_its_key(
    client: Client, amount: int, outcome: dict[str, Any]
) -> None:
    await ask(client, "POST", TRANSFER, paying((2, amount)), key="k")
    status, body, _ = await ask(client, "GET", "/api/users/1/changes/k")
    del body["createdAt"]
    to = [{"userId": 2, "amount": amount}]
    assert (status, body) == (
        200,
        {"userId": 1, "idempotencyKey": "k", "amount": -amount, "reference": None, "to": to, **outcome},
    )


async def test_a_hold_is_captured_to_others_once(client: Client, database: Database) -> None:
    hold = await placed(client, 500)
    body = {"to": [{"userId": 3, "amount": 50}, {"userId": 2, "amount": 400}]}
    to = [{"userId": 3, "newBalance": 55}, {"userId": 2, "newBalance": 400}]
    captured = {**hold, "status": "captured", "captured": 450, "newBalance": 550, "to": to}
    assert await ask(client, "POST", f"{HOLD}/capture", body) == (200, captured, False)
    assert await account(client) == (550, 0, 550, 2)
    await ask(client, "POST", TRANSFER, paying((2, 1)))
    assert await ask(client, "POST", f"{HOLD}/capture", body) == (200, captured, True)
    otherwise = [
        {"amount": 450},
        {"to": [{"userId": 2, "amount": 450}]},
        {"to": [{"userId": 2, "amount": 50}, {"userId": 3, "amount": 400}]},
    ]
    for other in otherwise:
        expected = 409, {"error": "The hold was captured"}, False
        assert await ask(client, "POST", f"{HOLD}/capture", other) == expected
    assert verify(database.url).differences == []


async def test_a_capture_that_cannot_be_paid_leaves_the_hold_open(client: Client) -> None:
    await opened(client, LIMIT - 1, 4)
    await placed(client, 500)
    cases: list[tuple[dict[str, Any], int, dict[str, str]]] = [
        ({"to": [{"userId": 2, "amount": 1}, {"userId": 9, "amount": 1}]}, 404, NO_USER),
        ({"to": [{"userId": 2, "amount": 1}, {"userId": 4, "amount": 2}]}, 400, FULL),
        ({"to": [{"userId": 2, "amount": 501}]}, 400, {"error": "to: expected no more in all than is held, 500"}),
        ({"to": [{"userId": 2, "amount": 1}] * 2}, 400, {"error": PAYEES}),
        ({"to": [{"userId": 1, "amount": 1}]}, 400, {"error": PAYEES}),
        ({"to": []}, 400, {"error": PAYEES}),
        (
            {"to": [{"userId": 2, "amount": 1}], "amount": 1},
            400,
            {"error": "amount: expected none beside to, whose amounts are captured"},
        ),
    ]
    for body, status, error in cases:
        for _ in range(2):
            assert await ask(client, "POST", f"{HOLD}/capture", body) == (status, error, False), body
    assert await account(client) == (1_000, 500, 500, 1)
    status, body, _ = await ask(client, "POST", f"{HOLD}/capture", {"to": [{"userId": 2, "amount": 500}]})
    assert (status, body["to"]) == (200, [{"userId": 2, "newBalance": 500}])


async def test_the_longest_body_fits(client: Client) -> None:
    """A hundred payees, the longest reference, and every character of names and texts escaped."""
    many = paying(*((LIMIT - number, 1) for number in range(100)), reference="\U0001f600" * 255)
    escaped = json.dumps(many)
    for name in ("fromUserId", "to", "userId", "amount", "reference"):
        escaped = escaped.replace(f'"{name}"', '"' + "".join(f"\\u{ord(one):04x}" for one in name) + '"')
    assert (await ask(client, "POST", TRANSFER, escaped.encode()))[:2] == (404, NO_USER)
