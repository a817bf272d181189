"""Expired holds are settled: soon, never early, whatever is in the way."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from msgspec import structs

from atomic_balance.changes import Applied, Change, Undecided, hold, release
from atomic_balance.commit.expiry import Expiry
from atomic_balance.commit.group_commit import GroupCommit
from atomic_balance.postgres.accounts import Accounts
from atomic_balance.postgres.connections import connection_pool
from atomic_balance.postgres.statements import EXPIRED_HOLDS, in_schema
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.committing import all_of, committing
from tests.database import Database, until
from tests.fault_proxy import Link

pytestmark = pytest.mark.slow


@contextlib.asynccontextmanager
async def expiring(settings: Settings) -> AsyncIterator[tuple[GroupCommit, Expiry]]:
    """What a service settles expired holds with."""
    async with (
        connection_pool(settings) as pool,
        committing(settings) as committer,
        Expiry(Accounts(pool, settings), committer, settings.waiting_changes_max // 4).running() as expiry,
    ):
        yield committer, expiry


def counted(expiry: Expiry) -> tuple[int, float, int]:
    return expiry.open_holds, expiry.held, expiry.overdue_holds


async def place(committer: GroupCommit, user_id: int, *hold_ids: str, seconds: int = 1) -> None:
    """Set 1 aside under each id."""
    outcomes = await all_of(*(committer.submit(hold(user_id, one, 1, seconds, None)) for one in hold_ids))
    assert all(isinstance(outcome, Applied) and not outcome.replayed for outcome in outcomes)


def open_holds(database: Database, user_id: int | None = None) -> int:
    """How many holds of one user or of all are open."""
    return int(
        database.execute(
            "SELECT count(*) FROM open_holds WHERE coalesce(user_id = %s, true)",
            user_id,
        )[0][0]
    )


def lateness_seconds(database: Database) -> tuple[float, float]:
    """How long after their ends holds expired, by the database's clock: the shortest and the longest."""
    ((least, most),) = database.execute(
        "SELECT extract(epoch FROM min(late))::float8, extract(epoch FROM max(late))::float8"
        "  FROM (SELECT settled.expires_at - placed.expires_at AS late"
        "          FROM balance_changes AS placed JOIN balance_changes AS settled"
        "            ON settled.user_id = placed.user_id"
        "           AND settled.idempotency_key = ' settlement ' || placed.idempotency_key"
        "         WHERE settled.expires_at IS NOT NULL) AS expired"
    )
    return least, most


async def test_thousands_of_holds_that_expire_at_once_are_soon_free(database: Database) -> None:
    database.open(dict.fromkeys(range(1, 51), 1_000))
    async with expiring(Settings(database_url=database.url)) as (committer, _):
        await asyncio.gather(
            *(place(committer, user, *(f"hold-{number}" for number in range(100)), seconds=2) for user in range(1, 51))
        )
        await until(lambda: not open_holds(database))
    least, most = lateness_seconds(database)
    assert 0 <= least < most < 10
    assert database.execute("SELECT sum(held), sum(version) FROM users") == [(0, 10_000)]
    assert verify(database.url).differences == []


async def test_a_blocked_account_with_very_many_expired_holds_keeps_no_other_waiting(database: Database) -> None:
    database.open({1: 100_000, 2: 100})
    async with committing(Settings(database_url=database.url, deadline_seconds=50)) as committer:
        for start in range(0, 12_000, 1_000):
            await place(committer, 1, *(f"hold-{start + number}" for number in range(1_000)))
        await place(committer, 2, "hold")
    settings = Settings(database_url=database.url, lock_seconds=0.5, statement_seconds=2, deadline_seconds=3)
    with database.holding(1):
        async with expiring(settings):
            await until(lambda: not open_holds(database, 2))
            assert open_holds(database, 1) == 12_000


async def test_a_stop_waits_for_the_settlements_under_way_and_leaves_no_task(database: Database) -> None:
    database.open({1: 100})
    settings = Settings(database_url=database.url)
    before = asyncio.all_tasks()
    with database.holding(1) as blocker:
        blocker.rollback()
        async with expiring(settings) as (committer, _):
            await place(committer, 1, "hold")
            blocker.execute("UPDATE users SET balance = balance WHERE id = 1")
            await until(lambda: committer.waiting_count)
            asyncio.get_running_loop().call_later(0.5, blocker.rollback)
        assert open_holds(database) == 0
    assert asyncio.all_tasks() == before


async def test_what_expired_while_nobody_was_there_is_settled_after_the_start(database: Database) -> None:
    database.open({1: 10_000})
    settings = Settings(database_url=database.url)
    async with committing(settings) as committer:
        await place(committer, 1, *(f"hold-{number}" for number in range(2_500)))
    await asyncio.sleep(1.5)
    assert open_holds(database) == 2_500
    async with expiring(settings):
        await until(lambda: not open_holds(database))
    assert verify(database.url).differences == []


async def test_holds_that_expire_during_an_outage_are_settled_after_it(database: Database) -> None:
    database.open({1: 10_000})
    async with database.proxied() as (proxy, url):
        settings = Settings(database_url=url, statement_seconds=0.5, deadline_seconds=1)
        async with expiring(settings) as (committer, _):
            await place(committer, 1, *(f"hold-{number}" for number in range(1_000)))
            proxy.greet = Link.cut
            proxy.cut()
            await asyncio.sleep(2)
            assert open_holds(database) == 1_000
            proxy.greet = None
            await until(lambda: not open_holds(database))
    assert verify(database.url).differences == []


async def test_settlements_whose_answers_are_lost_count_once(database: Database) -> None:
    database.open({1: 10_000})
    async with (
        database.proxied() as (proxy, url),
        expiring(Settings(database_url=url, statement_seconds=0.5)) as (committer, _),
    ):
        await place(committer, 1, *(f"hold-{number}" for number in range(500)))
        await asyncio.sleep(0.9)
        for _ in range(5):
            for link in proxy.links:
                link.cut_at_answer()
            await asyncio.sleep(0.2)
        await until(lambda: not open_holds(database))
    assert database.execute("SELECT held, version FROM users") == [(0, 1_000)]
    assert verify(database.url).differences == []


async def test_one_process_at_a_time_has_the_turn_and_another_takes_it_over(database: Database) -> None:
    database.open({1: 10_000})
    settings = Settings(database_url=database.url)

    def holder() -> str:
        return str(database.execute("SELECT holder FROM expiry_turn")[0][0])

    async with expiring(settings) as (committer, _):
        async with expiring(settings):
            await until(holder)
            first = holder()
            await place(committer, 1, "one")
            await until(lambda: not open_holds(database))
            assert holder() == first
        # Whoever has had it is gone now, or is the one who stays.
        await place(committer, 1, "other")
        await until(lambda: not open_holds(database))
    async with expiring(settings) as (committer, _):
        await place(committer, 1, "third")
        await until(lambda: not open_holds(database))
        assert holder() != first
    assert lateness_seconds(database)[0] >= 0


async def test_what_one_read_before_another_settled_it_does_no_harm(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that stood still after it had read which holds have expired goes on when they are settled."""
    database.open({1: 10_000})
    settings = Settings(database_url=database.url)
    stands_still, goes_on = asyncio.Event(), asyncio.Event()
    read = Accounts.expired_holds

    async def read_and_stand_still(self: Accounts, *arguments: object) -> object:
        found = await read(self, *arguments)  # type: ignore[arg-type]
        if found and not stands_still.is_set():
            stands_still.set()
            await goes_on.wait()
        return found

    monkeypatch.setattr(Accounts, "expired_holds", read_and_stand_still)
    async with expiring(settings) as (committer, _), expiring(settings):
        await place(committer, 1, *(f"hold-{number}" for number in range(500)))
        await stands_still.wait()
        await until(lambda: not open_holds(database))
        assert isinstance((await all_of(committer.submit(Change(1, 7))))[0], Applied)
        goes_on.set()
        await place(committer, 1, "later")
        await until(lambda: not open_holds(database))
    assert database.execute("SELECT balance, held, version FROM users") == [(10_007, 0, 1_003)]
    assert verify(database.url).differences == []


async def test_open_and_overdue_holds_are_counted_by_whoever_has_the_turn(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atomic_balance.commit.expiry._COUNT_SECONDS", 0)
    database.open({1: 100})
    settings = Settings(database_url=database.url, lock_seconds=0.2)
    async with expiring(settings) as (committer, expiry):
        await place(committer, 1, "long", "long too", seconds=1_000)
        await until(lambda: counted(expiry) == (2, 2, 0))
        await place(committer, 1, "short")
        with database.holding(1):
            await until(lambda: counted(expiry) == (3, 3, 1))
        await until(lambda: counted(expiry) == (2, 2, 0))
        database.execute("UPDATE expiry_turn SET holder = 'another', until = clock_timestamp() + interval '1 second'")
        await until(lambda: counted(expiry) == (0, 0, 0))
        await until(lambda: counted(expiry) == (2, 2, 0))


async def test_expiry_takes_no_more_than_its_share_of_the_places(database: Database) -> None:
    """Nor is it turned away by the thousand while none is free."""
    database.open({1: 5_000, 2: 10})
    settings = Settings(
        database_url=database.url, lock_seconds=0.1, waiting_changes_max=80, waiting_changes_per_account_max=40
    )
    async with committing(
        structs.replace(settings, waiting_changes_max=5_000, waiting_changes_per_account_max=4_000)
    ) as c:
        await place(c, 1, *(f"hold-{number}" for number in range(1_000)))
    with database.holding(1):
        async with expiring(settings) as (committer, _):
            await until(lambda: committer.waiting_count >= 20)
            for _ in range(20):
                assert committer.waiting_count <= 21
                assert await committer.submit(Change(2, 1)) != Undecided.TURNED_AWAY
                await asyncio.sleep(0.05)


async def test_who_has_lost_the_turn_looks_for_it_now_and_then(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the last settlement of a full account has woken it."""
    looks = 0
    take_expiry_turn = Accounts.take_expiry_turn

    async def counting(self: Accounts, holder: str) -> bool:
        nonlocal looks
        looks += 1
        return await take_expiry_turn(self, holder)

    async with expiring(Settings(database_url=database.url)) as (_, expiry):
        await until(lambda: expiry._has_turn)
        database.execute("UPDATE expiry_turn SET holder = 'another', until = 'infinity'")
        await until(lambda: not expiry._has_turn)
        monkeypatch.setattr(Accounts, "take_expiry_turn", counting)
        expiry._wake.set()
        await asyncio.sleep(2)
    assert 1 <= looks <= 6


async def test_a_turn_that_was_deleted_is_taken_all_the_same(database: Database) -> None:
    database.open({1: 10})
    database.execute("DELETE FROM expiry_turn")
    async with expiring(Settings(database_url=database.url)) as (committer, _):
        await place(committer, 1, "hold")
        await until(lambda: not open_holds(database))


async def test_a_settlement_that_contradicts_what_is_held_fails_and_its_account_goes_on(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """As after somebody has set `held` by hand."""
    database.open({1: 10})
    async with committing(Settings(database_url=database.url)) as committer:
        await place(committer, 1, "hold", seconds=1_000)
        database.execute("UPDATE users SET held = 0")
        settlement = committer.submit(release(1, "hold", 1))
        assert await all_of(committer.submit(Change(1, -1)), settlement) == [Applied(9), Undecided.FAILED]
    assert "run atomic-balance verify" in caplog.text


def test_expired_holds_are_found_by_the_index(database: Database) -> None:
    """Among millions that have not expired."""
    database.execute(
        "INSERT INTO open_holds SELECT 1, id::text, 1, clock_timestamp() + interval '1 day'"
        "  FROM generate_series(1, 20000) AS id"
    )
    database.execute("ANALYZE open_holds")
    for mode in ("force_custom_plan", "force_generic_plan"):
        with database.session(
            f"SET plan_cache_mode = {mode}",
            f"PREPARE it (timestamptz, bigint, text, bigint[], bigint) AS {in_schema(EXPIRED_HOLDS, None)}",
        ) as session:
            rows = session.execute("EXPLAIN EXECUTE it ('-infinity', 0, '', '{}', 1000)").fetchall()
            plan = "\n".join(row[0] for row in rows)
            assert "Index Cond: (expires_at <=" in plan.replace("((expires_at", "(expires_at"), plan
