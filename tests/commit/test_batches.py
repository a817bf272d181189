"""Whatever the batches are, the outcomes are those of some order in which the changes came one by one.

The group commit on a real database against a model, while another process changes the account too.
"""

import asyncio
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from atomic_balance.changes import BALANCE_LIMIT, Applied, Change, Outcome, Refused, Undecided, capture, hold, release
from atomic_balance.commit.planning import covered_prefix
from atomic_balance.postgres.session import Session
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.committing import committing
from tests.database import Database

ELSEWHERE = (
    "SELECT applied AND position IS NULL FROM apply_changes(%s, ARRAY[%s], ARRAY[%s], ARRAY[%s], ARRAY[%s]::bigint[],"
    " ARRAY[%s]::text[], ARRAY[%s]::integer[], NULL, ARRAY[true], '1s')"
)
OPEN_HOLDS = (4, 7)
"""What the account holds when a batch arrives, a hold each."""

_users = itertools.count(1)

small = st.integers(-30, 30).filter(bool)
amounts = small | st.sampled_from([-BALANCE_LIMIT, BALANCE_LIMIT, 3 - BALANCE_LIMIT, BALANCE_LIMIT - 3])
which = st.integers(0, len(OPEN_HOLDS) - 1)


class Asked(NamedTuple):
    """What a batch asks of its account, in the model's words.

    `amount`: of an update or a hold, or how much is captured. `which`: of the open holds a settlement ends.
    """

    kind: str
    amount: int
    which: int = 0

    def change(self, user_id: int, name: str, keyed: bool) -> Change:
        """The change, under a `name` of its own."""
        held = OPEN_HOLDS[self.which]
        match self.kind:
            case "update":
                return Change(user_id, self.amount, name if keyed else None)
            case "hold":
                return hold(user_id, name, self.amount, 60, None)
            case "capture":
                return capture(user_id, str(self.which), held, self.amount)
        return release(user_id, str(self.which), held, expired=self.kind == "expiry")


def updates(*amounts: int) -> list[Asked]:
    return [Asked("update", amount) for amount in amounts]


an_update = amounts.map(lambda amount: Asked("update", amount))
a_hold = (st.integers(1, 30) | st.just(BALANCE_LIMIT)).map(lambda amount: Asked("hold", amount))
a_settlement = st.builds(Asked, st.sampled_from(["release", "expiry"]), st.just(0), which) | st.builds(
    Asked, st.just("capture"), st.integers(1, min(OPEN_HOLDS)), which
)
anything = an_update | a_hold | a_settlement
batches = st.lists(anything, max_size=12)
minimums = st.sampled_from([0, 0, 5, -7, -BALANCE_LIMIT])
balances = st.integers(0, 60) | st.integers(BALANCE_LIMIT - 40, BALANCE_LIMIT)


class Account(NamedTuple):
    """The model: an account that is asked for one change at a time. `settled`: by which request each hold was."""

    balance: int
    minimum: int
    held: int = sum(OPEN_HOLDS)
    settled: tuple[Asked | None, ...] = (None,) * len(OPEN_HOLDS)

    def after(self, asked: Asked) -> tuple[str, "Account"]:
        """What comes of a request, and the account after it."""
        if asked.kind == "update":
            changed = self._replace(balance=self.balance + asked.amount)
        elif asked.kind == "hold":
            changed = self._replace(held=self.held + asked.amount)
        elif self.settled[asked.which] is not None:
            return ("again" if self.settled[asked.which] == asked else "otherwise"), self
        else:
            settled = tuple(asked if place == asked.which else one for place, one in enumerate(self.settled))
            changed = self._replace(
                balance=self.balance - asked.amount, held=self.held - OPEN_HOLDS[asked.which], settled=settled
            )
        return ("applied", changed) if changed.is_allowed() else ("refused", self)

    def is_allowed(self) -> bool:
        return self.minimum <= self.balance - self.held and self.balance <= BALANCE_LIMIT


over_a_database = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


accounts = st.tuples(balances, minimums).map(lambda two: Account(*two)).filter(Account.is_allowed)


def one_by_one(account: Account, batch: Iterable[Asked]) -> tuple[list[str], Account]:
    """What comes of each change of a batch, one after the other, and the account in the end."""
    outcomes = []
    for asked in batch:
        outcome, account = account.after(asked)
        outcomes.append(outcome)
    return outcomes, account


@given(accounts, st.lists(an_update | a_hold, max_size=12))
def test_a_prefix_is_covered_just_where_the_extremes_of_its_running_sum_are(
    account: Account, batch: list[Asked]
) -> None:
    """The statement looks at these extremes alone; it must apply the very batches that were planned."""
    changes = [asked.change(1, str(place), keyed=True) for place, asked in enumerate(batch)]
    for count in range(1, len(batch) + 1):
        assert _extremes_allow(account, changes[:count]) == (
            covered_prefix(changes, account.balance - account.held - account.minimum, BALANCE_LIMIT - account.balance)
            >= count
        )


class Decided(NamedTuple):
    """What was decided, in the order in which it was: a change by its place in the batch, or another process's."""

    place: int | None
    asked: Asked
    outcome: str


async def decide(
    database: Database, account: Account, batch: Sequence[Asked], others: Iterable[Asked]
) -> tuple[int, list[Decided]]:
    """Have the group commit decide a batch, every second update with a key; gives the id and what came of it.

    Another process's change comes before each of its statements, as long as there are `others`: what is known may be
    stale. Where it is not, a statement must decide something, or the batch could wait for ever.
    """
    user_id = next(_users)
    opened(database, user_id, account)
    decided: list[Decided] = []
    coming = enumerate(others)
    statements = 0
    apply = Session.apply

    async def disturbed(session: Session, *arguments: Any) -> Any:
        nonlocal statements
        statements += 1
        await asyncio.sleep(0)  # so that what was decided before is noted before
        for number, asked in itertools.islice(coming, 1):
            change = asked.change(user_id, f"other-{number}", keyed=True)
            if database.execute(ELSEWHERE, user_id, user_id, change.key, *_of(change)) == [(True,)]:
                decided.append(Decided(None, asked, "applied"))
        return await apply(session, *arguments)

    def note(place: int, outcome: asyncio.Future[Outcome]) -> None:
        decided.append(Decided(place, batch[place], told(outcome.result())))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Session, "apply", disturbed)
        async with committing(Settings(database_url=database.url, lanes=2)) as committer:
            futures = []
            for place, asked in enumerate(batch):
                futures.append(committer.submit(asked.change(user_id, f"key-{place}", keyed=bool(place % 2))))
                futures[-1].add_done_callback(functools.partial(note, place))
            await asyncio.gather(*futures)
    first = 1  # nothing is known yet
    assert statements <= first + sum(one.place is None for one in decided) + len(batch)
    return user_id, decided


def opened(database: Database, user_id: int, account: Account) -> None:
    """Open an account that has placed its open holds."""
    holds = [hold(user_id, str(number), amount, 60, None) for number, amount in enumerate(OPEN_HOLDS)]
    database.execute(
        "INSERT INTO users (id, balance, opening_balance, minimum_balance) VALUES (%s, %s, %s, %s)",
        *(user_id, account.balance, account.balance, account.minimum),
    )
    for one in holds:
        assert database.execute(ELSEWHERE, user_id, user_id, one.key, *_of(one)) == [(True,)]


def told(outcome: Outcome) -> str:
    """An outcome in the model's words."""
    if outcome is Undecided.KEY_REUSED:
        return "otherwise"
    assert isinstance(outcome, Applied | Refused)
    if isinstance(outcome, Refused):
        return "refused"
    return "again" if outcome.replayed else "applied"


def _of(change: Change) -> tuple[int, int | None, str | None, int | None]:
    return change.amount, change.hold_amount or None, change.hold_id, change.lasting_seconds


def _extremes_allow(account: Account, changes: list[Change]) -> bool:
    """The statement's condition."""
    freed = list(itertools.accumulate(change.amount - change.hold_amount for change in changes))
    moved = list(itertools.accumulate(change.amount for change in changes))
    lowest = account.balance - account.held + min(freed)
    return account.minimum <= lowest and account.balance + max(moved) <= BALANCE_LIMIT


@pytest.mark.over_both_statements
@given(accounts, batches, st.lists(anything, max_size=8))
@example(Account(16, 0), updates(-3, -3, 2, -4), updates(-1, 10))
@example(Account(16, 0), [Asked("release", 0, 1), *updates(-5, -5, -3, -2)], [])
@example(Account(11, 0), [Asked("hold", 3), Asked("release", 0, 1), Asked("capture", 4, 1)], [Asked("capture", 1, 1)])
@over_a_database
async def test_the_outcomes_of_a_batch_are_those_of_some_order_one_by_one(
    database: Database, account: Account, batch: list[Asked], others: list[Asked]
) -> None:
    """That order is the one in which they were decided; those that are applied keep their order of arrival."""
    user_id, decided = await decide(database, account, batch, others)
    assert sorted(one.place for one in decided if one.place is not None) == list(range(len(batch)))
    outcomes, after = one_by_one(account, (one.asked for one in decided))
    assert [one.outcome for one in decided] == outcomes
    applied = [one.place for one in decided if one.outcome == "applied" and one.place is not None]
    assert applied == sorted(applied)
    held = [(after.balance, after.held)]
    assert database.execute("SELECT balance, held FROM users WHERE id = %s", user_id) == held
    assert verify(database.url).differences == []


@pytest.mark.over_both_statements
@given(accounts, st.lists(anything, max_size=5))
@over_a_database
async def test_some_order_is_found_by_trying_them_all(database: Database, account: Account, batch: list[Asked]) -> None:
    """As above, without trusting the order of the decisions."""
    _, decided = await decide(database, account, batch, ())
    outcomes = {one.place: one.outcome for one in decided}
    assert any(
        [outcomes[index] for index in order] == one_by_one(account, (batch[index] for index in order))[0]
        for order in itertools.permutations(range(len(batch)))
    )
