"""Which lane carries what: a load lane for each shard, one between them, and what becomes of a shard that is away."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest

from atomic_balance.changes import Applied, Change, Credit, Refused, Undecided, transfer
from atomic_balance.commit.backlog import Backlog
from atomic_balance.commit.planning import Load
from atomic_balance.commit.waiting import BETWEEN, Place, WaitingChange
from atomic_balance.postgres.failures import Failure, StatementError
from atomic_balance.postgres.session import Answers, Session
from atomic_balance.postgres.shards import Shards
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.committing import all_of, committing
from tests.database import Database, until
from tests.fault_proxy import Link

EIGHT = Shards(tuple(range(-(2**31) + 2**29, 2**31, 2**29)))
USERS = range(1, 41)
AWAY = EIGHT.of(1)
"""The shard that is away in these tests: that of user 1."""
ELSEWHERE = [user_id for user_id in USERS if EIGHT.of(user_id) != AWAY]


@pytest.fixture
def cluster(database: Database) -> Settings:
    """The settings of a service on a database that says that it has eight shards."""
    database.open(dict.fromkeys(USERS, 1_000))
    return Settings(database_url=database.url, citus=True, deadline_seconds=3, statement_seconds=1)


def sent_by(monkeypatch: pytest.MonkeyPatch) -> list[list[Change]]:
    """What each statement carries from now on."""
    batches: list[list[Change]] = []
    apply = Session.apply

    async def noting(self: Session, changes: Sequence[Change], *rest: Any) -> Answers:
        batches.append(list(changes))
        return await apply(self, changes, *rest)

    monkeypatch.setattr(Session, "apply", noting)
    return batches


async def test_a_statement_carries_one_shard_or_transfers(
    database: Database, cluster: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = sent_by(monkeypatch)
    chance = random.Random(1)
    async with committing(cluster) as committer:
        futures = []
        for number in range(2_000):
            payer, payee = chance.sample(USERS, 2)
            change = transfer(payer, [Credit(payee, 3)], None, None) if number % 5 == 0 else Change(payer, -1)
            futures.append(committer.submit(change))
            if number % 100 == 0:
                await asyncio.sleep(0)
        outcomes = await all_of(*futures)
    assert {type(outcome) for outcome in outcomes} <= {Applied, Refused}
    carried = [
        ({EIGHT.of(change.user_id) for change in batch}, {bool(change.payees) for change in batch}) for batch in batches
    ]
    first, rest = carried[0], carried[1:]  # the first lane to be connected learns of the shards
    assert all(paying == {True} or (paying == {False} and len(shards) == 1) for shards, paying in rest), first
    assert {shard for shards, paying in rest if paying == {False} for shard in shards} == set(range(8))
    assert verify(database.url).differences == []


async def test_a_statement_that_waits_on_one_shard_holds_up_no_other(database: Database, cluster: Settings) -> None:
    async with database.proxied() as (proxy, url):
        settings = Settings(database_url=url, citus=True, deadline_seconds=5, statement_seconds=4)
        async with committing(settings) as committer:
            await all_of(*(committer.submit(Change(user_id, 1)) for user_id in USERS))
            struck = proxy.strike(b"in flight", Link.hold)
            held = committer.submit(Change(1, -1, reference="in flight"))
            link = await struck
            behind = committer.submit(Change(1, -1))
            outcomes = await all_of(*(committer.submit(Change(user_id, -1)) for user_id in ELSEWHERE))
            assert outcomes == [Applied(1_000)] * len(ELSEWHERE)
            assert not held.done()
            assert not behind.done()
            link.release()
            assert await all_of(held, behind) == [Applied(1_000), Applied(999)]


class Absence:
    """A shard that does not answer: whatever touches it is lost, as when its node is away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.over = False
        self.met: list[set[int]] = []
        for method, accounts_of in (("apply", self._of_changes), ("blocked_accounts", set)):
            monkeypatch.setattr(Session, method, self._losing(getattr(Session, method), accounts_of))

    def _losing(self, original: Any, accounts_of: Any) -> Any:
        async def call(session: Session, about: Sequence[Any], *rest: Any) -> Any:
            shards = {EIGHT.of(user_id) for user_id in accounts_of(about)}
            if AWAY in shards and not self.over:
                self.met.append(shards)
                raise StatementError(Failure.UNKNOWN)
            return await original(session, about, *rest)

        return call

    def _of_changes(self, changes: Sequence[Change]) -> set[int]:
        return {user_id for change in changes for user_id in change.accounts}


async def test_while_a_shard_is_away_all_others_go_on(
    database: Database, cluster: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transfers too, once it is known which of the shards of a lost statement is the one."""
    chance = random.Random(1)
    async with committing(cluster) as committer:
        await all_of(*(committer.submit(Change(user_id, 1)) for user_id in USERS))
        absence = Absence(monkeypatch)
        there = [committer.submit(Change(1, -1, f"k{number}")) for number in range(3)]
        there += [committer.submit(transfer(2, [Credit(1, 1)], f"t{number}", None)) for number in range(3)]
        for _ in range(10):
            pairs = [chance.sample(ELSEWHERE, 2) for _ in range(20)]
            futures = [committer.submit(Change(user_id, 1)) for user_id in ELSEWHERE]
            futures += [committer.submit(transfer(payer, [Credit(payee, 1)], None, None)) for payer, payee in pairs]
            assert {type(outcome) for outcome in await all_of(*futures)} == {Applied}
        assert not any(future.done() for future in there)
        absence.over = True
        outcomes = await all_of(*there)
    assert {type(outcome) for outcome in outcomes} == {Applied}
    assert verify(database.url).differences == []


async def test_a_shard_that_stays_away_is_not_taken_for_the_database(
    cluster: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or readiness would be red, and nobody sent the change that could show that the others answer."""
    async with committing(cluster) as committer:
        await all_of(*(committer.submit(Change(user_id, 1)) for user_id in USERS))
        absence = Absence(monkeypatch)
        assert await committer.submit(Change(1, -1)) is Undecided.UNKNOWN
        met = len(absence.met)
        await until(lambda: len(absence.met) > met and not committer.failing_seconds)


async def test_what_was_never_sent_to_a_shard_that_is_away_is_known_to_have_changed_nothing(
    database: Database, cluster: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with committing(cluster) as committer:
        absence = Absence(monkeypatch)
        first = committer.submit(Change(1, -1))
        await until(lambda: absence.met)
        later = [committer.submit(Change(1, -1)), committer.submit(transfer(ELSEWHERE[0], [Credit(1, 1)], None, None))]
        assert await all_of(first, *later) == [Undecided.UNKNOWN, *[Undecided.TURNED_AWAY] * 2]
        asked = len(absence.met)
        assert asked < 30, "the shard is pressed"
        absence.over = True
        assert await committer.submit(Change(1, -1)) == Applied(999)


async def test_shards_that_change_lose_nothing(database: Database, cluster: Settings) -> None:
    """As when they are split: known from the next connection on."""
    chance = random.Random(1)
    async with committing(cluster) as committer:
        for count in (8, 3, 16, 1, 4):
            database.execute("DELETE FROM pg_dist_shard")
            database.execute(
                "INSERT INTO pg_dist_shard SELECT 'users'::regclass, -2147483648 + n * (4294967296 / %s)"
                " FROM generate_series(0, %s - 1) AS n",
                count,
                count,
            )
            pairs = [chance.sample(USERS, 2) for _ in range(200)]
            futures = [committer.submit(Change(payer, 1)) for payer, _ in pairs]
            futures += [committer.submit(transfer(payer, [Credit(payee, 1)], None, None)) for payer, payee in pairs]
            for pid in database.connected():
                database.execute("SELECT pg_terminate_backend(%s)", pid)
            assert {type(outcome) for outcome in await all_of(*futures)} == {Applied}
    assert verify(database.url).differences == []


def waiting_in(backlog: Backlog, *changes: Change) -> list[WaitingChange]:
    """Add changes to a backlog."""
    loop = asyncio.get_running_loop()
    waiting = [WaitingChange(one, f" {n}", n, loop.time() + 60, loop.create_future()) for n, one in enumerate(changes)]
    for one in waiting:
        backlog.add(one)
    return waiting


def taken(backlog: Backlog, shard: int) -> list[int]:
    """The numbers of what a lane would carry now."""
    batch = backlog.take_ready(shard, Load(100, 100), 100)
    return [waiting.number for waiting in batch.changes()] if batch else []


async def test_what_waits_is_sorted_anew_when_the_shards_become_known() -> None:
    backlog = Backlog()
    here, there = 1, ELSEWHERE[0]
    waiting_in(
        backlog, Change(here, 1), Change(there, 1), transfer(here, [Credit(there, 1)], None, None), Change(here, 2)
    )
    assert set(backlog.spread(EIGHT)) == {BETWEEN, *range(1, 8)}
    assert backlog.spread(EIGHT) == []
    assert taken(backlog, AWAY) == [0]
    assert taken(backlog, EIGHT.of(there)) == [1]
    assert taken(backlog, BETWEEN) == []


async def test_an_account_goes_from_lane_to_lane_in_the_order_of_its_changes() -> None:
    backlog = Backlog()
    backlog.spread(EIGHT)
    here, there = 1, ELSEWHERE[0]
    pay = transfer(here, [Credit(there, 1)], None, None)
    changes = waiting_in(backlog, Change(here, 1), pay, pay, Change(here, 2))
    order = []
    for shard in (AWAY, BETWEEN, AWAY):
        batch = backlog.take_ready(shard, Load(100, 100), 100)
        assert batch is not None
        order.append([waiting.number for waiting in batch.changes()])
        for waiting in batch.changes():
            backlog.answer(waiting)
        for line in batch.lines():
            backlog.release(line)
    assert order == [[0], [1, 2], [3]]
    assert backlog.empty
    assert all(waiting.answered for waiting in changes)


async def test_a_line_whose_first_change_has_expired_is_left_to_the_lane_of_its_next() -> None:
    backlog = Backlog()
    backlog.spread(EIGHT)
    changes = waiting_in(backlog, transfer(1, [Credit(ELSEWHERE[0], 1)], None, None), Change(1, 1))
    backlog.answer(changes[0])
    assert taken(backlog, BETWEEN) == []
    assert taken(backlog, AWAY) == [1]


# One load lane


async def test_what_is_queued_behind_a_statement_at_its_deadline_was_never_sent(database: Database) -> None:
    database.open({1: 10, 2: 10})
    async with database.proxied() as (proxy, url):
        slow = Settings(database_url=url, statement_seconds=10, deadline_seconds=2)
        async with committing(slow) as committer:
            struck = proxy.strike(b"in flight", Link.hold)
            in_flight = committer.submit(Change(1, -1, reference="in flight"))
            link = await struck
            behind = [committer.submit(Change(2, -1)), committer.submit(Change(1, -1))]
            assert await all_of(in_flight, *behind) == [Undecided.UNKNOWN, *[Undecided.TURNED_AWAY] * 2]
            link.release()
            await until(lambda: database.journal(1))
            assert await committer.submit(Change(2, -1)) == Applied(9)
    assert len(database.journal(1)) == len(database.journal(2)) == 1


async def test_an_account_is_carried_by_one_lane_at_a_time(database: Database) -> None:
    """Also after a change that was to travel alone has expired before a lane came to it."""
    database.open({1: 10, 2: 10})
    database.fail("NEW.reference = 'bad'", "P0001")
    async with database.proxied() as (proxy, url):
        slow = Settings(database_url=url, lanes=2, lock_seconds=1, deadline_seconds=2.4, connect_seconds=10)
        async with committing(slow) as committer:
            await until(lambda: len(database.connected()) == 2)
            first = proxy.strike(b"first", lambda link: None)
            await committer.submit(Change(2, -1, reference="first"))
            proxy.greet = Link.hold  # for now the lane for suspects gets no other connection
            for link in proxy.links:
                if link is not first.result():
                    link.cut()
            alone = [committer.submit(Change(1, -1, reference="bad")), committer.submit(Change(2, -1))]
            await until(lambda: database.failures() == 1)
            with database.holding(1):
                await asyncio.sleep(0.6)
                follower = committer.submit(Change(1, -2))
                assert await all_of(*alone) == [Undecided.TURNED_AWAY] * 2
                await until(database.blocked)
                proxy.greet = None
                for link in proxy.links:
                    link.release()
                await until(lambda: len(database.connected()) == 2)
                for _ in range(20):
                    assert len(database.blocked()) <= 1
                    await asyncio.sleep(0.01)
            assert await all_of(follower) == [Applied(8)]


async def test_when_a_lane_dies_everything_that_waits_is_answered_and_the_service_says_so(
    database: Database, monkeypatch: pytest.MonkeyPatch, debug_log: pytest.LogCaptureFixture
) -> None:
    """What is in flight is unknown; nothing else was sent; whoever comes later is turned away."""
    database.open({1: 10, 2: 10})
    told: list[str] = []
    async with database.proxied() as (proxy, url), committing(Settings(database_url=url)) as committer:
        monkeypatch.setattr(committer, "_on_failure", lambda: told.append("failed"))
        struck = proxy.strike(b"in flight", Link.hold)
        in_flight = committer.submit(Change(1, -1, "k", "in flight"))
        await struck
        waiting = [
            committer.submit(Change(1, -1)),
            committer.submit(Change(2, -1)),
            committer.submit(Change(2, 1, "l")),
        ]

        def fail(*_: object) -> None:
            raise RuntimeError("unforeseen")

        monkeypatch.setattr(committer._backlog, "due", fail)
        assert await all_of(in_flight, *waiting) == [Undecided.UNKNOWN, *[Undecided.TURNED_AWAY] * 3]
        assert committer.submit(Change(2, -1)).result() is Undecided.TURNED_AWAY
    assert told == ["failed"]
    assert "unforeseen" in debug_log.text


async def test_a_change_that_is_given_up_in_flight_counts_in_the_balances_of_its_batch(database: Database) -> None:
    database.open({1: 100, 2: 100, 3: 100})
    settings = Settings(database_url=database.url, lock_seconds=5, statement_seconds=5, deadline_seconds=6)
    async with committing(settings) as committer:
        assert await committer.submit(Change(2, -1, "k")) == Applied(99)
        with database.holding(1):
            with database.holding(3):
                first = committer.submit(Change(3, -1))
                await until(database.blocked)
                given_up = committer.submit(Change(1, -40))
                await asyncio.sleep(2)  # so that those that follow have their deadlines later
                others = [committer.submit(Change(2, -1, "k")), committer.submit(Change(1, 5))]
            assert await first == Applied(99)
            assert await given_up is Undecided.UNKNOWN
        assert await all_of(*others) == [Applied(99, replayed=True), Applied(65)]
    assert [row.balance for row in database.journal(1)] == [60, 65]


async def test_what_is_given_up_while_its_row_is_asked_for_is_not_sent(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.open({1: 100, 2: 100})
    asked, may_answer = asyncio.Queue[None](), asyncio.Event()
    blocked_accounts = Session.blocked_accounts

    async def slowly(self: Session, user_ids: Sequence[int]) -> set[int]:
        asked.put_nowait(None)
        if asked.qsize() > 1:  # the first is asked for the load lane, and makes both suspect
            await may_answer.wait()
        return await blocked_accounts(self, user_ids)

    monkeypatch.setattr(Session, "blocked_accounts", slowly)
    async with committing(Settings(database_url=database.url, lock_seconds=0.2, deadline_seconds=3)) as committer:
        with database.holding(1), database.holding(2):
            outcomes = await all_of(committer.submit(Change(1, -1)), committer.submit(Change(2, -1)))
        assert outcomes == [Undecided.TURNED_AWAY] * 2
        assert asked.qsize() == 2
        may_answer.set()
    assert database.journal(1) == database.journal(2) == []


async def test_what_is_given_up_while_other_refusals_are_recorded_is_not_bound_to_its_key(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.open({1: 0})
    may_record = asyncio.Event()
    record_refusals = Session.record_refusals

    async def late(self: Session, *rest: Any) -> set[tuple[int, str]]:
        await may_record.wait()
        return await record_refusals(self, *rest)

    monkeypatch.setattr(Session, "record_refusals", late)
    settings = Settings(database_url=database.url, changes_per_statement_max=1, lock_seconds=0.2, deadline_seconds=2)
    async with committing(settings) as committer:
        outcomes = await all_of(*(committer.submit(Change(1, -1, key)) for key in ("first", "second")))
        assert outcomes == [Undecided.UNKNOWN, Undecided.TURNED_AWAY]
        may_record.set()
    assert [row.key for row in database.journal(1)] == ["first"]


async def test_what_waits_for_a_shard_that_is_away_holds_up_no_account_whose_row_was_locked(
    database: Database, cluster: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its line is suspect since its row could not be had in time, and its first change pays somebody who is away."""
    payer = ELSEWHERE[0]
    away = Absence(monkeypatch)
    away.over = True
    async with committing(cluster) as committer:
        await all_of(*(committer.submit(Change(user_id, 1)) for user_id in USERS))
        with database.holding(payer):
            paying = committer.submit(transfer(payer, [Credit(1, 1)], None, None))
            behind = committer.submit(Change(payer, -1))
            await until(lambda: (line := committer._backlog.account(payer)) and line.place is Place.SUSPECT)
            away.over = False
            lost = committer.submit(Change(1, -1))
            await until(lambda: committer._backlog.doubted)
        assert await behind == Applied(1_000)
        assert not paying.done()
        assert await all_of(paying, lost) == [Undecided.TURNED_AWAY, Undecided.UNKNOWN]
