"""What becomes of a change whose statement was lost: its outcome is found by its key, and it counts once.

The rows of the table "when something fails" that leave the outcome of a statement unknown.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs
from pytest_aiohttp import AiohttpClient

from atomic_balance.changes import Applied, Change, Refusal, Refused, Undecided
from atomic_balance.http.app import make_app
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.client import UPDATE
from tests.committing import all_of, committing, patient
from tests.database import Database, until
from tests.fault_proxy import FaultProxy, Link
from tests.killable import killable_server

pytestmark = pytest.mark.over_both_statements

INSUFFICIENT = Refused(Refusal.INSUFFICIENT_FUNDS)

Fault = Callable[[Link], None]


def quick(url: str) -> Settings:
    """Give a statement up soon."""
    return Settings(database_url=url, statement_seconds=0.4)


# Lost, and found


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize(
    "fault", [Link.cut, Link.cut_at_answer, Link.swallow, Link.swallow_requests, Link.swallow_answers, Link.garble]
)
async def test_a_change_whose_statement_or_answer_was_lost_is_applied_once(
    database: Database, fault: Fault, key: str | None
) -> None:
    database.open({1: 10, 2: 10, 3: 1})
    async with database.proxied() as (proxy, url), committing(quick(url)) as committer:
        struck = proxy.strike(b"here", fault)
        changes = [Change(1, -4, key, "here"), Change(1, 1), Change(2, -10), Change(3, -2, key)]
        assert await all_of(*(committer.submit(change) for change in changes)) == [
            Applied(6),
            Applied(7),
            Applied(0),
            INSUFFICIENT,
        ]
        assert struck.done()
        if key:
            assert await committer.submit(changes[0]) == Applied(6, replayed=True)
    assert [row.amount for row in database.journal(1)] == [-4, 1]
    assert [row.amount for row in database.journal(2)] == [-10]


@pytest.mark.parametrize("fault", [Link.cut, Link.cut_at_answer, Link.swallow])
async def test_a_refusal_that_was_lost_while_being_recorded_is_refused_once(database: Database, fault: Fault) -> None:
    database.open({1: 10})
    async with database.proxied() as (proxy, url), committing(quick(url)) as committer:
        struck = proxy.strike(b"insufficient_funds", fault)
        twins = [committer.submit(Change(1, -11, "k")) for _ in range(2)]
        assert await all_of(*twins) == [INSUFFICIENT, structs.replace(INSUFFICIENT, replayed=True)]
        assert struck.done()
        assert await committer.submit(Change(1, 5)) == Applied(15)
        assert await committer.submit(Change(1, -11, "k")) == structs.replace(INSUFFICIENT, replayed=True)
    assert {row.key for row in database.journal(1) if row.refusal} == {"k"}


async def test_an_outcome_found_after_a_lost_answer_is_the_first_ones_and_a_replay_to_all_others(
    database: Database,
) -> None:
    database.open({1: 10})
    async with database.proxied() as (proxy, url), committing(quick(url)) as committer:
        proxy.strike(b"key", Link.cut_at_answer)
        twins = [committer.submit(Change(1, -1, "key")) for _ in range(3)]
        assert await all_of(*twins) == [Applied(9), Applied(9, replayed=True), Applied(9, replayed=True)]
        assert await committer.submit(Change(1, -1, "key")) == Applied(9, replayed=True)
    assert len(database.journal(1)) == 1


async def test_the_first_answer_after_a_lost_one_is_not_marked_as_replayed(
    aiohttp_client: AiohttpClient, database: Database
) -> None:
    database.open({1: 10})
    async with database.proxied() as (proxy, url):
        client = await aiohttp_client(make_app(Settings(database_url=url)))
        answers = []
        for key, amount in (("applied", -1), ("applied", -1), ("refused", -20), ("refused", -20)):
            proxy.strike(key.encode(), Link.cut_at_answer)
            headers = {"Idempotency-Key": key}
            async with client.post(UPDATE, json={"userId": 1, "amount": amount}, headers=headers) as answer:
                answers.append((answer.status, answer.headers.get("Idempotent-Replayed")))
        assert answers[0] == (200, None)
        assert answers[2] == (400, None)
        assert [status for status, _ in answers] == [200, 200, 400, 400]


async def test_a_repetition_while_the_database_is_away_says_of_itself_alone_that_it_changed_nothing(
    aiohttp_client: AiohttpClient, database: Database
) -> None:
    """The first answer may have been lost on its way to the caller, and the change is there."""
    database.open({1: 10})
    update = {"userId": 1, "amount": -4}
    error = "Service unavailable: this request changed nothing, ask again with the same Idempotency-Key"
    async with database.proxied() as (proxy, url):
        client = await aiohttp_client(make_app(Settings(database_url=url, deadline_seconds=1, statement_seconds=0.5)))

        async def ask() -> tuple[int, object]:
            async with client.post(UPDATE, json=update, headers={"Idempotency-Key": "k"}) as answer:
                return answer.status, await answer.json()

        async def ask_in_bulk() -> tuple[int, object]:
            body = {"updates": [{**update, "idempotencyKey": "k"}]}
            async with client.post(f"{UPDATE}s", json=body) as answer:
                return answer.status, await answer.json()

        assert await ask() == (200, {"userId": 1, "newBalance": 6})
        proxy.greet = Link.cut
        proxy.cut()
        assert list(await asyncio.gather(ask(), ask_in_bulk())) == [
            (503, {"error": error}),
            (200, {"results": [{"status": 503, "error": error}]}),
        ]
        proxy.greet = None
        assert await ask() == (200, {"userId": 1, "newBalance": 6})
    assert len(database.journal(1)) == 1


def impatient(url: str) -> Settings:
    """Have no time for a second try."""
    return Settings(database_url=url, statement_seconds=2, deadline_seconds=3.9)


async def test_an_idle_connection_that_went_dead_unnoticed_costs_one_statements_time(database: Database) -> None:
    """It is not asked again, nor asked to close."""
    database.open({1: 10})
    async with database.proxied() as (proxy, url), committing(impatient(url)) as committer:
        assert await committer.submit(Change(1, -1)) == Applied(9)
        for link in proxy.links:
            link.swallow()
        assert await committer.submit(Change(1, -1)) == Applied(8)
        proxy.cut()
        assert await committer.submit(Change(1, -1)) == Applied(7)
    assert len(database.journal(1)) == 3


async def test_a_slow_network_costs_time_alone(database: Database) -> None:
    database.open({1: 10})
    async with database.proxied() as (proxy, url), committing(Settings(database_url=url)) as committer:
        proxy.latency_seconds = 0.05
        waiting = [committer.submit(Change(1, -1)) for _ in range(12)]
        assert Counter(map(type, await all_of(*waiting))) == {Applied: 10, Refused: 2}


# A session that ends, whatever it says


async def test_a_terminated_backend_is_an_unknown_outcome_and_the_change_is_applied_once(database: Database) -> None:
    database.open({1: 10, 2: 10})
    async with committing(patient(database.url)) as committer:
        with database.holding(1):
            waiting = [
                committer.submit(Change(1, -1)),
                committer.submit(Change(1, -1, "k")),
                committer.submit(Change(2, -1)),
            ]
            for _ in range(3):
                await until(database.blocked)
                (backend,) = database.blocked()
                database.execute("SELECT pg_terminate_backend(%s, 5000)", backend)
        assert await all_of(*waiting) == [Applied(9), Applied(8), Applied(9)]
    assert len(database.journal(1)) == 2


async def test_a_session_that_the_server_ends_for_any_reason_is_an_unknown_outcome(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """FATAL, whatever its code: nobody told us that the transaction had ended."""
    if database.execute("SELECT current_setting('server_version_num')::int < 170000")[0][0]:
        pytest.skip("transaction_timeout came with PostgreSQL 17")
    database.open({1: 10})
    database.configure("transaction_timeout", "100ms")
    async with committing(patient(database.url)) as committer:
        with database.session("SET transaction_timeout = 0", "UPDATE users SET balance = balance WHERE id = 1"):
            waiting = committer.submit(Change(1, -1))
            await until(lambda: caplog.text.count("transaction timeout") > 1)
        assert await all_of(waiting) == [Applied(9)]
    assert len(database.journal(1)) == 1


@pytest.mark.parametrize(
    ("code", "at_commit"), [("08006", False), ("57P01", False), ("57P02", True), ("40003", False), ("40003", True)]
)
async def test_an_error_that_says_nothing_of_the_transaction_is_an_unknown_outcome(
    database: Database, code: str, at_commit: bool
) -> None:
    database.open({1: 10})
    database.fail("NEW.user_id = 1", code, times=2, at_commit=at_commit)
    async with committing(Settings(database_url=database.url)) as committer:
        assert await committer.submit(Change(1, -1, "k")) == Applied(9)
    assert database.failures() == 3


async def test_an_outcome_that_stays_unknown_is_504(database: Database) -> None:
    database.open({1: 10})
    database.fail("true", "40003")
    async with committing(Settings(database_url=database.url, deadline_seconds=2)) as committer:
        assert await committer.submit(Change(1, -1, "l")) is Undecided.UNKNOWN


async def test_a_backend_that_is_killed_costs_time_and_no_answer(tmp_path: Path) -> None:
    """Upon which the server ends every other session too, recovers, and lets nobody in until it has."""
    with killable_server(tmp_path) as server, Database(server.url) as database:
        database.open({1: 1_000})
        async with committing(Settings(database_url=server.url, changes_per_statement_max=10)) as committer:
            waiting = [committer.submit(Change(1, -2)) for _ in range(1_000)]
            await until(waiting[100].done)
            await server.kill_backend()
            outcomes = await all_of(*waiting)
        assert [outcome.balance for outcome in outcomes if isinstance(outcome, Applied)] == list(range(998, -1, -2))
        assert Counter(outcomes)[INSUFFICIENT] == 500
        assert verify(server.url).differences == []


async def test_connections_cut_again_and_again_cost_time_and_no_answer(database: Database) -> None:
    dice = random.Random(3)
    database.open({1: 1_000, 2: 1_000})
    async with database.proxied() as (proxy, url):
        settings = Settings(database_url=url, changes_per_statement_max=20, statement_seconds=0.5)
        async with committing(settings) as committer:
            waiting = [committer.submit(Change(1 + number % 2, -2, reference=str(number))) for number in range(2_000)]
            for _ in range(20):
                await asyncio.sleep(0.02)
                words = str(dice.choice([number for number, future in enumerate(waiting) if not future.done()] or [0]))
                proxy.strike(words.encode(), dice.choice([Link.cut, Link.cut_at_answer, Link.garble]))
            outcomes = await all_of(*waiting)
    for user_id in (1, 2):
        mine = outcomes[user_id - 1 :: 2]
        assert [outcome.balance for outcome in mine if isinstance(outcome, Applied)] == list(range(998, -1, -2))
        assert mine.count(INSUFFICIENT) == 500
    assert verify(database.url).differences == []


# A backend that outlives its connection


@pytest.mark.parametrize("balance", [1_000, 10])
async def test_a_statement_that_commits_after_its_connection_was_cut_counts_once(
    database: Database, balance: int
) -> None:
    """Also where the balance is enough for it once: the second statement must not refuse what the first has applied."""
    database.open({1: balance})
    async with database.proxied() as (proxy, url), committing(patient(url)) as committer:
        with database.holding(1):
            waiting = [committer.submit(Change(1, -7)), committer.submit(Change(1, -3, "k"))]
            await until(lambda: len(database.blocked()) == 1)
            proxy.cut()
            await until(lambda: len(database.blocked()) == 2)
        assert await all_of(*waiting) == [Applied(balance - 7), Applied(balance - 10)]
    assert [row.amount for row in database.journal(1)] == [-7, -3]


@pytest.mark.parametrize("key", [None, "k"])
async def test_what_was_refused_after_an_unknown_outcome_is_never_applied_by_a_late_statement(
    database: Database, key: str | None
) -> None:
    database.open({1: 5})
    async with database.proxied() as (proxy, url), committing(quick(url)) as committer:
        struck = proxy.strike(b"late", Link.hold)
        assert await committer.submit(Change(1, -10, key, "late")) == INSUFFICIENT
        assert await committer.submit(Change(1, 100)) == Applied(105)
        link = struck.result()
        before = link.bytes_answered
        link.release()
        await until(lambda: link.bytes_answered > before)
        if key:
            assert await committer.submit(Change(1, -10, key, "late")) == structs.replace(INSUFFICIENT, replayed=True)
        assert database.balance(1) == 105


async def test_what_was_applied_after_an_unknown_outcome_is_not_applied_again_by_a_late_statement(
    database: Database,
) -> None:
    database.open({1: 50})
    async with database.proxied() as (proxy, url), committing(quick(url)) as committer:
        struck = proxy.strike(b"late", Link.hold)
        late = [committer.submit(Change(1, -10, reference="late")), committer.submit(Change(1, -5, "k"))]
        assert await all_of(*late) == [Applied(40), Applied(35)]
        link = struck.result()
        before = link.bytes_answered
        link.release()
        await until(lambda: link.bytes_answered > before)
        assert database.balance(1) == 35


# The deadline


async def test_in_flight_at_the_deadline_is_504_and_settled_by_asking_again(
    aiohttp_client: AiohttpClient, database: Database
) -> None:
    database.open({1: 10})
    async with database.proxied() as (proxy, url):
        settings = Settings(database_url=url, statement_seconds=10, deadline_seconds=3)
        client = await aiohttp_client(make_app(settings))

        async def ask() -> tuple[int, str, str | None]:
            body = {"userId": 1, "amount": -1}
            async with client.post(UPDATE, json=body, headers={"Idempotency-Key": "in-flight"}) as answer:
                return answer.status, await answer.text(), answer.headers.get("Idempotent-Replayed")

        struck = proxy.strike(b"in-flight", Link.hold)
        text = (
            '{"error":"Outcome unknown: ask again with the same Idempotency-Key,'
            " or, if you sent none, look at the account's changes\"}"
        )
        assert await ask() == (504, text, None)
        struck.result().release()  # the statement was left running
        assert await ask() == (200, '{"userId":1,"newBalance":9}', "true")
    assert len(database.journal(1)) == 1


def unreachable(database: Database, proxy: FaultProxy, _: contextlib.ExitStack) -> None:
    proxy.greet = Link.cut
    proxy.cut()


def blocked(database: Database, _: FaultProxy, until_the_end: contextlib.ExitStack) -> None:
    until_the_end.enter_context(database.holding(1))


def read_only(database: Database, proxy: FaultProxy, _: contextlib.ExitStack) -> None:
    database.configure("default_transaction_read_only", "on")
    proxy.cut()


def full(database: Database, *_: object) -> None:
    database.fail("true", "53100")


def no_such_user(database: Database, *_: object) -> None:
    database.execute("DELETE FROM users WHERE id = 1")


def rejected(database: Database, *_: object) -> None:
    database.fail("true", "P0001")


@pytest.mark.parametrize("obstacle", [unreachable, blocked, read_only, full, no_such_user, rejected])
async def test_what_was_once_unknown_is_never_said_to_be_turned_away(
    database: Database, obstacle: Callable[[Database, FaultProxy, contextlib.ExitStack], None]
) -> None:
    database.open({1: 10})
    with contextlib.ExitStack() as until_the_end:
        async with database.proxied() as (proxy, url):
            settings = Settings(database_url=url, deadline_seconds=0.5, statement_seconds=0.3)
            async with committing(settings) as committer:
                await until(lambda: len(database.connected()) == settings.lanes)

                def lose(link: Link) -> None:
                    link.cut()
                    obstacle(database, proxy, until_the_end)

                struck = proxy.strike(b"lost", lose)
                lost = [committer.submit(Change(1, -1, key, "lost")) for key in (None, "k", "k")]
                assert await all_of(*lost) == [Undecided.UNKNOWN] * 3
                assert struck.done()
    assert database.journal(1) == []


# Everything but changes


async def test_reads_and_openings_are_503_with_retry_after_while_the_database_is_away(
    aiohttp_client: AiohttpClient, database: Database
) -> None:
    async with database.proxied() as (proxy, url):
        settings = Settings(database_url=url, statement_seconds=0.3, connect_seconds=0.3)
        client = await aiohttp_client(make_app(settings))

        async def ask(method: str, path: str) -> tuple[int, str | None]:
            body = {"PUT": {"balance": 7}, "PATCH": {"minimumBalance": 0}}.get(method)
            async with client.request(method, path, json=body) as answer:
                return answer.status, answer.headers.get("Retry-After")

        requests = [
            ("PUT", "/api/users/1"),
            ("GET", "/api/users/1"),
            ("PATCH", "/api/users/1"),
            ("GET", "/api/users/1/changes"),
        ]
        for greet, fault in ((None, Link.swallow), (Link.swallow, Link.swallow), (Link.cut, Link.cut)):
            assert await ask("PUT", "/api/users/1") in ((201, None), (200, None))
            proxy.greet = greet
            for link in proxy.links:
                fault(link)
            if greet:
                answers = await asyncio.gather(*(ask(*request) for request in requests * 3))
                assert set(answers) == {(503, "1")}
                proxy.greet = None
            # It may have taken the pool's dead connections for sound ones.
            async with asyncio.timeout(10):
                while {await ask(*request) for request in requests} != {(200, None)}:
                    pass
