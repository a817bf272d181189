"""Metrics move as the requests say they must, and Prometheus can read them."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

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
