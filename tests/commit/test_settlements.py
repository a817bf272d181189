"""A hold is settled once: by settlements that wait together, by two processes, and when statements are lost."""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from msgspec import structs

from atomic_balance.changes import (
    BALANCE_LIMIT,
    Applied,
    Change,
    Credit,
    NoSuchPayee,
    Outcome,
    Refusal,
    Refused,
    Undecided,
    capture,
    hold,
    release,
)
from atomic_balance.commit.group_commit import GroupCommit
from atomic_balance.postgres.session import Answers, Session
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.committing import all_of, committing, patient
from tests.database import Database, until
from tests.fault_proxy import Link

pytestmark = pytest.mark.over_both_statements

FAULTS = [Link.cut, Link.cut_at_answer, Link.swallow, Link.swallow_requests, Link.swallow_answers, Link.garble]
CAPTURE, PART, RELEASE = capture(1, "h", 10, 10), capture(1, "h", 10, 4), release(1, "h", 10)
EXPIRY = release(1, "h", 10, expired=True)


def again(outcome: Outcome) -> Outcome:
    """The outcome of a repetition."""
    assert isinstance(outcome, Applied)
    return structs.replace(outcome, replayed=True)


async def placed(committer: GroupCommit, database: Database, others: int = 0) -> None:
    """Open user 1 with 100, of which it holds 10, and `others` in another hold."""
    database.open({1: 100})
    for hold_id, amount in {"h": 10, "other": others}.items():
        if amount:
            assert isinstance(await committer.submit(hold(1, hold_id, amount, 60, None)), Applied)


def held(database: Database) -> tuple[int, int, list[tuple[str, int]]]:
    """The balance of user 1, what it holds, and its open holds."""
    ((balance, held),) = database.execute("SELECT balance, held FROM users WHERE id = 1")
    return balance, held, database.execute("SELECT hold_id, amount FROM open_holds ORDER BY hold_id")


# In one process


@pytest.mark.parametrize(("first", "balance"), [(CAPTURE, 90), (PART, 96), (RELEASE, 100), (EXPIRY, 100)])
async def test_of_settlements_that_wait_together_the_first_is_applied(
    database: Database, first: Change, balance: int
) -> None:
    """Its repetitions get its outcome, all others learn that the hold was settled otherwise."""
    async with committing(patient(database.url)) as committer:
        await placed(committer, database)
        with database.holding(1):
            waiting = {change: committer.submit(change) for change in (first, CAPTURE, PART, RELEASE, EXPIRY)}
            repetition = committer.submit(first)
            assert committer.waiting_count == 1
        outcomes = dict(zip(waiting, await all_of(*waiting.values()), strict=True))
        assert {change for change, outcome in outcomes.items() if outcome is not Undecided.KEY_REUSED} == {first}
        assert await repetition == Applied(balance, replayed=True)
    assert held(database) == (balance, 0, [])
    assert verify(database.url).differences == []


async def test_settlements_that_wait_are_turned_away_with_the_first(database: Database) -> None:
    async with committing(Settings(database_url=database.url, deadline_seconds=1)) as committer:
        await placed(committer, database)
        with database.holding(1):
            waiting = [committer.submit(change) for change in (RELEASE, CAPTURE, PART)]
            assert await all_of(*waiting) == [Undecided.TURNED_AWAY] * 3
        assert await committer.submit(PART) == Applied(96)


async def test_settlements_behind_one_whose_outcome_is_unknown_changed_nothing(database: Database) -> None:
    """They were never sent."""
    async with database.proxied() as (proxy, url):
        settings = Settings(database_url=url, statement_seconds=10, deadline_seconds=2)
        async with committing(settings) as committer:
            await placed(committer, database)
            struck = proxy.strike(b" settlement h", Link.hold)
            waiting = [committer.submit(change) for change in (RELEASE, CAPTURE)]
            assert await all_of(*waiting) == [Undecided.UNKNOWN, Undecided.TURNED_AWAY]
            struck.result().release()
            await until(lambda: not held(database)[1])
            assert await committer.submit(CAPTURE) is Undecided.KEY_REUSED
            assert await committer.submit(RELEASE) == Applied(100, replayed=True)


async def test_if_the_first_fails_the_next_is_sent(database: Database) -> None:
    async with committing(patient(database.url)) as committer:
        await placed(committer, database)
        database.fail("NEW.hold_amount < 0 AND NEW.amount = 0", "P0001")
        with database.holding(1):
            waiting = [committer.submit(change) for change in (RELEASE, PART, CAPTURE, PART)]
        outcomes = await all_of(*waiting)
        assert outcomes == [Undecided.FAILED, Applied(96), Undecided.KEY_REUSED, Applied(96, replayed=True)]
    assert held(database) == (96, 0, [])


async def test_settlements_of_an_account_that_has_gone_are_all_answered(database: Database) -> None:
    async with committing(patient(database.url)) as committer:
        await placed(committer, database)
        with database.session("DELETE FROM users WHERE id = 1") as deleting:
            waiting = [committer.submit(change) for change in (RELEASE, PART, CAPTURE)]
            await until(database.blocked)
            deleting.commit()
        assert await all_of(*waiting) == [Undecided.NO_SUCH_USER] * 3
        database.open({2: 10})
        assert await committer.submit(Change(2, -1)) == Applied(9)


async def test_a_change_can_have_only_so_many_settlements_behind_it(database: Database) -> None:
    settings = structs.replace(patient(database.url), waiting_changes_per_account_max=2)
    async with committing(settings) as committer:
        await placed(committer, database)
        with database.holding(1):
            waiting = [committer.submit(change) for change in (RELEASE, RELEASE, CAPTURE)]
            assert committer.submit(PART).result() is Undecided.TURNED_AWAY
        assert await all_of(*waiting) == [Applied(100), Applied(100, replayed=True), Undecided.KEY_REUSED]


async def test_a_hold_under_a_key_that_waits_for_another_change_is_none(database: Database) -> None:
    async with committing(patient(database.url)) as committer:
        database.open({1: 100})
        with database.holding(1):
            first = committer.submit(hold(1, "h", 10, 60, None))
            others = (
                hold(1, "h", 11, 60, None),
                hold(1, "h", 10, 60, "r"),
                Change(1, -10, "h"),
                Change(1, 10, "h"),
            )
            waiting = [committer.submit(other) for other in others]
            longer = committer.submit(hold(1, "h", 10, 61, None))
        assert again(await first) == await longer
        assert await all_of(*waiting) == [Undecided.KEY_REUSED] * 4
    assert held(database) == (100, 10, [("h", 10)])


# Two processes


@pytest.mark.parametrize("others", [0, 50])
async def test_two_processes_that_settle_a_hold_at_once_settle_it_once(
    database: Database, others: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Both have found it open, and both wait for the account's row.

    Where nothing else is held the second fails its condition, for `held` would be negative, though nothing is refused;
    where more is held it meets the first one's key. Either way it is sent again, and found.
    """
    caplog.set_level(logging.DEBUG, "atomic_balance")
    async with committing(patient(database.url)) as one, committing(patient(database.url)) as other:
        await placed(one, database, others)
        with database.holding(1):
            captured = one.submit(CAPTURE)
            await until(lambda: len(database.blocked()) == 1)
            beside = [other.submit(Change(1, -1)), other.submit(RELEASE), other.submit(Change(1, -2))]
            await until(lambda: len(database.blocked()) == 2)
        assert await all_of(captured, *beside) == [Applied(90), Applied(89), Undecided.KEY_REUSED, Applied(87)]
        assert await other.submit(CAPTURE) == Applied(90, replayed=True)
    assert ("KEY_TAKEN" in caplog.text) == bool(others)
    assert "REJECTED" not in caplog.text
    assert held(database) == (87, others, [("other", others)] if others else [])
    assert verify(database.url).differences == []


@pytest.mark.parametrize("others", [0, 50])
async def test_two_processes_that_capture_to_a_payee_with_room_for_one_capture_once(
    database: Database, others: int
) -> None:
    """The second finds the payee full, by the first: it is no refusal, but a repetition."""
    database.open({2: BALANCE_LIMIT - 10})
    captured = capture(1, "h", 10, 10, [Credit(2, 10)])
    async with committing(patient(database.url)) as one, committing(patient(database.url)) as other:
        await placed(one, database, others)
        with database.holding(1):
            first = one.submit(captured)
            await until(lambda: len(database.blocked()) == 1)
            second = other.submit(captured)
            await until(lambda: len(database.blocked()) == 2)
        applied = Applied(90, payee_balances={2: BALANCE_LIMIT})
        assert await all_of(first, second) == [applied, again(applied)]


async def test_a_capture_that_is_refused_binds_nothing(database: Database) -> None:
    """So it is repeated by nobody: neither by who asks at the same time, nor by who asks when there is room."""
    database.open({2: BALANCE_LIMIT})
    captured = capture(1, "h", 10, 10, [Credit(2, 10)])
    async with committing(patient(database.url)) as committer:
        await placed(committer, database)
        full = Refused(Refusal.BALANCE_LIMIT_EXCEEDED)
        assert await all_of(committer.submit(captured), committer.submit(captured)) == [full, full]
        await committer.submit(Change(2, -10))
        assert await committer.submit(captured) == Applied(90, payee_balances={2: BALANCE_LIMIT})


async def test_what_waits_behind_another_settlement_is_sent_only_while_its_own_time_lasts(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a line of captures that come to nothing could keep it waiting for ever."""
    apply = Session.apply

    async def late(session: Session, *rest: Any) -> Answers:
        answers = await apply(session, *rest)
        await asyncio.sleep(1.8)
        return answers

    async with committing(Settings(database_url=database.url, deadline_seconds=3)) as committer:
        await placed(committer, database)
        monkeypatch.setattr(Session, "apply", late)
        to_nobody = [capture(1, "h", 10, 10, [Credit(user_id, 10)]) for user_id in (98, 99)]
        outcomes = await all_of(*map(committer.submit, (*to_nobody, RELEASE)))
    assert outcomes == [NoSuchPayee(98), NoSuchPayee(99), Undecided.TURNED_AWAY]


async def test_a_storm_of_settlements_through_two_processes(database: Database) -> None:
    """Of each hold exactly one kind is applied, and every answer agrees about which."""
    ids = [f"h{number}" for number in range(100)]
    database.open({1: 10_000, 2: 10_000})
    async with committing(patient(database.url)) as one, committing(patient(database.url)) as other:
        await all_of(*(one.submit(hold(user_id, name, 10, 60, None)) for name in ids for user_id in (1, 2)))
        kinds: list[Callable[[int, str], Change]] = [
            lambda user_id, name: capture(user_id, name, 10, 10),
            lambda user_id, name: capture(user_id, name, 10, 4),
            lambda user_id, name: release(user_id, name, 10),
            lambda user_id, name: release(user_id, name, 10, expired=True),
        ]
        storm = [
            (name, user_id, kind, committer.submit(make(user_id, name)))
            for number, name in enumerate(ids)
            for user_id in (1, 2)
            for place, make in enumerate(kinds)
            for kind, committer in ((place, one), ((place + number) % 4, other))
            for make in (kinds[kind],)
        ]
        outcomes = await all_of(*(future for *_, future in storm))
    applied: dict[tuple[str, int], set[int]] = {}
    first: dict[tuple[str, int], int] = {}
    for (name, user_id, kind, _), outcome in zip(storm, outcomes, strict=True):
        assert isinstance(outcome, Applied) or outcome is Undecided.KEY_REUSED
        if isinstance(outcome, Applied):
            applied.setdefault((name, user_id), set()).add(kind)
            first[name, user_id] = first.get((name, user_id), 0) + (not outcome.replayed)
    assert len(applied) == 200
    assert {len(kinds) for kinds in applied.values()} == {1}
    assert set(first.values()) == {1}
    assert database.execute("SELECT DISTINCT held FROM users") == [(0,)]
    assert verify(database.url).differences == []


# Lost statements


def quick(url: str) -> Settings:
    """Give a statement up soon."""
    return Settings(database_url=url, statement_seconds=0.4)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_hold_whose_statement_or_answer_was_lost_is_placed_once_with_one_expiry(
    database: Database, fault: Callable[[Link], None]
) -> None:
    database.open({1: 15})
    async with database.proxied() as (proxy, url), committing(quick(url)) as committer:
        struck = proxy.strike(b"here", fault)
        hold_10 = hold(1, "h", 10, 60, "here")
        outcomes = await all_of(*(committer.submit(change) for change in (hold_10, Change(1, -5), hold_10)))
        assert struck.done()
        expires_at: datetime = database.execute("SELECT expires_at FROM open_holds")[0][0]
        placed, other, repeated = outcomes
        found = Applied(15)  # by the second try in the journal, or placed by it
        assert placed in (found, Applied(15, expires_at=expires_at))
        assert (other, repeated) == (Applied(10), again(placed))
        assert await committer.submit(hold_10) == again(found)
    assert database.execute("SELECT expires_at FROM balance_changes WHERE hold_amount > 0") == [(expires_at,)]
    assert held(database) == (10, 10, [("h", 10)])
    assert len(database.journal(1)) == 2


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("settlement", "balance"), [(PART, 96), (EXPIRY, 100)])
async def test_a_settlement_whose_statement_or_answer_was_lost_counts_once(
    database: Database, fault: Callable[[Link], None], settlement: Change, balance: int
) -> None:
    async with database.proxied() as (proxy, url), committing(quick(url)) as committer:
        await placed(committer, database)
        struck = proxy.strike(b" settlement h", fault)
        waiting = [committer.submit(change) for change in (settlement, Change(1, -1), CAPTURE, settlement)]
        settled = Applied(balance)
        assert await all_of(*waiting) == [settled, Applied(balance - 1), Undecided.KEY_REUSED, again(settled)]
        assert struck.done()
        assert await committer.submit(settlement) == again(settled)
    assert held(database) == (balance - 1, 0, [])
    assert verify(database.url).differences == []


async def test_a_settlement_that_commits_after_its_connection_was_cut_counts_once(database: Database) -> None:
    async with database.proxied() as (proxy, url), committing(patient(url)) as committer:
        await placed(committer, database)
        with database.holding(1):
            waiting = [committer.submit(PART), committer.submit(hold(1, "late", 90, 60, None))]
            await until(lambda: len(database.blocked()) == 1)
            proxy.cut()
            await until(lambda: len(database.blocked()) == 2)
        captured, late = await all_of(*waiting)
        assert captured == Applied(96)
        assert isinstance(late, Applied)
        assert (late.balance, late.replayed) == (96, False)
        assert late.expires_at is None  # it was found
    assert held(database) == (96, 90, [("late", 90)])
    assert verify(database.url).differences == []


async def test_a_hold_that_was_refused_after_an_unknown_outcome_is_never_placed_by_a_late_statement(
    database: Database,
) -> None:
    database.open({1: 5})
    async with database.proxied() as (proxy, url), committing(quick(url)) as committer:
        struck = proxy.strike(b"late", Link.hold)
        late = hold(1, "h", 10, 60, "late")
        refused = Refused(Refusal.INSUFFICIENT_FUNDS)
        assert await committer.submit(late) == refused
        assert await committer.submit(Change(1, 100)) == Applied(105)
        link = struck.result()
        before = link.bytes_answered
        link.release()
        await until(lambda: link.bytes_answered > before)
        assert await committer.submit(late) == structs.replace(refused, replayed=True)
    assert held(database) == (105, 0, [])


async def test_a_settlement_after_an_unknown_outcome_is_not_applied_again_by_a_late_statement(
    database: Database,
) -> None:
    async with database.proxied() as (proxy, url), committing(quick(url)) as committer:
        await placed(committer, database, others=20)
        struck = proxy.strike(b" settlement h", Link.hold)
        assert await committer.submit(PART) == Applied(96)
        link = struck.result()
        before = link.bytes_answered
        link.release()
        await until(lambda: link.bytes_answered > before)
    assert held(database) == (96, 20, [("other", 20)])


async def test_changes_of_an_account_are_never_stuck_behind_its_settlements(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process settles each hold right before the statement that would."""
    apply = Session.apply
    async with committing(patient(database.url)) as other, committing(patient(database.url)) as committer:
        database.open({1: 100})
        holds = [hold(1, str(number), 1, 60, None) for number in range(10)]
        await all_of(*(other.submit(one) for one in holds))

        async def overtaken(session: Session, changes: list[Change], *rest: object) -> object:
            theirs = [one for one in changes if one.hold_id is not None and one.amount]
            if theirs:
                await all_of(*(other.submit(release(1, str(one.hold_id), 1)) for one in theirs))
            return await apply(session, changes, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(Session, "apply", overtaken)
        waiting = [
            committer.submit(one) for number in range(10) for one in (capture(1, str(number), 1, 1), Change(1, -1))
        ]
        outcomes = await all_of(*waiting)
    assert outcomes[::2] == [Undecided.KEY_REUSED] * 10
    assert outcomes[1::2] == [Applied(balance) for balance in range(99, 89, -1)]
    assert held(database) == (90, 0, [])
