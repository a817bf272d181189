"""Each judge of the soak test finds what it is there for: a run in which all is right is broken once in each way."""

import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest

from tests.soak.accounts import judge_openings, opening
from tests.soak.asking import Caller, Reply
from tests.soak.feed import Entry, Reader, judge_feed
from tests.soak.holds import Ending, HoldAsked, judge_holds
from tests.soak.imports import ImportAsked, judge_imports
from tests.soak.journal import Account, Journal, Row
from tests.soak.past import ReadAsked, judge_reads
from tests.soak.services import judge_logs
from tests.soak.transfers import TransferAsked, judge_transfers
from tests.soak.updates import UpdateAsked, judge_updates

BEGIN = datetime(2026, 1, 31, 12, tzinfo=UTC)


class Run(NamedTuple):
    """What was asked and answered, and what the journal has."""

    journal: Journal
    openings: list[tuple[int, Reply]]
    updates: list[UpdateAsked]
    transfers: list[TransferAsked]
    holds: list[HoldAsked]
    reads: list[ReadAsked]
    imports: list[ImportAsked]
    seen: list[Entry]
    log: list[str]

    def wrong(self) -> list[str]:
        """What the judges say."""
        return [
            *judge_openings(self.openings, self.journal),
            *judge_updates(self.updates, self.journal),
            *judge_transfers(self.transfers, self.journal),
            *judge_holds(self.holds, self.journal),
            *judge_reads(self.reads, self.journal),
            *judge_imports(self.imports, self.journal),
            *judge_feed([self.seen], self.journal),
            *judge_logs([self.log]),
        ]


def said(code: int, **body: Any) -> Reply:
    """An answer with this status."""
    return Reply(code, body, False)


def row(number: int, user_id: int, version: int | None, amount: int, balance: int, key: str, **more: Any) -> Row:
    """A row of the journal, a second after the one before."""
    others = dict.fromkeys(("reference", "hold_amount", "expires_at", "payees", "payer")) | more
    return Row(
        user_id,
        version,
        amount,
        balance,
        key,
        created_at=BEGIN + timedelta(seconds=number),
        feed_position=number,
        **others,
    )


UPDATE, REFUSED, TRANSFER, CREDIT, PLACED, SETTLED, PAID = range(7)
ROWS = [
    row(1, 1, 1, -7, 993, "key-0", reference="request-0"),
    row(2, 1, None, -3000, 993, "key-1", reference="request-1"),
    row(3, 1, 2, -40, 953, "transfer-0", reference="transfer-0", payees=[2, 40]),
    row(3, 2, 1, 40, 1040, " 1 transfer-0", reference="transfer-0", payer=1),
    row(4, 1, 3, 0, 953, "hold-0", hold_amount=7, expires_at=BEGIN),
    row(5, 1, 4, -2, 951, " settlement hold-0", hold_amount=-7, payees=[2, 2]),
    row(5, 2, 2, 2, 1042, " 1  settlement hold-0", payer=1),
]
ENDED = Ending(
    "capture", {2: 2}, said(200, status="captured", captured=2, newBalance=951, to=[{"userId": 2, "newBalance": 1042}])
)
NOT_FOUND = Ending("release", {}, said(404, error="Hold not found"))
RIGHT = Run(
    Journal(ROWS, {user_id: Account(*opening(1), BEGIN) for user_id in (1, 2)} | {100_000: Account(5, -1, BEGIN)}, 0),
    [(1, said(201)), (2, said(0)), (2, said(201)), (1, said(200)), (9, said(503))],
    [
        UpdateAsked(1, -7, "key-0", "request-0", [said(0), said(200, newBalance=993)]),
        UpdateAsked(1, -3000, "key-1", "request-1", [said(400)]),
        UpdateAsked(2, 5, None, "request-2", [said(503)]),
    ],
    [
        TransferAsked(
            payer=1,
            payees={2: 40},
            key="transfer-0",
            reference="transfer-0",
            all_exist=True,
            replies=[said(200, newBalance=953, to=[{"userId": 2, "newBalance": 1040}])],
        )
    ],
    [
        HoldAsked(
            user_id=1,
            amount=7,
            hold_id="hold-0",
            placings=[said(201, expiresAt="12:00"), said(200, expiresAt="12:00")],
            endings=[
                Ending("release", {}, said(409, error="The hold was captured")),
                ENDED,
            ],
        )
    ],
    [
        ReadAsked(1, True, None, said(200, balance=953, version=2)),
        ReadAsked(1, True, BEGIN + timedelta(seconds=3.5), said(200, balance=953, version=2)),
        ReadAsked(1, True, BEGIN - timedelta(seconds=1), said(404)),
    ],
    [
        ImportAsked({100_000: (5, -1)}, "", [(-9, ""), (0, "1 accounts opened")]),
        ImportAsked({100_100: (5, 0)}, "x", []),
    ],
    [
        Entry(one.user_id, one.version, one.amount, one.hold_amount or 0, one.balance, one.reference)
        for one in sorted(ROWS, key=lambda one: (one.feed_position, one.user_id))
        if one.version
    ],
    ["stopping"],
)


def altered(number: int, **values: Any) -> Callable[[Run], Run]:
    """Something else in a row of the journal."""
    rows = [one._replace(**values) if place == number else one for place, one in enumerate(ROWS)]
    return lambda run: run._replace(journal=run.journal._replace(rows=rows))


def without(number: int) -> Callable[[Run], Run]:
    """A row of the journal is missing."""
    rows = ROWS[:number] + ROWS[number + 1 :]
    return lambda run: run._replace(journal=run.journal._replace(rows=rows))


def twice(number: int) -> Callable[[Run], Run]:
    """A row is there twice."""
    return lambda run: run._replace(journal=run.journal._replace(rows=[*ROWS, ROWS[number]]))


def updated(number: int, *replies: Reply) -> Callable[[Run], Run]:
    """Something else was answered to an update."""
    asked = list(RIGHT.updates)
    asked[number] = asked[number]._replace(replies=[*replies])
    return lambda run: run._replace(updates=asked)


def transferred(*replies: Reply) -> Callable[[Run], Run]:
    """Something else was answered to the transfer."""
    return lambda run: run._replace(transfers=[run.transfers[0]._replace(replies=[*replies])])


def imported(**values: Any) -> Callable[[Run], Run]:
    """Something else was imported, or said about it."""
    return lambda run: run._replace(imports=[run.imports[0]._replace(**values)])


def hold(**values: Any) -> Callable[[Run], Run]:
    """Something else was answered about the hold."""
    return lambda run: run._replace(holds=[run.holds[0]._replace(**values)])


def read(number: int, reply: Reply) -> Callable[[Run], Run]:
    """Something else was read."""
    reads = [one._replace(reply=reply) if place == number else one for place, one in enumerate(RIGHT.reads)]
    return lambda run: run._replace(reads=reads)


def accounts(**values: Any) -> Callable[[Run], Run]:
    """The imported account is another."""
    there = {**RIGHT.journal.accounts, 100_000: RIGHT.journal.accounts[100_000]._replace(**values)}
    return lambda run: run._replace(journal=run.journal._replace(accounts=there))


BREAKS: list[tuple[str, Callable[[Run], Run]]] = [
    ("opened twice", lambda run: run._replace(openings=[*run.openings, (1, said(201))])),
    ("answered as opened and not so", lambda run: run._replace(openings=[(9, said(200))])),
    ("an answer that may never be given", lambda run: run._replace(openings=[(1, said(409))])),
    ("answered 200 and not applied", without(UPDATE)),
    ("one change, several rows", twice(UPDATE)),
    ("another amount", altered(UPDATE, amount=-8)),
    ("another balance", altered(UPDATE, balance=992)),
    ("another key", altered(UPDATE, key="key-9")),
    ("an update that nobody asked for", altered(UPDATE, reference="request-9")),
    ("a refusal that is not bound", without(REFUSED)),
    ("two outcomes", updated(0, said(200, newBalance=993), said(400))),
    ("refused and applied", updated(0, said(400))),
    ("answered 503 and applied", updated(0, said(503))),
    ("an answer that may never be given", updated(0, said(401))),
    ("a replay without a key", updated(2, Reply(503, {}, True))),
    ("not exactly its credits", without(CREDIT)),
    ("one transfer, several rows", twice(CREDIT)),
    ("not exactly its credits", altered(CREDIT, amount=41)),
    ("a credit by another", altered(CREDIT, payer=3)),
    ("other balances", altered(CREDIT, balance=1041)),
    ("another transfer", altered(TRANSFER, payees=[3, 40])),
    ("not exactly its credits", without(TRANSFER)),
    ("a transfer that nobody asked for", lambda run: run._replace(transfers=[])),
    ("answered that nothing was changed", transferred(said(503))),
    ("not found though all exist", transferred(said(404), said(504))),
    ("answered as placed and not placed", without(PLACED)),
    ("another amount", altered(PLACED, hold_amount=8)),
    ("another end", without(SETTLED)),
    ("another end", altered(SETTLED, amount=0)),
    ("another sum", altered(SETTLED, amount=-3)),
    ("released more or less", altered(SETTLED, hold_amount=-6)),
    ("other balances", altered(SETTLED, balance=950)),
    ("other payees", altered(SETTLED, payees=[3, 2])),
    ("not exactly its credits", without(PAID)),
    ("not exactly its credits", twice(PAID)),
    ("other balances", altered(PAID, balance=1)),
    ("an end that nobody asked for", hold(endings=[])),
    ("two ends of its time", hold(placings=[said(201, expiresAt="12:00"), said(200, expiresAt="12:01")])),
    ("refused and placed", hold(placings=[said(400)])),
    ("answered 503 and placed", hold(placings=[said(503)])),
    (
        "not found and placed",
        hold(endings=[ENDED, NOT_FOUND]),
    ),
    ("a hold or an end that nobody asked for", lambda run: run._replace(holds=[])),
    ("have expired and are still open", lambda run: run._replace(journal=run.journal._replace(overdue=1))),
    ("another balance than the journal has", read(0, said(200, balance=952, version=2))),
    ("another balance than the journal has", read(1, said(200, balance=993, version=1))),
    ("not found though it was open", read(0, said(404))),
    ("not found though it was open", read(1, said(404))),
    ("read before it was open", read(2, said(200, balance=1000, version=0))),
    ("another balance than the journal has", altered(TRANSFER, created_at=BEGIN + timedelta(seconds=4))),
    (
        "not all and not none",
        imported(lines={100_000: (5, -1), 100_001: (1, 0)}, ends=[]),
    ),
    ("other values", accounts(opening_balance=6)),
    ("imported in spite of its fault", imported(fault="x")),
    (
        "said to be done, and not there",
        imported(lines={100_200: (1, 0)}),
    ),
    (
        "turned away without a fault",
        imported(ends=[(1, "nothing was imported")]),
    ),
    (
        "a failure that is not the database's",
        imported(ends=[(1, "Traceback")]),
    ),
    ("an account that no file has", lambda run: run._replace(imports=[])),
    ("reader 0 was not given", lambda run: run._replace(seen=run.seen[1:])),
    ("reader 0 was not given", lambda run: run._replace(seen=run.seen[:-1])),
    ("once too often", lambda run: run._replace(seen=[run.seen[0], *run.seen])),
    ("in another order", lambda run: run._replace(seen=[run.seen[1], run.seen[0], *run.seen[2:]])),
    ("once too often, or wrongly", lambda run: run._replace(seen=[run.seen[0]._replace(balance=0), *run.seen[1:]])),
    ("a service had a fault", lambda run: run._replace(log=["Traceback (most recent call last):"])),
]


def test_a_run_in_which_all_is_right() -> None:
    assert RIGHT.wrong() == []


@pytest.mark.parametrize(("complaint", "broken"), BREAKS)
def test_what_is_broken_is_found(complaint: str, broken: Callable[[Run], Run]) -> None:
    wrong = broken(RIGHT).wrong()
    assert any(complaint in line for line in wrong), wrong


class TwoPages(Caller):
    """Gives a page of the feed, and then another one after the same position."""

    def __init__(self, *pages: list[Entry]) -> None:
        self._pages = [*pages]

    async def ask(self, *_: Any, **__: Any) -> Reply:
        names = ("userId", "version", "amount", "holdAmount", "balance", "reference")
        changes = [dict(zip(names, entry, strict=True)) for entry in self._pages.pop(0)]
        return said(200, changes=changes, next="1.1.1")


class AlwaysLost(random.Random):
    """Lets a reader lose every answer."""

    def random(self) -> float:
        return 0.0


@pytest.mark.parametrize(("second", "found"), [(RIGHT.seen, False), (RIGHT.seen[1:], True), ([], True)])
async def test_a_reader_finds_that_a_page_is_another_when_it_is_read_again(second: list[Entry], found: bool) -> None:
    reader = Reader(TwoPages(RIGHT.seen[:2], second), AlwaysLost(), Counter())
    await reader.read_page(0, 1_000)
    await reader.read_page(0, 1_000)
    assert any("other changes after the same position" in line for line in reader.wrong) == found
