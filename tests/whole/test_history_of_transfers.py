"""Transfers through several processes are linearizable over all accounts; and the checker would notice if not."""

from pathlib import Path

import pytest

from atomic_balance.changes import settlement_key
from atomic_balance.postgres.verify import verify
from tests.client import session
from tests.database import Database
from tests.history import Applied, Operation, Snapshot, Transfer, contradictions_between
from tests.paying import History
from tests.processes import running_service

USERS = (1, 2, 3, 4)
OPENING = 40
CLIENTS = 40
SECONDS = 5


@pytest.mark.slow
async def test_transfers_through_several_processes_are_linearizable(database: Database, tmp_path: Path) -> None:
    """So are holds whose captures pay others.

    Whoever reads all accounts at once, at any moment, sees all of a transfer or nothing of it.
    """
    environment = {"DATABASE_URL": database.url}
    history = History(database, USERS, OPENING)
    async with (
        running_service(environment, tmp_path) as one,
        running_service(environment, tmp_path) as two,
        running_service(environment, tmp_path) as three,
        session(connections_max=0) as client,
    ):
        await history.load(client, [one.url, two.url, three.url], CLIENTS, SECONDS)
    told = [(one.balances is not None, one.replayed) for one in history.transfers]
    assert set(told) == {(applied, replayed) for applied in (True, False) for replayed in (True, False)}
    holds = [one for updates in history.updates.values() for one in updates if one.hold_amount > 0]
    assert {one.new_balance is None for one in holds} == {True, False}
    captures = [one for one in history.transfers if one.name.startswith(settlement_key(""))]
    assert {one.replayed for one in captures} == {True, False}
    assert len(history.snapshots) > 50
    assert history.contradictions() == []
    assert verify(database.url).differences == []


FINE = [
    Transfer("t", 1, {2: 10, 3: 5}, 0, 2, {1: 15, 2: 40, 3: 35}),
    Transfer("u", 2, {1: 20}, 1, 4, {2: 20, 1: 35}),
    Transfer("v", 3, {1: 50}, 5, 6, None),
    Transfer("t", 1, {2: 10, 3: 5}, 8, 9, {1: 15, 2: 40, 3: 35}, replayed=True),
]
UPDATES = {3: [Operation("a", 4, 6, 7, 39)]}
JOURNALS = {
    1: [Applied("t", -15, 15), Applied("u", 20, 35)],
    2: [Applied("t", 10, 40), Applied("u", -20, 20)],
    3: [Applied("t", 5, 35), Applied("a", 4, 39)],
}
SNAPSHOTS = [
    Snapshot(0.1, 0.2, {1: (0, 30), 2: (0, 30), 3: (0, 30)}),
    Snapshot(1, 3, {1: (1, 15), 2: (1, 40), 3: (1, 35)}),
    Snapshot(7.1, 7.2, {1: (2, 35), 2: (2, 20), 3: (2, 39)}),
    Snapshot(5, 7, {3: (1, 35)}),
]


def test_the_checker_accepts_what_is_linearizable() -> None:
    assert contradictions_between(UPDATES, FINE, SNAPSHOTS, JOURNALS, dict.fromkeys(JOURNALS, 30)) == []


def told(index: int, **values: object) -> list[Transfer]:
    return [one._replace(**values) if at == index else one for at, one in enumerate(FINE)]  # type: ignore[arg-type]


def read(index: int, **values: object) -> list[Snapshot]:
    return [one._replace(**values) if at == index else one for at, one in enumerate(SNAPSHOTS)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("transfers", "snapshots", "journals", "said"),
    [
        pytest.param(
            told(0, balances={1: 15, 2: 41, 3: 35}),
            SNAPSHOTS,
            {},
            "user 2: t was answered 41, the journal knows otherwise",
            id="another balance of a payee",
        ),
        pytest.param(
            FINE,
            SNAPSHOTS,
            {3: [Applied("a", 4, 34)]},
            "t moves {1: -15, 2: 10, 3: 5}, the journal says {1: -15, 2: 10}",
            id="a credit that is missing",
        ),
        pytest.param(
            FINE,
            SNAPSHOTS,
            {3: [Applied("t", 6, 36), Applied("a", 4, 40)]},
            "t moves {1: -15, 2: 10, 3: 5}, the journal says {1: -15, 2: 10, 3: 6}",
            id="a credit of another amount",
        ),
        pytest.param(
            FINE,
            SNAPSHOTS,
            {3: [*JOURNALS[3], Applied("x", 1, 40)]},
            "x moves nothing, the journal says {3: 1}",
            id="a credit that nobody asked for",
        ),
        pytest.param(
            FINE,
            SNAPSHOTS,
            {1: [*JOURNALS[1], Applied("v", 50, 85)]},
            "v moves nothing, the journal says {1: 50}",
            id="a credit of what was refused",
        ),
        pytest.param(
            told(2, payees={1: 30}),
            SNAPSHOTS,
            {},
            "user 3: the refusal of v is not justified",
            id="a refusal of what was covered",
        ),
        pytest.param(
            FINE,
            SNAPSHOTS,
            {2: [Applied("u", -20, 10), Applied("t", 10, 20)]},
            "the orders of the accounts contradict each other: ",
            id="two transfers of the same accounts in another order",
        ),
        pytest.param(
            [FINE[0]._replace(balances={1: 35, 2: 20, 3: 35}), FINE[1]._replace(asked=2.5, balances={2: 10, 1: 50})],
            SNAPSHOTS,
            {1: [Applied("u", 20, 50), Applied("t", -15, 35)], 2: [Applied("u", -20, 10), Applied("t", 10, 20)]},
            "user 1: version 2 was answered before one with a smaller version was asked for",
            id="the later one answered first",
        ),
        pytest.param(
            FINE,
            read(1, accounts={1: (1, 15), 2: (0, 30)}),
            {},
            "a part of t was read",
            id="a torn read of two",
        ),
        pytest.param(
            FINE,
            read(1, accounts={1: (1, 15), 2: (0, 30), 3: (1, 35)}),
            {},
            "the accounts have 80 together, not 90",
            id="a torn read of all",
        ),
        pytest.param(
            FINE,
            read(1, accounts={1: (1, 16)}),
            {},
            "user 1: 16 was read at version 1, the journal knows otherwise",
            id="a read of what never was",
        ),
        pytest.param(
            FINE,
            read(0, asked=2.1, answered=2.2),
            {},
            "t was answered before a read that has not seen it",
            id="a stale read",
        ),
        pytest.param(
            FINE,
            read(3, asked=5, answered=5.5, accounts={3: (2, 39)}),
            {},
            "a was read before it was asked for",
            id="a read of what was yet to come",
        ),
    ],
)
def test_the_checker_notices(
    transfers: list[Transfer], snapshots: list[Snapshot], journals: dict[int, list[Applied]], said: str
) -> None:
    found = contradictions_between(UPDATES, transfers, snapshots, JOURNALS | journals, dict.fromkeys(JOURNALS, 30))
    assert any(line.startswith(said) for line in found), found


def test_the_checker_notices_an_order_that_no_single_account_shows() -> None:
    """t is over before a is asked for; but a comes before u in account 3, and u before t in account 2."""
    transfers = [
        Transfer("t", 1, {2: 10}, 0, 1, {1: 20, 2: 30}),
        Transfer("u", 2, {3: 10}, 0, 9, {2: 20, 3: 41}),
    ]
    updates = {3: [Operation("a", 1, 5, 6, 31)]}
    journals = {
        1: [Applied("t", -10, 20)],
        2: [Applied("u", -10, 20), Applied("t", 10, 30)],
        3: [Applied("a", 1, 31), Applied("u", 10, 41)],
    }
    assert contradictions_between(updates, transfers, [], journals, dict.fromkeys(journals, 30)) == [
        "t was answered before one that comes before it, in any account, was asked for"
    ]
