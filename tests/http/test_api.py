"""The HTTP contract: exact bodies and statuses, and every row of the table of bad input."""

import asyncio
import io
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from aiohttp import web
from pytest_aiohttp import AiohttpClient

from atomic_balance.http.app import make_app
from atomic_balance.http.messages import AccountOpening, AccountPatch, BalanceUpdate, BalanceUpdates, Body
from atomic_balance.observe.logs import JsonLines
from atomic_balance.settings import Settings
from tests.client import Client, opened

LIMIT = 2**53 - 1
AMOUNT = f"an integer other than 0, from -{LIMIT} to {LIMIT}"
USER_ID = f"an integer from 1 to {LIMIT}"
JSON = {"Content-Type": "application/json"}


async def ask(client: Client, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """Send `body` as JSON, or as it is if it is bytes; the status and the body of the answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    async with client.request(method, path, data=None if body is None else data, headers=kind | headers) as answer:
        return answer.status, await answer.text()


async def update(client: Client, body: Any) -> tuple[int, str]:
    return await ask(client, "POST", "/api/balance/update", body)


def account(user_id: int, balance: int, version: int = 0) -> str:
    held = f'"held":0,"available":{balance}'
    return f'{{"userId":{user_id},"balance":{balance},{held},"minimumBalance":0,"version":{version}}}'


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_an_update_answers_the_new_balance(client: Client) -> None:
    await opened(client, 10_000)
    assert await update(client, {"userId": 1, "amount": -2}) == (200, '{"userId":1,"newBalance":9998}')
    assert await update(client, {"userId": 1, "amount": 100}) == (200, '{"userId":1,"newBalance":10098}')
    assert await ask(client, "GET", "/api/users/1") == (
        200,
        '{"userId":1,"balance":10098,"held":0,"available":10098,"minimumBalance":0,"version":2}',
    )


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_a_withdrawal_beyond_the_balance_is_refused_and_changes_nothing(client: Client) -> None:
    await opened(client, 10)
    assert await update(client, {"userId": 1, "amount": -11}) == (400, '{"error":"Insufficient funds"}')
    assert await update(client, {"userId": 1, "amount": -10}) == (200, '{"userId":1,"newBalance":0}')
    assert await update(client, {"userId": 1, "amount": -1}) == (400, '{"error":"Insufficient funds"}')


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_a_deposit_beyond_the_limit_is_refused_and_changes_nothing(client: Client) -> None:
    await opened(client, 1)
    assert await update(client, {"userId": 1, "amount": LIMIT}) == (400, '{"error":"Balance limit exceeded"}')
    assert await update(client, {"userId": 1, "amount": LIMIT - 1}) == (200, f'{{"userId":1,"newBalance":{LIMIT}}}')
    assert await update(client, {"userId": 1, "amount": -LIMIT}) == (200, '{"userId":1,"newBalance":0}')


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_a_user_that_does_not_exist(client: Client) -> None:
    not_found = 404, '{"error":"User not found"}'
    assert await update(client, {"userId": 2, "amount": 1}) == not_found
    assert await ask(client, "GET", f"/api/users/{LIMIT}") == not_found


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_opening_an_account_again(client: Client) -> None:
    assert await ask(client, "PUT", "/api/users/7", {"balance": 5}) == (
        201,
        '{"userId":7,"balance":5,"held":0,"available":5,"minimumBalance":0,"version":0}',
    )
    await update(client, {"userId": 7, "amount": 1})
    assert await ask(client, "PUT", "/api/users/7", {"balance": 5}) == (
        200,
        '{"userId":7,"balance":6,"held":0,"available":6,"minimumBalance":0,"version":1}',
    )
    conflict = 409, '{"error":"User exists with other opening values"}'
    assert await ask(client, "PUT", "/api/users/7", {"balance": 6}) == conflict


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "body: expected JSON in UTF-8"),
        (b"{", "body: expected JSON in UTF-8"),
        (b'{"userId":1,"amount":1}x', "body: expected JSON in UTF-8"),
        (b'{"userId":1,"amount":NaN}', "body: expected JSON in UTF-8"),
        (b'{"userId":1,"amount":\xff}', "body: expected JSON in UTF-8"),
        (b'{"userId":1,"amount":1,"\xff":2}', "body: expected JSON in UTF-8"),
        (b"[]", "body: expected a JSON object"),
        (b"null", "body: expected a JSON object"),
        (b"{}", f"userId: expected {USER_ID}"),
        (b'{"userId":1}', f"amount: expected {AMOUNT}"),
        (b'{"userId":1,"amount":"-2"}', f"amount: expected {AMOUNT}"),
        (b'{"userId":1,"amount":2.5}', f"amount: expected {AMOUNT}"),
        (b'{"userId":1,"amount":1.0}', f"amount: expected {AMOUNT}"),
        (b'{"userId":1,"amount":1e2}', f"amount: expected {AMOUNT}"),
        (b'{"userId":1,"amount":true}', f"amount: expected {AMOUNT}"),
        (b'{"userId":1,"amount":null}', f"amount: expected {AMOUNT}"),
        (b'{"userId":1,"amount":0}', f"amount: expected {AMOUNT}"),
        (b'{"userId":1,"amount":-0}', f"amount: expected {AMOUNT}"),
        (b'{"userId":1,"amount":9007199254740992}', f"amount: expected {AMOUNT}"),
        (b'{"userId":1,"amount":-9007199254740992}', f"amount: expected {AMOUNT}"),
        (b'{"userId":1,"amount":' + b"9" * 400 + b"}", f"amount: expected {AMOUNT}"),
        (b'{"userId":0,"amount":1}', f"userId: expected {USER_ID}"),
        (b'{"userId":-1,"amount":1}', f"userId: expected {USER_ID}"),
        (b'{"userId":9007199254740992,"amount":1}', f"userId: expected {USER_ID}"),
        (b'{"userId":"1","amount":1}', f"userId: expected {USER_ID}"),
        (b'{"userId":1,"amount":1,"currency":"EUR"}', "currency: expected no such member"),
        (b'{"userId":1,"amount":1,"' + b"x" * 100 + b'":1}', f"{'x' * 100}: expected no such member"),
        (b'{"userId":1,"amount":1,"' + b"x" * 4_000 + b'":1}', f"{'x' * 100}…: expected no such member"),
    ],
)
async def test_bad_input_names_the_member_and_changes_nothing(client: Client, body: bytes, error: str) -> None:
    await opened(client, 10)
    text = json.dumps({"error": error}, separators=(",", ":"), ensure_ascii=False)
    assert await update(client, body) == (400, text)
    assert await ask(client, "GET", "/api/users/1") == (200, account(1, 10))


@pytest.mark.parametrize("user_id", ["0", "-1", "x", "{1}", "1.5", "9007199254740992", "1e3", "%00", "1%20"])
async def test_a_bad_user_id_in_the_path(client: Client, user_id: str) -> None:
    assert await ask(client, "GET", f"/api/users/{user_id}") == (400, f'{{"error":"userId: expected {USER_ID}"}}')


async def test_an_unknown_query_parameter_is_named_in_part(client: Client) -> None:
    error = f'{{"error":"{"x" * 100}…: expected no such member"}}'
    assert await ask(client, "GET", f"/api/users/1/changes?{'x' * 5_000}=1") == (400, error)


@pytest.mark.parametrize(
    "body",
    [
        b'{"balance":-1}',
        b'{"balance":9007199254740992}',
        b'{"balance":"1"}',
        b"{}",
        b'{"balance":1,"minimumBalance":2}',
    ],
)
async def test_a_bad_opening_balance(client: Client, body: bytes) -> None:
    error = f'{{"error":"balance: expected an integer from minimumBalance (0 unless given) to {LIMIT}"}}'
    assert await ask(client, "PUT", "/api/users/1", body) == (400, error)


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_a_bad_minimum_balance(client: Client, method: str) -> None:
    body = b'{"balance":0,"minimumBalance":"0"}' if method == "PUT" else b'{"minimumBalance":null}'
    error = f'{{"error":"minimumBalance: expected an integer from -{LIMIT} to {LIMIT}"}}'
    assert await ask(client, method, "/api/users/1", body) == (400, error)


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_an_overdraft(client: Client) -> None:
    await ask(client, "PUT", "/api/users/1", {"balance": 10, "minimumBalance": -5})
    assert await update(client, {"userId": 1, "amount": -16}) == (400, '{"error":"Insufficient funds"}')
    assert await update(client, {"userId": 1, "amount": -15}) == (200, '{"userId":1,"newBalance":-5}')
    below = 409, '{"error":"The balance is below this minimum"}'
    assert await ask(client, "PATCH", "/api/users/1", {"minimumBalance": -4}) == below
    patched = 200, '{"userId":1,"balance":-5,"held":0,"available":2,"minimumBalance":-7,"version":1}'
    assert await ask(client, "PATCH", "/api/users/1", {"minimumBalance": -7}) == patched
    assert await update(client, {"userId": 1, "amount": -2}) == (200, '{"userId":1,"newBalance":-7}')
    reopened = 200, '{"userId":1,"balance":-7,"held":0,"available":0,"minimumBalance":-7,"version":2}'
    assert await ask(client, "PUT", "/api/users/1", {"balance": 10, "minimumBalance": -5}) == reopened
    assert (await ask(client, "PATCH", "/api/users/2", {"minimumBalance": 0}))[0] == 404


@pytest.mark.parametrize(
    ("reference", "status"),
    [("x" * 255, 200), ("ä" * 255, 200), ("", 200), (None, 200), ("x" * 256, 400), ("\0", 400), (1, 400)],
)
@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_a_reference(client: Client, reference: Any, status: int) -> None:
    await opened(client, 10)
    answered, text = await update(client, {"userId": 1, "amount": 1, "reference": reference})
    assert answered == status
    if status == 400 and reference != "\ud800":
        assert text == '{"error":"reference: expected a string of up to 255 characters without NUL, or null"}'


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_many_updates_stand_each_on_its_own(client: Client) -> None:
    await opened(client, 100)
    updates = [
        {"userId": 1, "amount": -2},
        {"userId": 1, "amount": -500},
        {"userId": 2, "amount": 1},
        {"userId": 1, "amount": 7, "reference": "r", "idempotencyKey": "k"},
        {"userId": 1, "amount": 7, "reference": "r", "idempotencyKey": "k"},
        {"userId": 1, "amount": 8, "idempotencyKey": "k"},
    ]
    status, text = await ask(client, "POST", "/api/balance/updates", {"updates": updates})
    assert (status, json.loads(text)["results"]) == (
        200,
        [
            {"status": 200, "userId": 1, "newBalance": 98},
            {"status": 400, "error": "Insufficient funds"},
            {"status": 404, "error": "User not found"},
            {"status": 200, "userId": 1, "newBalance": 105},
            {"status": 200, "userId": 1, "newBalance": 105, "replayed": True},
            {"status": 422, "error": "Idempotency-Key: already used for another change of this user"},
        ],
    )


@pytest.mark.parametrize(
    ("updates", "error"),
    [
        ([{"userId": 1, "amount": 1}, {"userId": 1, "amount": "x"}], f"updates[1].amount: expected {AMOUNT}"),
        ([{"userId": 1, "amount": 1}, {"userId": 1, "amount": 0}], f"updates[1].amount: expected {AMOUNT}"),
        ([{"userId": 1, "amount": 1}, {"userId": 1}], f"updates[1].amount: expected {AMOUNT}"),
        ([{"userId": 1, "amount": 1}, {"userId": 1, "amount": 1, "x": 1}], "updates[1].x: expected no such member"),
        ([{"userId": 1, "amount": 1, "y" * 5_000: 1}], f"updates[0].{'y' * 100}…: expected no such member"),
        ([{"userId": 1, "amount": 1}, 5], "updates[1]: expected a JSON object"),
        (
            [{"userId": 1, "amount": 1}, {"userId": 1, "amount": 1, "idempotencyKey": "a b"}],
            "updates[1].idempotencyKey: expected 1 to 255 visible ASCII characters",
        ),
        ([], "updates: expected an array of 1 to 1000 updates"),
        ([{"userId": 1, "amount": 1}] * 1001, "updates: expected an array of 1 to 1000 updates"),
        ({}, "updates: expected an array of 1 to 1000 updates"),
    ],
)
async def test_one_malformed_update_is_named_and_nothing_is_applied(client: Client, updates: Any, error: str) -> None:
    await opened(client, 10)
    expected = 400, json.dumps({"error": error}, separators=(",", ":"), ensure_ascii=False)
    assert await ask(client, "POST", "/api/balance/updates", {"updates": updates}) == expected
    assert '"version":0' in (await ask(client, "GET", "/api/users/1"))[1]


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_problem_details_for_those_who_accept_them(client: Client) -> None:
    await opened(client, 10)
    for accept in ("application/problem+json", "application/json, application/problem+json;q=0.9"):
        answer = await client.post("/api/balance/update", json={"userId": 1, "amount": -11}, headers={"Accept": accept})
        assert (answer.status, answer.content_type) == (400, "application/problem+json")
        assert await answer.json(content_type=None) == {
            "type": "urn:problem-type:atomic-balance:insufficient-funds",
            "title": "Insufficient funds",
            "status": 400,
            "detail": "Insufficient funds",
        }
    answer = await client.post("/api/balance/update", data=b"{", headers={"Accept": "*/*"})
    assert (answer.content_type, answer.headers["Vary"]) == ("application/json", "Accept")
    answer = await client.post("/api/balance/update", json={}, headers={"Accept": "application/problem+json"})
    problem = await answer.json(content_type=None)
    assert (problem["title"], problem["detail"]) == ("Bad request", f"userId: expected {USER_ID}")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", None])
async def test_another_content_type_is_415_and_says_which_is_expected(client: Client, kind: str | None) -> None:
    await opened(client, 10)
    headers = {"Content-Type": kind} if kind else {}
    data = b'{"userId":1,"amount":1}'
    skip = () if kind else ("Content-Type",)
    async with client.post("/api/balance/update", data=data, headers=headers, skip_auto_headers=skip) as answer:
        assert answer.status == 415
        assert await answer.text() == '{"error":"Content-Type: expected application/json"}'


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_a_content_type_with_parameters_is_fine(client: Client) -> None:
    await opened(client, 10)
    headers = {"Content-Type": "application/json; charset=utf-8"}
    async with client.post("/api/balance/update", data=b'{"userId":1,"amount":1}', headers=headers) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    "codings", [["gzip"], ["GZIP"], ["deflate"], ["br"], ["x-unknown"], ["identity, gzip"], ["identity", "gzip"]]
)
async def test_an_encoded_body_is_415_on_any_path_and_says_what_is_expected(client: Client, codings: list[str]) -> None:
    await opened(client, 10)
    headers = [("Content-Type", "application/json"), *(("Content-Encoding", coding) for coding in codings)]
    data = b'{"userId":1,"amount":1}'
    for method, path in (("POST", "/api/balance/update"), ("PUT", "/api/users/1"), ("GET", "/healthz"), ("GET", "/no")):
        async with client.request(method, path, data=data, headers=headers) as answer:
            assert (answer.status, answer.headers["Accept-Encoding"]) == (415, "identity")
            assert await answer.text() == '{"error":"Content-Encoding: expected none, or identity"}'
    assert await ask(client, "GET", "/api/users/1") == (200, account(1, 10))


@pytest.mark.parametrize("coding", ["identity", "Identity", ""])
@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_the_identity_encoding_is_fine(client: Client, coding: str) -> None:
    await opened(client, 10)
    body = b'{"userId":1,"amount":1}'
    assert (await ask(client, "POST", "/api/balance/update", body, **{"Content-Encoding": coding}))[0] == 200


async def test_a_wrong_method_and_an_unknown_path(client: Client) -> None:
    async with client.get("/api/balance/update") as answer:
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")
        assert await answer.text() == '{"error":"Method not allowed"}'
        assert answer.content_type == "application/json"
    assert await ask(client, "GET", "/api/nothing") == (404, '{"error":"Not found"}')


def escaped(body: Any) -> bytes:
    """The JSON of `body` with each character of its strings and names escaped: without white space the longest."""

    def escape(found: re.Match[str]) -> str:
        units = json.loads(found[0]).encode("utf-16-be").hex()
        return '"' + re.sub("....", r"\\u\g<0>", units) + '"'

    return re.sub(r'"(?:[^"\\]|\\.)*"', escape, json.dumps(body)).encode()


UPDATE = {"userId": 1, "amount": 1, "reference": "\U0001f600" * 255}
BODIES = [
    ("POST", "/api/balance/update", UPDATE, BalanceUpdate),
    (
        *("POST", "/api/balance/updates"),
        {"updates": [{**UPDATE, "idempotencyKey": f"{number:->255}"} for number in range(1_000)]},
        BalanceUpdates,
    ),
    ("PUT", f"/api/users/{LIMIT}", {"balance": 0, "minimumBalance": -LIMIT}, AccountOpening),
    ("PATCH", "/api/users/1", {"minimumBalance": -LIMIT}, AccountPatch),
]


@pytest.mark.parametrize(("method", "path", "body", "kind"), BODIES, ids=[f"{body[0]} {body[1]}" for body in BODIES])
async def test_every_body_fits_however_it_is_spelled_and_a_larger_one_is_413(
    client: Client, method: str, path: str, body: Any, kind: type[Body]
) -> None:
    await opened(client, 0)
    longest = escaped(body)
    for size, fits in ((len(longest), True), (kind.bytes_max, True), (kind.bytes_max + 1, False), (10**7, False)):
        sent = longest.ljust(size)
        for data in (io.BytesIO(sent), in_chunks(sent)):  # the second does not say before how long it is
            async with client.request(method, path, data=data, headers=JSON) as answer:
                assert answer.status in ((200, 201) if fits else (413,))
                assert fits or await answer.text() == '{"error":"Body too large"}'


async def in_chunks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 20_000):
        yield data[start : start + 20_000]
        await asyncio.sleep(0)


async def test_what_is_unforeseen_is_500_and_tells_nothing(aiohttp_client: AiohttpClient, settings: Settings) -> None:
    async def fail(_: web.Request) -> web.Response:
        raise RuntimeError("secret")

    app = make_app(settings)
    app.router.add_get("/fail", fail)
    client = await aiohttp_client(app)
    assert await ask(client, "GET", "/fail") == (500, '{"error":"Internal server error"}')


async def test_health_and_readiness(client: Client) -> None:
    assert (await ask(client, "GET", "/healthz"))[0] == 200
    assert (await ask(client, "GET", "/readyz"))[0] == 200


async def test_a_service_without_its_database_lives_but_is_not_ready(aiohttp_client: AiohttpClient) -> None:
    settings = Settings(
        database_url="postgresql://user:secret@127.0.0.1:1/none", statement_seconds=0.2, deadline_seconds=0.3
    )
    client = await aiohttp_client(make_app(settings))
    assert (await ask(client, "GET", "/healthz"))[0] == 200
    status, body = await ask(client, "GET", "/readyz")
    checks = json.loads(body)["checks"]
    assert (status, checks["schema"]) == (503, "not known")
    assert checks["database"].startswith("has not answered for ")
    async with client.post("/api/balance/update", json={"userId": 1, "amount": 1}) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert (
            await answer.text()
            == '{"error":"Service unavailable: this request changed nothing, ask again with the same Idempotency-Key"}'
        )


async def test_a_service_with_the_schema_behind_is_not_ready(
    aiohttp_client: AiohttpClient, empty_database_url: str
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=empty_database_url)))
    status, body = await ask(client, "GET", "/readyz")
    assert status == 503
    assert "0001-users" in json.loads(body)["checks"]["schema"]


async def test_a_database_with_another_encoding_is_none(
    aiohttp_client: AiohttpClient, latin1_database_url: str
) -> None:
    """It would fail for a text that it can't hold, and with it the changes beside it: so none is sent there."""
    settings = Settings(database_url=latin1_database_url, statement_seconds=0.2, deadline_seconds=0.3)
    client = await aiohttp_client(make_app(settings))
    status, body = await ask(client, "GET", "/readyz")
    assert (status, json.loads(body)["checks"]["database"]) == (503, "its encoding is LATIN1, expected UTF8")
    assert (await update(client, {"userId": 1, "amount": 1, "reference": "\N{OK HAND SIGN}"}))[0] == 503


async def test_readiness_is_red_while_there_is_no_place_to_wait(
    aiohttp_client: AiohttpClient, database_url: str
) -> None:
    settings = Settings(database_url=database_url, waiting_changes_max=2, waiting_changes_per_account_max=1)
    client = await aiohttp_client(make_app(settings))
    for user_id in (1, 2):
        await opened(client, 10, user_id=user_id)
    with psycopg.connect(database_url) as blocker:
        blocker.execute("UPDATE users SET balance = balance")
        waiting = [asyncio.create_task(update(client, {"userId": user_id, "amount": 1})) for user_id in (1, 2)]
        await asyncio.sleep(0.3)
        status, body = await ask(client, "GET", "/readyz")
        assert (status, json.loads(body)["checks"]["overload"]) == (503, "no place for a change to wait")
    assert {status for status, _ in await asyncio.gather(*waiting)} == {200}
    assert (await ask(client, "GET", "/readyz"))[0] == 200


async def test_every_answer_names_its_request_and_so_does_every_error_line(client: Client, database_url: str) -> None:
    made = [(await client.get("/healthz")).headers["X-Request-ID"] for _ in range(3)]
    assert len(set(made)) == 3
    for given, expected in (("mine-1", True), ("x" * 129, False), ("a b", False)):
        answer = await client.get("/nothing", headers={"X-Request-ID": given})
        assert (answer.headers["X-Request-ID"] == given) is expected
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE users RENAME TO hidden")
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    logging.getLogger("atomic_balance").addHandler(handler)
    try:
        await client.get("/api/users/1", headers={"X-Request-ID": "mine-2"})
        await client.post("/api/balance/update", json={"userId": 1, "amount": 1}, headers={"X-Request-ID": "mine-3"})
    finally:
        logging.getLogger("atomic_balance").removeHandler(handler)
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert {line.get("request_id") for line in lines if line["level"] == "error"} >= {"mine-2", "mine-3"}
