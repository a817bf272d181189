"""Idempotency keys: a change is applied once, and its first outcome is the answer to every repetition."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg
import pytest
from yarl import URL

from tests.client import UPDATE, Client, opened, session
from tests.processes import running_service


async def update(client: Client, amount: int, key: str, **more: Any) -> tuple[int, str, bool]:
    """Status, body, and whether the answer is marked as replayed."""
    body = {"userId": 1, "amount": amount, **more}
    async with client.post(UPDATE, json=body, headers={"Idempotency-Key": key}) as answer:
        marked = answer.headers.get("Idempotent-Replayed")
        assert marked in (None, "true")
        return answer.status, await answer.text(), marked == "true"


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_the_first_outcome_is_given_again(client: Client) -> None:
    await opened(client, 100)
    assert await update(client, -2, "k") == (200, '{"userId":1,"newBalance":98}', False)
    assert await update(client, -3, "other") == (200, '{"userId":1,"newBalance":95}', False)
    assert await update(client, -2, "k") == (200, '{"userId":1,"newBalance":98}', True)
    assert await update(client, -2, '"k"') == (200, '{"userId":1,"newBalance":98}', True)


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_a_refusal_is_bound_too(client: Client) -> None:
    await opened(client, 1)
    refused = '{"error":"Insufficient funds"}'
    assert await update(client, -2, "k") == (400, refused, False)
    assert await update(client, 10, "deposit") == (200, '{"userId":1,"newBalance":11}', False)
    assert await update(client, -2, "k") == (400, refused, True)
    assert await update(client, 2**53 - 1, "much") == (400, '{"error":"Balance limit exceeded"}', False)
    assert await update(client, 2**53 - 1, "much") == (400, '{"error":"Balance limit exceeded"}', True)


@pytest.mark.parametrize("other", [{"amount": -3}, {"reference": "r"}, {"amount": 2}])
@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_the_same_key_with_another_change_is_422(client: Client, other: dict[str, Any]) -> None:
    await opened(client, 100)
    await update(client, -2, "k")
    reused = 422, '{"error":"Idempotency-Key: already used for another change of this user"}', False
    change: dict[str, Any] = {"amount": -2, "key": "k", **other}
    assert await update(client, **change) == reused
    assert await update(client, -2, "k") == (200, '{"userId":1,"newBalance":98}', True)


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_a_key_is_per_user(client: Client) -> None:
    await opened(client, 100)
    await opened(client, 50, user_id=2)
    assert (await update(client, -2, "k"))[1] == '{"userId":1,"newBalance":98}'
    assert await update(client, -2, "k", userId=2) == (200, '{"userId":2,"newBalance":48}', False)


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_what_is_not_decided_binds_nothing(client: Client) -> None:
    assert (await update(client, -2, "k"))[0] == 404
    await opened(client, 100)
    assert (await update(client, 0, "k"))[0] == 400
    assert await update(client, -2, "k") == (200, '{"userId":1,"newBalance":98}', False)


@pytest.mark.parametrize("key", ["", "a b", "ä", "x" * 256, " ", "a\tb", '""', '"a b"', f'"{"x" * 256}"'])
async def test_a_malformed_key(client: Client, key: str) -> None:
    await opened(client, 100)
    error = '{"error":"Idempotency-Key: expected one, of 1 to 255 visible ASCII characters"}'
    assert await update(client, -2, key) == (400, error, False)


@pytest.mark.parametrize("key", ['"', '"""', '"k', '"k"x', '"a"b"', r'"a\b"', r'"k\"'])
async def test_a_key_that_begins_with_a_quote_and_is_no_quoted_string(client: Client, key: str) -> None:
    await opened(client, 100)
    error = '{"error":"Idempotency-Key: expected a quoted string, as it begins with a quote"}'
    assert await update(client, -2, key) == (400, error, False)


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_every_visible_character_of_a_key_is_kept_and_found(client: Client) -> None:
    """Each alone and all together; in the path each is percent-encoded, slash, braces and dots too."""
    characters = [chr(code) for code in range(0x21, 0x7F)]
    await opened(client, 1_000)
    for count, key in enumerate([*characters, "".join(characters), "a%2Fb", "%252F/%"], start=1):
        escaped = key.replace("\\", "\\\\").replace('"', '\\"')
        assert await update(client, -1, f'"{escaped}"') == (200, f'{{"userId":1,"newBalance":{1_000 - count}}}', False)
        if key != '"':
            assert (await update(client, -1, key))[2], key
        for digits in ("%%%02X", "%%%02x"):
            path = "".join(digits % ord(character) for character in key)
            async with client.get(URL(f"/api/users/1/changes/{path}", encoded=True)) as answer:
                assert answer.status == 200, key
                bound = await answer.json()
                assert (bound["idempotencyKey"], bound["newBalance"]) == (key, 1_000 - count)


async def test_two_keys_in_one_request(client: Client) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    async with client.post(UPDATE, json={"userId": 1, "amount": 1}, headers=headers) as answer:
        assert answer.status == 400


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_what_is_bound_to_a_key_can_be_read(client: Client) -> None:
    await opened(client, 100)
    key = "order/4711?x=%2F"
    await update(client, -2, key, reference="r")
    await update(client, -200, "refused")
    path = f"/api/users/1/changes/{key.replace('%', '%25').replace('/', '%2F').replace('?', '%3F')}"
    async with client.get(URL(path, encoded=True)) as answer:
        bound = await answer.json()
        assert bound.pop("createdAt").endswith("Z")
        assert bound == {
            "status": 200,
            "userId": 1,
            "idempotencyKey": key,
            "amount": -2,
            "reference": "r",
            "version": 1,
            "newBalance": 98,
        }
    async with client.get("/api/users/1/changes/refused") as answer:
        bound = await answer.json()
        assert (bound["status"], bound["error"], bound["amount"]) == (400, "Insufficient funds", -200)
        assert "version" not in bound
        assert "newBalance" not in bound
    async with client.get("/api/users/1/changes/none") as answer:
        assert (answer.status, await answer.text()) == (404, '{"error":"Nothing is bound to this key"}')
    async with client.get("/api/users/1/changes/a%20b") as answer:
        assert answer.status == 400
        assert await answer.text() == '{"error":"key: expected 1 to 255 visible ASCII characters"}'


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_a_storm_of_one_key_through_two_processes(database_url: str, tmp_path: Path) -> None:
    """200 requests with one key, and balance for one of them: it is applied once, and all get that outcome."""
    environment = {"DATABASE_URL": database_url}
    async with (
        running_service(environment, tmp_path) as one,
        running_service(environment, tmp_path) as other,
        session(connections_max=0) as client,
    ):
        await opened(client, 3, url=one.url)

        async def ask(number: int, key: str) -> tuple[int, str, bool]:
            url = (one.url, other.url)[number % 2] + UPDATE
            headers = {"Idempotency-Key": key}
            async with client.post(url, json={"userId": 1, "amount": -2}, headers=headers) as answer:
                return answer.status, await answer.text(), "Idempotent-Replayed" in answer.headers

        applied = 200, '{"userId":1,"newBalance":1}'
        refused = 400, '{"error":"Insufficient funds"}'
        for key, outcome in (("k", applied), ("late", refused)):
            answers = Counter(await asyncio.gather(*(ask(number, key) for number in range(200))))
            assert answers == {(*outcome, False): 1, (*outcome, True): 199}
        with psycopg.connect(database_url) as connection:
            rows = connection.execute("SELECT version, amount, balance, idempotency_key, refusal FROM balance_changes")
            assert rows.fetchall() == [(1, -2, 1, "k", None), (None, -2, 1, "late", "insufficient_funds")]


@pytest.mark.over_both_statements
@pytest.mark.on_a_cluster
async def test_keys_of_the_service_are_unlike_any_callers(client: Client, database_url: str) -> None:
    await opened(client, 100)
    for _ in range(3):
        await client.post(UPDATE, json={"userId": 1, "amount": 1})
    with psycopg.connect(database_url) as connection:
        keys = [row[0] for row in connection.execute("SELECT idempotency_key FROM balance_changes ORDER BY version")]
    assert len(set(keys)) == 3
    assert keys == sorted(keys)
    assert {key[0] for key in keys} == {" "}
    async with client.get("/api/users/1/changes") as answer:
        changes = json.loads(await answer.text())["changes"]
        assert [change["idempotencyKey"] for change in changes] == [None, None, None, None]
