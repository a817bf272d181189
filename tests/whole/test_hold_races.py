"""Holds under concurrency, over HTTP, against services that are processes of their own: exact counts, one end each."""

import asyncio
import contextlib
import random
import shutil
import time
from collections import Counter
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from atomic_balance.postgres.verify import verify
from tests.client import Client, Told, hold, opened, session, settle
from tests.database import Database, until
from tests.processes import run, running_service

pytestmark = pytest.mark.slow

REFUSED = Told(400, {"error": "Insufficient funds"}, replayed=False)


async def account(client: aiohttp.ClientSession, url: str, user_id: int = 1) -> dict[str, Any]:
    async with client.get(f"{url}/api/users/{user_id}") as answer:
        found: dict[str, Any] = await answer.json()
        return found


async def read(client: aiohttp.ClientSession, url: str, hold_id: str, user_id: int = 1) -> dict[str, Any]:
    async with client.get(f"{url}/api/users/{user_id}/holds/{hold_id}") as answer:
        found: dict[str, Any] = await answer.json()
        assert answer.status == 200, found
        return found


@pytest.mark.on_a_cluster
async def test_the_reference_race_of_holds_and_captures(database: Database, tmp_path: Path) -> None:
    """10,000 holds at once of 2 each from 10,000: 5,000 are placed, 5,000 refused; then all are captured at once."""
    async with running_service({"DATABASE_URL": database.url}, tmp_path) as service, session() as client:
        await opened(client, url=service.url)
        ids = [f"hold-{number}" for number in range(10_000)]
        answers = await asyncio.gather(*(hold(client, one, 2, url=service.url) for one in ids))
        placed = [one for one, answer in zip(ids, answers, strict=True) if answer.status == 201]
        assert len(placed) == 5_000
        assert sum(answer == REFUSED for answer in answers) == 5_000
        now = await account(client, service.url)
        assert (now["balance"], now["held"], now["available"]) == (10_000, 10_000, 0)
        captured = await asyncio.gather(*(settle(client, "capture", one, url=service.url) for one in placed))
        assert {(answer.status, answer.replayed) for answer in captured} == {(200, False)}
        assert {answer.body["newBalance"] for answer in captured} == set(range(0, 10_000, 2))
        now = await account(client, service.url)
        assert (now["balance"], now["held"], now["available"], now["version"]) == (0, 0, 0, 10_000)
    assert verify(database.url).differences == []


def fits(how: str, answer: Told, end: dict[str, Any]) -> bool:
    """Whether somebody who asked to capture or release a hold was told what became of it."""
    status = end["status"]
    if how == "capture" or status == "captured":
        problem = {
            "captured": "The hold was captured",
            "released": "The hold was released",
            "expired": "The hold has expired",
        }[status]
        if how != status.removesuffix("d"):
            return answer == Told(409, {"error": problem}, replayed=False)
    return answer.status == 200 and answer.body == end


async def test_capture_release_and_expiry_of_the_same_holds_through_three_processes(
    database: Database, tmp_path: Path
) -> None:
    """Each hold ends once, everybody is told how, and the sums fit."""
    environment = {"DATABASE_URL": database.url}
    users, count, chance = range(1, 6), 1_500, random.Random(3)
    database.open(dict.fromkeys(users, 10_000))
    async with (
        running_service(environment, tmp_path) as one,
        running_service(environment, tmp_path) as two,
        running_service(environment, tmp_path) as three,
        session(connections_max=0) as client,
    ):
        urls = [one.url, two.url, three.url]

        async def ask_at(when: datetime, how: str, hold_id: str, user_id: int) -> Told:
            await asyncio.sleep(when.timestamp() - time.time())
            return await settle(client, how, hold_id, user_id, chance.choice(urls))

        async def race(number: int) -> Counter[str]:
            hold_id, user_id = f"hold-{number}", chance.choice(users)
            in_time = number % 10 == 0  # however slow the machine
            placed = await hold(client, hold_id, 3, user_id, chance.choice(urls), expiresInSeconds=60 if in_time else 2)
            assert placed.status == 201
            expiry = datetime.fromisoformat(placed.body["expiresAt"])
            together = expiry + timedelta(seconds=-60 if in_time else chance.uniform(-0.5, 0.5))
            asked = [how for how in ("capture", "release") for _ in range(2)]
            answers = await asyncio.gather(*(ask_at(together, how, hold_id, user_id) for how in asked))
            end = await read(client, chance.choice(urls), hold_id, user_id)
            for how, answer in zip(asked, answers, strict=True):
                assert fits(how, answer, end), (how, answer, end)
            return Counter([end["status"]])

        ends = sum(await asyncio.gather(*(race(number) for number in range(count))), Counter())
        assert set(ends) == {"captured", "released", "expired"}
        await until(lambda: database.execute("SELECT count(*) FROM open_holds") == [(0,)])
        assert database.execute("SELECT sum(balance), sum(held), sum(version) FROM users") == [
            (50_000 - 3 * ends["captured"], 0, 2 * count)
        ]
        assert database.execute(
            "SELECT count(*) FILTER (WHERE amount < 0), count(*) FILTER (WHERE expires_at IS NOT NULL), count(*)"
            "  FROM balance_changes WHERE hold_amount < 0"
        ) == [(ends["captured"], ends["expired"], count)]
    assert verify(database.url).differences == []


@pytest.mark.on_a_cluster
async def test_a_storm_on_one_hold_through_two_processes(database: Database, tmp_path: Path) -> None:
    """One request places the hold, and one captures it; all others are told the same, or that theirs is another."""
    environment = {"DATABASE_URL": database.url}
    async with (
        running_service(environment, tmp_path) as one,
        running_service(environment, tmp_path) as other,
        session(connections_max=0) as client,
    ):
        urls = [one.url, other.url]
        await opened(client, url=one.url)
        storm = [hold(client, "a", 10, url=urls[number % 2]) for number in range(200)]
        answers = await asyncio.gather(*storm)
        assert Counter((answer.status, answer.replayed) for answer in answers) == {(201, False): 1, (200, True): 199}
        (placed,) = [answer.body for answer in answers if answer.status == 201]
        assert all(answer.body == placed for answer in answers)
        now = await account(client, one.url)
        assert (now["held"], now["version"]) == (10, 1)

        captures = [
            settle(client, "capture", "a", url=urls[number % 2], amount=1 + number // 4 % 2) for number in range(200)
        ]
        answers = await asyncio.gather(*captures)
        assert Counter((answer.status, answer.replayed) for answer in answers) == {
            (200, False): 1,
            (200, True): 99,
            (409, False): 100,
        }
        (captured,) = {answer.body["captured"] for answer in answers if answer.status == 200}
        now = await account(client, other.url)
        assert (now["balance"], now["held"], now["version"]) == (10_000 - captured, 0, 2)
    assert verify(database.url).differences == []


async def clock(wrong: str, directory: Path) -> dict[str, str]:
    """The environment of a process whose clock is `wrong`. Run through faketime it would not get our signals."""
    _, library = await run("faketime", "-f", wrong, "printenv", "LD_PRELOAD", directory=directory)
    return {"LD_PRELOAD": library.strip(), "FAKETIME": wrong}


@pytest.mark.skipif(not shutil.which("faketime"), reason="needs faketime (Debian: faketime)")
async def test_expiry_goes_by_the_databases_clock_while_the_services_are_an_hour_wrong(
    database: Database, tmp_path: Path
) -> None:
    """Neither a capture nor the expiry itself is early or late, whichever service is asked."""
    environment = {"DATABASE_URL": database.url}
    database.open({1: 10_000})
    async with contextlib.AsyncExitStack() as running:
        client = await running.enter_async_context(session())
        for wrong in ("+1h", "-1h"):
            async with running_service(environment | await clock(wrong, tmp_path), tmp_path) as service:
                async with client.get(f"{service.url}/livez") as answer:
                    ahead = parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time()
                assert 3_500 < abs(ahead) < 3_700
                assert (ahead > 0) == (wrong == "+1h")

                async def ask(how: str, hold_id: str, url: str = service.url) -> tuple[int, str]:
                    answer = await settle(client, how, hold_id, url=url)
                    return answer.status, answer.body.get("status") or answer.body["error"]

                kept, lost = [f"kept{wrong}", f"kept-too{wrong}"], [f"lost{wrong}", f"lost-too{wrong}"]
                for hold_id in (*kept, *lost):
                    lasting = 1 if hold_id in lost else 1_800
                    placed = await hold(client, hold_id, 10, url=service.url, expiresInSeconds=lasting)
                    assert placed.status == 201
                    left = datetime.fromisoformat(placed.body["expiresAt"]).timestamp() - time.time()
                    assert lasting - 1 < left <= lasting
                seen = await read(client, service.url, lost[1])
                while seen["status"] == "held":
                    seen = await read(client, service.url, lost[1])
                assert seen["status"] == "expired"
                assert time.time() >= datetime.fromisoformat(seen["expiresAt"]).timestamp()
                assert await ask("capture", lost[0]) == (409, "The hold has expired")
                assert await ask("release", lost[1]) == (200, "expired")
                await until(lambda: database.execute("SELECT count(*) FROM open_holds") == [(2,)])
                assert await ask("capture", kept[0]) == (200, "captured")
                assert await ask("release", kept[1]) == (200, "released")
                assert (await account(client, service.url))["held"] == 0
    early = (
        "SELECT count(*), min(settled.expires_at - placed.expires_at) >= '0' FROM balance_changes AS placed"
        "  JOIN balance_changes AS settled ON settled.idempotency_key = ' settlement ' || placed.idempotency_key"
        " WHERE settled.expires_at IS NOT NULL"
    )
    assert database.execute(early) == [(4, True)]
    assert database.balance(1) == 9_980
    assert verify(database.url).differences == []


async def test_a_hold_is_said_to_have_expired_only_when_nothing_can_end_it_otherwise_any_more(
    client: Client, database: Database
) -> None:
    """A capture that came in time is still under way when its hold's time is over, and another one comes."""
    database.open({1: 100})
    assert (await hold(client, "a", 10, expiresInSeconds=1)).status == 201
    with database.holding(1):
        in_time = asyncio.create_task(settle(client, "capture", "a"))
        await until(database.blocked)
        await until(lambda: database.execute("SELECT 1 FROM open_holds WHERE expires_at < clock_timestamp()"))
        late = asyncio.create_task(settle(client, "capture", "a", amount=9))
        await asyncio.sleep(0.2)
    assert (await in_time).body["status"] == "captured"
    assert await late == Told(409, {"error": "The hold was captured"}, replayed=False)
