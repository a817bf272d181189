"""What only a cluster can show: nodes that die, shards that move, and services that meet on the coordinator."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import psycopg
import pytest

from atomic_balance.postgres.shards import hash_of
from atomic_balance.postgres.verify import verify
from tests import cluster
from tests.client import session, transfer, update
from tests.database import Database
from tests.processes import Service, running_service

USERS = range(1, 201)
OPENING = 1_000_000
needs_kills = pytest.mark.skipif(not cluster.NODES, reason="CITUS_TEST_NODES does not say how nodes are killed")


@pytest.fixture
def url(statement: str) -> Iterator[str]:
    """The URL of a database on the cluster."""
    yield from cluster.fresh_database()


@pytest.fixture
def there(url: str) -> Iterator[Database]:
    """That database, seen from outside the service, with accounts in it."""
    with Database(url) as database:
        database.execute(
            "INSERT INTO users (id, balance, opening_balance) SELECT id, %s, %s FROM generate_series(1, %s) AS id",
            *(OPENING, OPENING, len(USERS)),
        )
        yield database


def environment(url: str, **more: str) -> dict[str, str]:
    return {"DATABASE_URL": url, "CITUS": "true", **more}


def users_by_worker(database: Database) -> dict[int, list[int]]:
    """The accounts, by the port of the worker that they lie on."""
    rows = database.execute(
        "SELECT shardminvalue::int, shardmaxvalue::int, nodeport FROM pg_dist_shard"
        " JOIN pg_dist_placement USING (shardid) JOIN pg_dist_node USING (groupid)"
        " WHERE logicalrelid = 'users'::regclass"
    )
    found: dict[int, list[int]] = {}
    for user_id in USERS:
        (port,) = [port for least, most, port in rows if least <= hash_of(user_id) <= most]
        found.setdefault(port, []).append(user_id)
    return found


async def test_the_same_key_through_two_services_is_never_an_error(there: Database, url: str, tmp_path: Path) -> None:
    """They meet at the primary key of a shard, whose error names no constraint."""
    async with (
        running_service(environment(url), tmp_path) as one,
        running_service(environment(url), tmp_path) as other,
        session(connections_max=0) as client,
    ):
        answers = await asyncio.gather(
            *(
                update(client, -1, number % 50 + 1, service.url, {"Idempotency-Key": f"k{number}"})
                for number in range(600)
                for service in (one, other)
            )
        )
    assert {status for status, _ in answers} == {200}
    assert there.execute("SELECT sum(version) FROM users") == [(600,)]
    assert verify(url).differences == []


async def test_two_services_share_accounts_of_all_shards(there: Database, url: str, tmp_path: Path) -> None:
    chance = random.Random(2)
    async with (
        running_service(environment(url), tmp_path) as one,
        running_service(environment(url), tmp_path) as other,
        session(connections_max=0) as client,
    ):

        async def ask(number: int) -> int:
            service = (one, other)[number % 2]
            if number % 4 == 0:
                payer, payee = chance.sample(USERS, 2)
                return (await transfer(client, payer, {payee: 1}, service.url)).status
            return (await update(client, chance.choice((-2, 3)), chance.choice(USERS), service.url))[0]

        answers = Counter(await asyncio.gather(*map(ask, range(3_000))))
    assert answers == {200: 3_000}
    assert verify(url).differences == []


async def test_a_blocked_row_holds_up_its_own_account_alone(there: Database, url: str, tmp_path: Path) -> None:
    async with running_service(environment(url), tmp_path) as service, session(connections_max=0) as client:
        with there.holding(1) as holder:
            blocked = [asyncio.create_task(update(client, -1, 1, service.url)) for _ in range(5)]
            for _ in range(5):
                answers = await asyncio.gather(*(update(client, -1, user_id, service.url) for user_id in USERS[1:]))
                assert {status for status, _ in answers} == {200}
            assert not any(task.done() for task in blocked)
            holder.commit()
        assert {status for status, _ in await asyncio.gather(*blocked)} == {200}
    assert verify(url).differences == []


@needs_kills
async def test_a_worker_dies_twice_in_the_middle_of_the_race(there: Database, url: str, tmp_path: Path) -> None:
    """10,000 withdrawals at once of 2 from 10,000, by callers that ask again while they do not know: exact."""
    worker = cluster.workers()[0]
    user_id = users_by_worker(there)[worker.port][0]
    there.execute("UPDATE users SET balance = 10000, opening_balance = 10000 WHERE id = %s", user_id)
    outcomes: Counter[int] = Counter()
    async with running_service(environment(url), tmp_path) as service, session() as client:

        async def withdraw(number: int) -> None:
            status = 0
            while status in (0, 503, 504):
                status, _ = await update(client, -2, user_id, service.url, {"Idempotency-Key": f"k{number}"})
            outcomes[status] += 1

        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            for number in range(10_000):
                tasks.create_task(withdraw(number))
            for decided in (1_000, 5_000):
                while outcomes.total() < decided:  # noqa: ASYNC110 - it is in the middle
                    await asyncio.sleep(0.01)
                worker.kill()
                worker.start()
        assert there.balance(user_id) == 0
    assert outcomes == {200: 5_000, 400: 5_000}
    assert verify(url).differences == []


async def rate(
    client: aiohttp.ClientSession, service: Service, users: list[int], seconds: float
) -> tuple[float, Counter[int]]:
    """Ask for changes of these accounts, one after another for each of some callers; how many a second, and answers."""
    answers: Counter[int] = Counter()
    until_time = time.monotonic() + seconds

    async def work(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < until_time:
            answers[(await update(client, -1, chance.choice(users), service.url))[0]] += 1

    await asyncio.gather(*(work(number) for number in range(64)))
    return answers[200] / seconds, answers


@needs_kills
async def test_while_a_worker_is_dead_the_accounts_of_the_others_go_on(
    there: Database, url: str, tmp_path: Path
) -> None:
    """Transfers between them too. How much of its rate is left is printed; it must only be a rate."""
    dead, *_ = cluster.workers()
    by_worker = users_by_worker(there)
    gone = by_worker.pop(dead.port)
    living = [user_id for users in by_worker.values() for user_id in users]
    async with (
        running_service(environment(url, DEADLINE_SECONDS="4"), tmp_path) as service,
        session(connections_max=0) as client,
    ):
        await rate(client, service, living, 1)
        before, _ = await rate(client, service, living, 4)
        dead.kill()
        try:
            lost = [asyncio.create_task(update(client, -1, user_id, service.url)) for user_id in gone * 3]
            during, answers = await rate(client, service, living, 4)
            pairs = [(payer, payee) for payer in living[:20] for payee in living[-20:] if payer != payee]
            paid = await asyncio.gather(*(transfer(client, one, {other: 1}, service.url) for one, other in pairs))
            lost_answers = Counter(status for status, _ in await asyncio.gather(*lost))
        finally:
            dead.start()
        print({"before": before, "during": during, "share": during / before, "lost": lost_answers})
        assert set(answers) == {200}
        assert {told.status for told in paid} == {200}
        assert set(lost_answers) <= {503, 504}
        async with asyncio.timeout(30):
            status = 0
            while status != 200:
                status, _ = await update(client, -1, gone[0], service.url)
    assert during > before / 3
    assert verify(url).differences == []


async def test_shards_move_while_changes_are_made(there: Database, url: str, tmp_path: Path) -> None:
    one, other, *_ = cluster.workers()
    async with running_service(environment(url), tmp_path) as service, session(connections_max=0) as client:
        moved = asyncio.create_task(asyncio.to_thread(move_a_shard, url, one, other))
        answers: Counter[int] = Counter()
        chance = random.Random(1)
        while not moved.done():
            payer, payee = chance.sample(USERS, 2)
            told = await asyncio.gather(
                *(update(client, -1, user_id, service.url) for user_id in USERS),
                *(update(client, 1, user_id, service.url) for user_id in USERS),
            )
            answers.update(status for status, _ in told)
            answers[(await transfer(client, payer, {payee: 1}, service.url)).status] += 1
        await moved
    assert set(answers) == {200}, answers
    assert verify(url).differences == []


def move_a_shard(url: str, source: cluster.Node, target: cluster.Node) -> None:
    """Move one shard of all tables from one worker to another, while it is written to."""
    with psycopg.connect(url, autocommit=True) as coordinator:
        ((shard,), *_) = coordinator.execute(
            "SELECT shardid FROM pg_dist_shard JOIN pg_dist_placement USING (shardid) JOIN pg_dist_node USING (groupid)"
            " WHERE logicalrelid = 'users'::regclass AND nodeport = %s ORDER BY 1",
            (source.port,),
        ).fetchall()
        coordinator.execute(
            "SELECT citus_move_shard_placement(%s, %s, %s, %s, %s, shard_transfer_mode := 'force_logical')",
            (shard, *source, *target),
        )
