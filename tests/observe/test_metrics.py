"""Metrics move as the requests say they must, and Prometheus can read them."""

import asyncio

import pytest
from msgspec import json
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families
from pytest_aiohttp import AiohttpClient

from atomic_balance.http.app import make_app
from atomic_balance.http.endpoints import ENDPOINTS
from atomic_balance.http.request_counts import KINDS_OF_REQUESTS
from atomic_balance.observe.counting import GAUGES, KINDS_OF_REQUESTS_MAX, Numbers, shared_numbers
from atomic_balance.postgres.accounts import Accounts
from atomic_balance.settings import Settings
from tests.client import UPDATE, Client, opened


async def samples(client: Client) -> dict[str, float]:
    async with client.get("/metrics") as answer:
        assert answer.content_type == "text/plain"
        text = await answer.text()
    return {
        sample.name.removeprefix("atomic_balance_")
        + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_count_what_was_answered(client: Client) -> None:
    before = await samples(client)
    assert before["waiting_changes"] == 0
    await opened(client, 10)
    for amount, user_id in ((-4, 1), (-4, 1), (-4, 1), (2**53 - 1, 1), (1, 2)):
        await client.post(UPDATE, json={"userId": user_id, "amount": amount})
    for amount in (1, 1, 2):
        await client.post(UPDATE, json={"userId": 1, "amount": amount}, headers={"Idempotency-Key": "k"})
    after = await samples(client)
    assert {name: value for name, value in after.items() if name.startswith("changes_total") and value} == {
        "changes_total applied": 4,
        "changes_total balance_limit_exceeded": 1,
        "changes_total idempotency_key_reused": 1,
        "changes_total insufficient_funds": 1,
        "changes_total user_not_found": 1,
    }
    assert after["replays_total"] == 1
    assert after["change_duration_seconds_count"] == 8
    assert after["statement_duration_seconds_count"] == after["statement_changes_count"] == 8
    assert after["statement_changes_sum"] == 8
    assert after["statement_changes_bucket 1"] == 8
    assert 0 < after["change_duration_seconds_sum"] < 8


async def test_changes_that_travel_together_are_seen_together(client: Client) -> None:
    await opened(client, 10)
    updates = {"updates": [{"userId": 1, "amount": 1}] * 300}
    answers = await asyncio.gather(*(client.post("/api/balance/updates", json=updates) for _ in range(3)))
    assert {answer.status for answer in answers} == {200}
    after = await samples(client)
    assert after["changes_total applied"] == after["statement_changes_sum"] == 900
    assert after["statement_changes_count"] < 30


async def test_requests_are_counted_by_route_and_status(
    aiohttp_client: AiohttpClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await aiohttp_client(make_app(replace(settings, api_token="write", read_token="read")))
    write, read = ({"Authorization": f"Bearer {token}"} for token in ("write", "read"))
    withdrawal = {"userId": 1, "amount": -1}
    monkeypatch.setattr(Accounts, "account", None)  # which is a fault
    for method, path, headers, body, status in (
        ("PUT", "/api/users/1", write, b'{"balance": 1}', 201),
        ("PUT", "/api/users/1", write, b'{"balance": 1}', 200),
        ("POST", UPDATE, write, json.encode(withdrawal), 200),
        ("POST", UPDATE, write, json.encode(withdrawal), 400),
        ("POST", UPDATE, write, b"{", 400),
        ("POST", UPDATE, write, b" " * 2**20, 413),
        ("POST", UPDATE, read, json.encode(withdrawal), 403),
        ("POST", UPDATE, {}, json.encode(withdrawal), 401),
        ("GET", "/api/users/1/changes", read, b"", 200),
        ("HEAD", "/api/users/1/changes", read, b"", 200),
        ("GET", "/api/users/2/changes", {}, b"", 401),
        ("GET", "/api/users/1", read, b"", 500),
        ("GET", "/", {}, b"", 401),
        ("GET", "/healthz", {}, b"", 200),
        ("DELETE", "/api/users/1", write, b"", 405),
        ("GET", "/none", read, b"", 404),
        ("PROPFIND", "/none", {}, b"", 401),
    ):
        answer = await client.request(
            method, path, headers={"Content-Type": "application/json", **headers}, data=body or None
        )
        assert answer.status == status, (method, path, await answer.text())
    client.session.headers.update(read)
    found = {name: value for name, value in (await samples(client)).items() if name.startswith("requests_total")}
    assert found.keys() == {f"requests_total {' '.join(kind)}" for kind in KINDS_OF_REQUESTS}
    assert {name.removeprefix("requests_total "): value for name, value in found.items() if value} == {
        "PUT /api/users/{userId} 201": 1,
        "PUT /api/users/{userId} 200": 1,
        f"POST {UPDATE} 200": 1,
        f"POST {UPDATE} 400": 2,
        f"POST {UPDATE} 413": 1,
        f"POST {UPDATE} 403": 1,
        f"POST {UPDATE} 401": 1,
        "GET /api/users/{userId}/changes 200": 2,
        "GET /api/users/{userId}/changes 401": 1,
        "GET /api/users/{userId} 500": 1,
        "GET / 401": 1,
        "GET /healthz 200": 1,
        "other other 405": 1,
        "other other 404": 1,
        "other other 401": 1,
    }


def test_there_is_a_cell_for_every_kind_of_request() -> None:
    assert len(set(KINDS_OF_REQUESTS)) == len(KINDS_OF_REQUESTS) <= KINDS_OF_REQUESTS_MAX
    assert len({endpoint.handler for endpoint in ENDPOINTS}) == len(ENDPOINTS)


def test_what_each_process_sees_of_the_whole_database_is_not_added_up() -> None:
    processes = shared_numbers(3)
    for numbers, lag_seconds in zip(processes, (2.0, 5.0, 1.0), strict=True):
        numbers.begin(dict.fromkeys(GAUGES, 1.0) | {"feed_lag_seconds": lag_seconds})
    total = Numbers.total(processes).gauges
    assert (total["feed_lag_seconds"], total["waiting_changes"]) == (5, 3)
