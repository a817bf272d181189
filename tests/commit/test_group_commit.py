"""What becomes of changes that wait together: places, order, twins, contention, and a neighbour that fails.

The rows of the table "when something fails" in which the state of a change stays known; test_lost_statements.py has the
others.
"""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec import structs
from pytest_aiohttp import AiohttpClient

from atomic_balance.changes import Applied, Change, Credit, NoSuchPayee, Outcome, Refusal, Refused, Undecided, transfer
from atomic_balance.http.app import make_app
from atomic_balance.postgres.embedded import embedded_postgres
from atomic_balance.postgres.session import RefusalRecord, Session
from atomic_balance.settings import Settings
from tests.client import UPDATE
from tests.committing import all_of, committing, patient
from tests.database import Database, until
from tests.fault_proxy import Link
from tests.killable import postmaster
from tests.schema import make_schema

pytestmark = pytest.mark.over_both_statements

TAKE_KEY = (
    "INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, refusal)"
    " VALUES (1, 'k', -1, 0, 'insufficient_funds')"
)
INSUFFICIENT = Refused(Refusal.INSUFFICIENT_FUNDS)


# Waiting places


async def test_a_change_beyond_the_waiting_places_is_turned_away_at_once(database: Database) -> None:
    database.open({1: 10, 2: 10})
    async with database.proxied() as (proxy, url):
        proxy.greet = Link.cut
        limits = Settings(database_url=url, waiting_changes_max=3, waiting_changes_per_account_max=2)
        async with committing(limits) as committer:
            waiting = [committer.submit(Change(1, -1)), committer.submit(Change(1, -1)), committer.submit(Change(2, 5))]
            beyond = committer.submit(Change(2, 5))
            assert beyond.done()
            assert beyond.result() is Undecided.TURNED_AWAY
            assert not any(future.done() for future in waiting)
            proxy.greet = None
            assert await all_of(*waiting) == [Applied(9), Applied(8), Applied(15)]
            assert await committer.submit(Change(2, 5)) == Applied(20)


async def test_one_account_can_take_only_its_share_of_the_waiting_places(database: Database) -> None:
    database.open({1: 10, 2: 10})
    async with database.proxied() as (proxy, url):
        proxy.greet = Link.cut
        limits = Settings(database_url=url, waiting_changes_max=10, waiting_changes_per_account_max=2)
        async with committing(limits) as committer:
            waiting = [committer.submit(Change(1, -1)) for _ in range(2)]
            assert [committer.submit(Change(1, -1)).result() for _ in range(20)] == [Undecided.TURNED_AWAY] * 20
            waiting += [committer.submit(Change(2, -1)) for _ in range(2)]
            assert not any(future.done() for future in waiting)
            proxy.greet = None
            assert await all_of(*waiting) == [Applied(9), Applied(8), Applied(9), Applied(8)]
            assert len(database.journal(1)) == 2


async def test_changes_that_expired_leave_their_places(database: Database) -> None:
    database.open({1: 10})
    async with database.proxied() as (proxy, url):
        proxy.greet = Link.cut
        limits = Settings(
            database_url=url, waiting_changes_max=3, waiting_changes_per_account_max=2, deadline_seconds=0.2
        )
        async with committing(limits) as committer:
            for _ in range(3):
                waiting = [committer.submit(Change(1, -1, "a")), committer.submit(Change(1, -1))]
                assert not any(future.done() for future in waiting)
                assert await all_of(*waiting) == [Undecided.TURNED_AWAY] * 2
    assert database.journal(1) == []


async def test_turned_away_is_503_with_retry_after_at_once(aiohttp_client: AiohttpClient, database: Database) -> None:
    async with database.proxied() as (proxy, url):
        proxy.greet = Link.swallow
        limits = Settings(database_url=url, waiting_changes_max=2, waiting_changes_per_account_max=1)
        client = await aiohttp_client(make_app(structs.replace(limits, deadline_seconds=1)))

        async def ask() -> tuple[int, str, str | None, float]:
            started = time.monotonic()
            async with client.post(UPDATE, json={"userId": 1, "amount": 1}) as answer:
                return answer.status, await answer.text(), answer.headers.get("Retry-After"), time.monotonic() - started

        answers = await asyncio.gather(*(ask() for _ in range(10)))
        text = '{"error":"Service unavailable: this request changed nothing, ask again with the same Idempotency-Key"}'
        assert {answer[:3] for answer in answers} == {(503, text, "1")}
        assert sum(answer[3] > 0.5 for answer in answers) == 1  # the one that found a place


async def test_duplicates_share_the_place_of_their_first(database: Database) -> None:
    """Also where every place is taken: who asks again is no further change."""
    database.open({1: 10, 2: 10})
    async with database.proxied() as (proxy, url):
        proxy.greet = Link.cut
        limits = Settings(database_url=url, waiting_changes_max=3, waiting_changes_per_account_max=2)
        async with committing(limits) as committer:
            first = committer.submit(Change(1, -1, "k"))
            duplicates = [committer.submit(Change(1, -1, "k")) for _ in range(2)]
            assert committer.waiting_count == 1
            others = [committer.submit(Change(1, -1)), committer.submit(Change(2, -1))]
            assert committer.full
            assert committer.submit(Change(2, -1)).result() is Undecided.TURNED_AWAY
            late = committer.submit(Change(2, -1, "other"))
            assert late.result() is Undecided.TURNED_AWAY
            beyond = committer.submit(Change(1, -1, "k"))
            assert beyond.result() is Undecided.TURNED_AWAY  # a change can have only so many duplicates
            assert not any(future.done() for future in (first, *duplicates, *others))
            proxy.greet = None
            assert await all_of(first, *duplicates) == [Applied(9), *[Applied(9, replayed=True)] * 2]
            assert await all_of(*others) == [Applied(8), Applied(9)]


# No connection


async def test_without_a_connection_a_change_waits_until_its_deadline(database: Database) -> None:
    database.open({1: 10})
    async with database.proxied() as (proxy, url):
        proxy.greet = Link.cut
        async with committing(Settings(database_url=url, deadline_seconds=1)) as committer:
            started = time.monotonic()
            assert await committer.submit(Change(1, -1, "k")) is Undecided.TURNED_AWAY
            assert time.monotonic() - started > 0.5
            proxy.greet = None
            await until(lambda: database.connected())
            assert await committer.submit(Change(1, -1, "k")) == Applied(9)


async def test_a_host_that_does_not_answer_is_no_connection(database: Database) -> None:
    database.open({1: 10})
    async with database.proxied() as (proxy, url):
        proxy.greet = Link.swallow
        async with committing(Settings(database_url=url, connect_seconds=0.2)) as committer:
            waiting = committer.submit(Change(1, -1))
            await until(lambda: proxy.links)
            proxy.greet = None
            assert await all_of(waiting) == [Applied(9)]


async def test_too_many_connections_is_no_connection(database: Database, debug_log: pytest.LogCaptureFixture) -> None:
    role = f"crowded_{os.getpid()}"
    database.open({1: 10})
    database.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0")
    try:
        database.execute(f"GRANT SELECT, INSERT, UPDATE ON users, balance_changes, pg_dist_shard TO {role}")
        url = database.url.replace("//postgres@", f"//{role}@")
        async with committing(Settings(database_url=url, deadline_seconds=2)) as committer:
            late = committer.submit(Change(1, -1))
            await until(lambda: "TooManyConnectionsError" in debug_log.text)
            assert await all_of(late) == [Undecided.TURNED_AWAY]
            waiting = committer.submit(Change(1, -1))
            database.execute(f"ALTER ROLE {role} CONNECTION LIMIT 20")
            assert await all_of(waiting) == [Applied(9)]
    finally:
        database.execute(f"DROP OWNED BY {role}")
        database.execute(f"DROP ROLE {role}")


async def test_a_server_that_is_shutting_down_is_no_connection(
    tmp_path: Path, debug_log: pytest.LogCaptureFixture
) -> None:
    with contextlib.ExitStack() as first:
        url = first.enter_context(embedded_postgres(tmp_path))
        make_schema(url)
        database = first.enter_context(Database(url))
        database.open({1: 10})
        os.kill(postmaster(tmp_path), signal.SIGTERM)  # sessions may end in their own time, and nobody else may connect
        async with committing(Settings(database_url=url, deadline_seconds=1)) as committer:
            late = committer.submit(Change(1, -1))
            await until(lambda: "CannotConnectNowError" in debug_log.text)
            assert await all_of(late) == [Undecided.TURNED_AWAY]
        async with committing(Settings(database_url=url)) as committer:
            waiting = committer.submit(Change(1, -1))
            first.close()
            with embedded_postgres(tmp_path):
                assert await all_of(waiting) == [Applied(9)]


# Rolled back, because of another transaction


async def test_a_blocked_row_delays_its_own_account_alone(database: Database) -> None:
    others = range(2, 40)
    database.open(dict.fromkeys((1, *others), 10))
    async with committing(Settings(database_url=database.url)) as committer:
        with database.holding(1) as holder:
            blocked = [committer.submit(Change(1, -1)) for _ in range(3)]
            for left in range(9, 4, -1):
                outcomes = await all_of(*(committer.submit(Change(user_id, -1)) for user_id in others))
                assert outcomes == [Applied(left)] * len(others)
            assert not any(future.done() for future in blocked)
            holder.commit()
            assert await all_of(*blocked) == [Applied(9), Applied(8), Applied(7)]


async def test_more_blocked_rows_than_lanes_take_turns(database: Database) -> None:
    database.open(dict.fromkeys(range(1, 21), 10))
    async with committing(Settings(database_url=database.url, deadline_seconds=60)) as committer:
        with database.session("UPDATE users SET balance = balance WHERE id <= 10") as holder:
            blocked = [committer.submit(Change(user_id, -1)) for user_id in range(1, 11)]
            await until(database.blocked)
            # One of the suspects is freed: it gets its turn though the others are still blocked.
            with database.holding(11) as brief:
                freed = committer.submit(Change(11, -1))
                await until(lambda: len(database.blocked()) > 1)
                brief.rollback()
                assert await all_of(freed) == [Applied(9)]
            free = [committer.submit(Change(user_id, -1)) for user_id in range(11, 21)]
            assert (await all_of(*free))[1:] == [Applied(9)] * 9
            assert not any(future.done() for future in blocked)
            holder.commit()
            assert await all_of(*blocked) == [Applied(9)] * 10


async def test_many_blocked_rows_hold_up_nobody_else(database: Database, debug_log: pytest.LogCaptureFixture) -> None:
    """The rows that are held are asked for all at once: one statement finds out, not one for each of them."""
    users, held = range(1, 401), range(1, 401, 2)
    database.open(dict.fromkeys(users, 10))
    async with committing(Settings(database_url=database.url, deadline_seconds=60)) as committer:
        with database.session("UPDATE users SET balance = balance WHERE id % 2 = 1") as holder:
            waiting = {user_id: committer.submit(Change(user_id, -1)) for user_id in users}
            free = [waiting[user_id] for user_id in users if user_id not in held]
            assert await all_of(*free) == [Applied(9)] * len(free)
            of_the_load = [record for record in debug_log.records if "changes: CONTENDED" in record.getMessage()]
            assert len([one for one in of_the_load if "with 1 changes" not in one.getMessage()]) < 10
            for left in range(8, 3, -1):
                again = [committer.submit(Change(user_id, -1)) for user_id in users if user_id not in held]
                assert await all_of(*again) == [Applied(left)] * len(again)
            assert not any(waiting[user_id].done() for user_id in held)
            holder.rollback()
            assert await all_of(*(waiting[user_id] for user_id in held)) == [Applied(9)] * len(held)


async def test_a_row_that_several_transactions_hold_is_found_by_halves(database: Database) -> None:
    """Its header names no transaction, so it can't be asked for: fewer and fewer accounts travel with it.

    However many others are applied meanwhile, which says nothing of those.
    """
    others = range(101, 141)
    database.open(dict.fromkeys((*range(1, 41), *others), 1_000_000))
    share = "SELECT FROM users WHERE id = 7 FOR SHARE"
    async with committing(Settings(database_url=database.url, deadline_seconds=60)) as committer:
        found = asyncio.Event()

        async def press() -> None:
            while not found.is_set():
                await all_of(*(committer.submit(Change(user_id, 1)) for user_id in others))

        with database.session(share), database.session(share):
            waiting = [committer.submit(Change(user_id, -1)) for user_id in range(1, 41)]
            pressing = asyncio.create_task(press())
            blocked = waiting.pop(6)
            assert await all_of(*waiting) == [Applied(999_999)] * 39
            found.set()
            assert not blocked.done()
        await pressing
        assert await all_of(blocked) == [Applied(999_999)]


async def test_a_row_that_was_held_once_is_not_taken_for_held(database: Database) -> None:
    """A transaction that was rolled back leaves its number in the rows, as a batch that failed does."""
    database.open({1: 10, 2: 10})
    for statement in ("UPDATE users SET balance = balance", "SAVEPOINT one; UPDATE users SET balance = balance"):
        async with committing(Settings(database_url=database.url)) as committer:
            session = await committer._connect()
            with database.session(statement) as holder:
                assert await session.blocked_accounts([1, 2, 3]) == {1, 2}
                holder.rollback()
            assert await session.blocked_accounts([1, 2, 3]) == set()
            await session.close()


async def test_a_change_blocked_until_its_deadline_is_turned_away(
    database: Database, debug_log: pytest.LogCaptureFixture
) -> None:
    database.open({1: 10})
    async with committing(Settings(database_url=database.url, deadline_seconds=1)) as committer:
        with database.holding(1):
            blocked = [committer.submit(Change(1, -1)), committer.submit(Change(1, -1, "k"))]
            assert await all_of(*blocked) == [Undecided.TURNED_AWAY] * 2
        assert "LockNotAvailableError" in debug_log.text
        assert await committer.submit(Change(1, -2)) == Applied(8)
    assert [row.amount for row in database.journal(1)] == [-2]


async def test_the_victim_of_a_deadlock_is_sent_again(database: Database, debug_log: pytest.LogCaptureFixture) -> None:
    database.open({1: 10})
    async with committing(patient(database.url)) as committer:
        with database.session("SET deadlock_timeout = '10s'", TAKE_KEY) as other:
            waiting = committer.submit(Change(1, -1, "k"))  # holds the row, and waits for the key
            await until(database.blocked)
            await asyncio.to_thread(other.execute, "UPDATE users SET balance = balance WHERE id = 1")
            await until(lambda: "DeadlockDetectedError" in debug_log.text)
        assert await all_of(waiting) == [Applied(9)]
    assert len(database.journal(1)) == 1


async def test_a_serialization_failure_is_sent_again(database: Database, debug_log: pytest.LogCaptureFixture) -> None:
    database.configure("default_transaction_isolation", "repeatable read")
    database.open({1: 10})
    async with committing(patient(database.url)) as committer:
        with database.holding(1) as holder:
            waiting = committer.submit(Change(1, -1))
            await until(database.blocked)
            holder.commit()
        assert await all_of(waiting) == [Applied(9)]
    assert "SerializationError" in debug_log.text


async def test_a_cancelled_statement_is_sent_again(database: Database, debug_log: pytest.LogCaptureFixture) -> None:
    database.open({1: 10})
    async with committing(patient(database.url)) as committer:
        with database.holding(1) as holder:
            waiting = committer.submit(Change(1, -1))
            for _ in range(3):
                debug_log.clear()
                await until(database.blocked)
                (backend,) = database.blocked()
                assert database.execute("SELECT pg_cancel_backend(%s)", backend) == [(True,)]
                await until(lambda: "QueryCanceledError" in debug_log.text)
            holder.commit()
            assert await all_of(waiting) == [Applied(9)]
    assert len(database.journal(1)) == 1


# Rolled back, because the server can't write now


async def test_a_read_only_server_is_left_for_another_session(
    database: Database, debug_log: pytest.LogCaptureFixture
) -> None:
    database.open({1: 10})
    database.configure("default_transaction_read_only", "on")
    async with committing(Settings(database_url=database.url)) as committer:
        waiting = [committer.submit(Change(1, -1)), committer.submit(Change(1, -1, "k"))]
        await until(lambda: "ReadOnlySQLTransactionError" in debug_log.text)
        # The sessions that there are stay read-only; one that begins from now on may write.
        database.execute(f"ALTER DATABASE {database.name} RESET default_transaction_read_only")
        assert await all_of(*waiting) == [Applied(9), Applied(8)]
    assert len(database.journal(1)) == 2


@pytest.mark.parametrize("code", ["53000", "53100", "53200", "53300", "53400"])
async def test_a_server_without_room_is_asked_again(database: Database, code: str) -> None:
    database.open({1: 10})
    database.fail("true", code)
    async with committing(Settings(database_url=database.url)) as committer:
        waiting = [committer.submit(Change(1, -1)), committer.submit(Change(1, -1, "k"))]
        await until(lambda: database.failures() > 1)
        database.heal()
        assert await all_of(*waiting) == [Applied(9), Applied(8)]
    assert len(database.journal(1)) == 2


@pytest.mark.parametrize("why", ["read-only", "full"])
async def test_a_server_that_cannot_write_until_the_deadline_has_turned_away_it(
    database: Database, debug_log: pytest.LogCaptureFixture, why: str
) -> None:
    database.open({1: 10})
    if why == "full":
        database.fail("true", "53100")
    else:
        database.configure("default_transaction_read_only", "on")
    async with (
        database.proxied() as (proxy, url),
        committing(Settings(database_url=url, deadline_seconds=1)) as committer,
    ):
        late = [committer.submit(Change(1, -1)), committer.submit(Change(1, -1, "k"))]
        await until(lambda: "CANNOT_WRITE" in debug_log.text)
        proxy.greet = Link.cut  # so that it is not in flight again at its deadline
        assert await all_of(*late) == [Undecided.TURNED_AWAY] * 2
    assert database.journal(1) == []


# Rolled back, because the key was taken


@pytest.mark.parametrize("refused", [False, True])
async def test_a_key_that_another_session_binds_meanwhile_gives_its_outcome(
    database: Database, debug_log: pytest.LogCaptureFixture, refused: bool
) -> None:
    database.open({1: 10})
    binding = (
        TAKE_KEY
        if refused
        else "WITH applied AS (UPDATE users SET balance = balance - 1, version = version + 1 WHERE id = 1 RETURNING *)"
        " INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, version)"
        " SELECT id, 'k', -1, balance, version FROM applied"
    )
    async with committing(patient(database.url)) as committer:
        with database.session(binding) as other:
            waiting = [committer.submit(Change(1, -1, "k")), committer.submit(Change(1, -3, "free"))]
            await until(database.blocked)
            other.commit()
        assert "KEY_TAKEN" not in debug_log.text
        taken, free = await all_of(*waiting)
    assert "KEY_TAKEN" in debug_log.text
    assert taken == (Refused(Refusal.INSUFFICIENT_FUNDS, replayed=True) if refused else Applied(9, replayed=True))
    assert free == Applied(7 if refused else 6)
    assert sorted(row.key for row in database.journal(1)) == ["free", "k"]


async def test_a_key_that_another_session_lets_go_of_is_applied(database: Database) -> None:
    database.open({1: 10})
    async with committing(patient(database.url)) as committer:
        with database.session(TAKE_KEY) as other:
            waiting = committer.submit(Change(1, -1, "k"))
            await until(database.blocked)
            other.rollback()
        assert await all_of(waiting) == [Applied(9)]


async def test_a_key_that_stays_in_doubt_until_the_deadline_is_turned_away(database: Database) -> None:
    database.open({1: 10, 2: 10})
    async with committing(Settings(database_url=database.url, deadline_seconds=1)) as committer:
        with database.session(TAKE_KEY):
            doubtful = committer.submit(Change(1, -1, "k"))
            await until(database.blocked)
            assert await committer.submit(Change(2, -1)) == Applied(9)
            assert await all_of(doubtful) == [Undecided.TURNED_AWAY]
    assert database.balance(1) == 10


async def test_a_refusal_whose_key_is_in_doubt_delays_its_own_account_alone(database: Database) -> None:
    database.open({1: 0, 2: 10})
    async with committing(Settings(database_url=database.url, deadline_seconds=1)) as committer:
        with database.session(TAKE_KEY):
            doubtful = committer.submit(Change(1, -1, "k"))
            await until(database.blocked)
            assert await committer.submit(Change(2, -1)) == Applied(9)
            assert not doubtful.done()
            assert await all_of(doubtful) == [Undecided.TURNED_AWAY]


async def test_who_was_refused_while_a_neighbours_key_is_in_doubt_is_never_applied_afterwards(
    database: Database,
) -> None:
    """The batch is not sent a second time as it was: what was answered meanwhile is not in it any more."""
    database.open({1: 0, 2: 0, 3: 0, 4: 10})
    async with committing(Settings(database_url=database.url, deadline_seconds=20)) as committer:
        with database.session(TAKE_KEY):
            doubtful = committer.submit(Change(1, -1, "k"))
            neighbours = [committer.submit(Change(2, -5)), committer.submit(Change(4, -1))]
            keyed = committer.submit(Change(3, -1, "other"))
            assert await all_of(neighbours[0]) == [INSUFFICIENT]
            database.execute("UPDATE users SET balance = 100, opening_balance = 100 WHERE id = 2")
            assert await all_of(neighbours[1], keyed) == [Applied(9), INSUFFICIENT]
            assert await all_of(committer.submit(Change(4, -1)), committer.submit(Change(3, -1, "third"))) == [
                Applied(8),
                INSUFFICIENT,
            ]
            assert not doubtful.done()
        assert await all_of(doubtful) == [INSUFFICIENT]
    assert database.journal(2) == []
    assert [row.amount for row in database.journal(4)] == [-1, -1]


async def test_many_refusals_are_recorded_in_statements_of_limited_size(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    record_refusals = Session.record_refusals

    async def counted(session: Session, refusals: list[RefusalRecord], lock_seconds: float) -> set[tuple[int, str]]:
        sizes.append(len(refusals))
        return await record_refusals(session, refusals, lock_seconds)

    monkeypatch.setattr(Session, "record_refusals", counted)
    database.open({1: 0})
    async with committing(Settings(database_url=database.url, changes_per_statement_max=10)) as committer:
        waiting = [committer.submit(Change(1, -1, f"k{number}")) for number in range(95)]
        assert await all_of(*waiting) == [INSUFFICIENT] * 95
    assert sum(sizes) == 95
    assert max(sizes) == 10
    assert len(database.journal(1)) == 95


# Rejected: the fault of one change


@pytest.mark.parametrize("at_commit", [False, True])
@pytest.mark.parametrize("code", ["P0001", "23514", "22003", "42501"])
async def test_a_change_that_fails_is_500_and_its_neighbours_are_applied(
    database: Database, code: str, at_commit: bool
) -> None:
    database.open({1: 10, 2: 10, 3: 10})
    database.fail("NEW.reference = 'bad'", code, at_commit=at_commit)
    async with committing(Settings(database_url=database.url)) as committer:
        changes = [
            Change(1, -1),
            Change(2, -1),
            Change(2, -1, reference="bad"),
            Change(2, -2, "k", reference="bad"),
            Change(2, -3, "l"),
            Change(2, -20),
            Change(3, -1),
        ]
        outcomes = await all_of(*(committer.submit(change) for change in changes))
        assert outcomes == [
            Applied(9),
            Applied(9),
            Undecided.FAILED,
            Undecided.FAILED,
            Applied(6),
            INSUFFICIENT,
            Applied(9),
        ]
        assert [row.amount for row in database.journal(2)] == [-1, -3]
        # What failed has bound nothing, and its account is as good as any other.
        assert await committer.submit(Change(2, -2, "k")) == Applied(4)


async def test_a_failure_is_answered_with_nothing_of_its_cause(
    aiohttp_client: AiohttpClient, database: Database
) -> None:
    database.open({1: 10})
    database.fail("true", "P0001")
    client = await aiohttp_client(make_app(Settings(database_url=database.url)))
    async with client.post(UPDATE, json={"userId": 1, "amount": 1}) as answer:
        assert (answer.status, await answer.text()) == (500, '{"error":"Internal server error"}')


async def test_a_version_that_the_journal_has_already_is_the_fault_of_its_account(database: Database) -> None:
    """A unique violation, but not of a key: sent again it would fail for ever."""
    database.open({1: 10, 2: 10})
    database.execute(
        "INSERT INTO balance_changes (user_id, version, amount, balance, idempotency_key) VALUES (1, 1, 1, 1, 'stray')"
    )
    async with committing(Settings(database_url=database.url)) as committer:
        waiting = [committer.submit(Change(1, -1)), committer.submit(Change(2, -1))]
        assert await all_of(*waiting) == [Undecided.FAILED, Applied(9)]


async def test_a_refusal_that_cannot_be_recorded_is_500(database: Database) -> None:
    database.open({1: 0, 2: 0})
    database.fail("NEW.user_id = 1", "P0001")
    async with committing(Settings(database_url=database.url)) as committer:
        waiting = [committer.submit(Change(user_id, -1, "k")) for user_id in (1, 2)]
        assert await all_of(*waiting) == [Undecided.FAILED, INSUFFICIENT]


async def test_a_refusal_that_cannot_be_recorded_leaves_the_accounts_others_theirs(database: Database) -> None:
    """What goes alone is judged alone too, or the refusal at fault would be recorded with the others again."""
    database.open({1: 0})
    database.fail("NEW.idempotency_key = 'bad'", "P0001")
    async with committing(Settings(database_url=database.url)) as committer:
        waiting = [committer.submit(Change(1, -1, key)) for key in ("good", "bad", "better")]
        assert await all_of(*waiting) == [INSUFFICIENT, Undecided.FAILED, INSUFFICIENT]
    assert [row.key for row in database.journal(1)] == ["good", "better"]


async def test_a_reason_that_only_a_newer_version_knows_is_500_and_disturbs_nobody(database: Database) -> None:
    database.open({1: 10, 2: 10})
    database.execute("ALTER TABLE balance_changes DROP CONSTRAINT balance_changes_refusal_known")
    database.execute(
        "INSERT INTO balance_changes (user_id, idempotency_key, amount, balance, refusal) VALUES (1, 'k', -1, 0, 'new')"
    )
    async with committing(Settings(database_url=database.url)) as committer:
        waiting = [
            committer.submit(Change(1, -1, "k")),
            committer.submit(Change(1, -2)),
            committer.submit(Change(2, -1)),
        ]
        assert await all_of(*waiting) == [Undecided.FAILED, Applied(8), Applied(9)]


# Order


async def test_changes_of_an_account_are_applied_in_the_order_of_their_arrival(database: Database) -> None:
    """Whatever comes between: refusals, full statements, and a change that is rejected."""
    database.open({1: 1_000, 2: 1_000})
    database.fail("NEW.reference = '777'", "P0001")
    amounts = random.Random(5)
    async with committing(Settings(database_url=database.url, changes_per_statement_max=100)) as committer:
        futures = []
        for number in range(3_000):
            amount = amounts.choice((-400, -90, -20, -3, 5, 17, 300))
            futures.append(committer.submit(Change(1 + number % 2, amount, reference=str(number))))
            if number % 250 == 0:
                await asyncio.sleep(0.01)
        outcomes = await all_of(*futures)
    applied = [str(number) for number, outcome in enumerate(outcomes) if isinstance(outcome, Applied)]
    assert {type(outcome) for outcome in outcomes} == {Applied, Refused, Undecided}
    for user_id in (1, 2):
        journal = database.journal(user_id)
        assert [row.reference for row in journal] == [
            reference for reference in applied if int(reference) % 2 == user_id - 1
        ]
        assert [row.version for row in journal] == list(range(1, len(journal) + 1))


_users = itertools.count(1)


@given(
    st.integers(0, 30),
    st.lists(st.tuples(st.integers(-20, 20).filter(bool), st.sampled_from([None, None, "a", "b", "c"])), max_size=12),
)
@hypothesis_settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_the_outcomes_of_a_batch_are_those_of_some_order_one_by_one(
    database: Database, balance: int, changes: list[tuple[int, str | None]]
) -> None:
    user_id = next(_users)
    database.open({user_id: balance})
    async with committing(Settings(database_url=database.url, lanes=2)) as committer:
        outcomes = await all_of(*(committer.submit(Change(user_id, amount, key)) for amount, key in changes))
    # Those applied are in order of arrival; a refusal can be put anywhere among them, all came at once.
    balances = [balance]
    first: dict[str, tuple[int, Outcome]] = {}
    for (amount, key), outcome in zip(changes, outcomes, strict=True):
        if key in first:
            known, known_outcome = first[key]
            if amount != known:
                assert outcome is Undecided.KEY_REUSED
            else:
                assert not isinstance(known_outcome, Undecided)
                assert outcome == structs.replace(known_outcome, replayed=True)
            continue
        if key is not None:
            first[key] = amount, outcome
        if isinstance(outcome, Applied):
            balances.append(balances[-1] + amount)
            assert outcome == Applied(balances[-1])
        else:
            assert outcome == INSUFFICIENT
            first.setdefault(f" {len(first)}", (amount, outcome))
    refused = [amount for amount, outcome in first.values() if isinstance(outcome, Refused)]
    assert all(any(known + amount < 0 for known in balances) for amount in refused)
    assert min(balances) >= 0
    assert [row.balance for row in database.journal(user_id) if row.version] == balances[1:]


# Twins


async def test_twins_share_the_outcome(database: Database) -> None:
    database.open({1: 10})
    async with database.proxied() as (proxy, url):
        proxy.greet = Link.cut
        async with committing(Settings(database_url=url)) as committer:
            applied = [committer.submit(Change(1, -1, "k")) for _ in range(3)]
            other_amount = committer.submit(Change(1, -2, "k"))
            other_reference = committer.submit(Change(1, -1, "k", "r"))
            other_user = committer.submit(Change(2, -1, "k"))
            refused = [committer.submit(Change(1, -20, "l")) for _ in range(3)]
            proxy.greet = None
            assert await all_of(*applied) == [Applied(9), Applied(9, replayed=True), Applied(9, replayed=True)]
            assert await all_of(*refused) == [INSUFFICIENT, *[structs.replace(INSUFFICIENT, replayed=True)] * 2]
            assert await all_of(other_amount, other_reference) == [Undecided.KEY_REUSED] * 2
            assert await all_of(other_user) == [Undecided.NO_SUCH_USER]
    assert [row.key for row in database.journal(1)] == ["k", "l"]


async def test_a_repetition_behind_another_change_with_its_key_gets_its_own_outcome(database: Database) -> None:
    """Which of the two the key is bound to, the journal says, and not who came first."""
    database.open({1: 10})
    async with committing(Settings(database_url=database.url)) as committer:
        assert await committer.submit(Change(1, -1, "k")) == Applied(9)
        assert await committer.submit(Change(1, -20, "l")) == INSUFFICIENT
        changes = [Change(1, amount, key) for key in ("k", "l") for amount in (-2, -1, -20)]
        outcomes = await all_of(*map(committer.submit, changes))
    reused = Undecided.KEY_REUSED
    refused = structs.replace(INSUFFICIENT, replayed=True)
    assert outcomes == [reused, Applied(9, replayed=True), reused, reused, reused, refused]


async def test_another_change_with_the_key_of_one_that_bound_none_is_sent(database: Database) -> None:
    database.open({1: 10})
    async with committing(Settings(database_url=database.url)) as committer:
        wrong, right = transfer(1, [Credit(99, 1)], "k", None), Change(1, -1, "k")
        assert await all_of(committer.submit(wrong), committer.submit(right)) == [NoSuchPayee(99), Applied(9)]


async def test_twins_share_what_is_not_an_outcome(database: Database) -> None:
    async with database.proxied() as (proxy, url):
        proxy.greet = Link.cut
        async with committing(Settings(database_url=url, deadline_seconds=0.2)) as committer:
            twins = [committer.submit(Change(1, -1, "k")) for _ in range(3)]
            assert await all_of(*twins) == [Undecided.TURNED_AWAY] * 3


# Clients that vanish


async def test_a_change_whose_client_has_gone_is_applied_once(database: Database) -> None:
    database.open({1: 10, 2: 10})
    async with committing(Settings(database_url=database.url)) as committer:
        with database.holding(1):
            gone = [committer.submit(Change(1, -1)), committer.submit(Change(1, -2, "k"))]
            await until(database.blocked)
            gone.append(committer.submit(Change(1, -3)))
            for future in gone:
                future.cancel()
            assert await committer.submit(Change(2, -1)) == Applied(9)
        assert await committer.submit(Change(1, -2, "k")) == Applied(7, replayed=True)
        await until(lambda: database.balance(1) == 4)
    assert [row.amount for row in database.journal(1)] == [-1, -2, -3]


async def test_a_client_that_goes_before_its_change_is_sent_leaves_its_place(database: Database) -> None:
    database.open({1: 10, 2: 10})
    async with database.proxied() as (proxy, url):
        proxy.greet = Link.cut
        limits = Settings(database_url=url, waiting_changes_max=2, waiting_changes_per_account_max=1)
        async with committing(limits) as committer:
            for future in (committer.submit(Change(1, -1)), committer.submit(Change(2, -1))):
                future.cancel()
            proxy.greet = None
            await until(lambda: not committer.waiting_count)
            assert len(database.journal(1) + database.journal(2)) == 2
            assert await all_of(*(committer.submit(Change(user_id, -1)) for user_id in (1, 2))) == [Applied(8)] * 2


async def test_a_twin_gets_its_outcome_though_the_first_client_has_gone(database: Database) -> None:
    database.open({1: 10})
    async with committing(Settings(database_url=database.url)) as committer:
        with database.holding(1):
            first = committer.submit(Change(1, -1, "k"))
            twins = [committer.submit(Change(1, -1, "k")) for _ in range(2)]
            first.cancel()
            twins[0].cancel()
        assert await all_of(twins[1]) == [Applied(9, replayed=True)]
        assert await committer.submit(Change(1, -1, "k")) == Applied(9, replayed=True)
    assert len(database.journal(1)) == 1


# A fault of the service's own


async def test_what_was_committed_is_not_said_to_have_changed_nothing_when_the_service_fails_right_after(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.open({1: 10})
    async with committing(Settings(database_url=database.url)) as committer:

        def fail(*_: object) -> None:
            raise RuntimeError("unforeseen")

        monkeypatch.setattr(committer._answering, "_settle_applied", fail)
        assert await all_of(committer.submit(Change(1, -1))) == [Undecided.UNKNOWN]
    assert database.balance(1) == 9
