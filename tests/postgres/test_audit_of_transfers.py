"""The audit of transfers: each has all of its legs, no leg is without one, and money is neither made nor lost."""

import asyncio

import pytest

from atomic_balance.changes import (
    BALANCE_LIMIT,
    Applied,
    Change,
    Credit,
    Refusal,
    Refused,
    Undecided,
    capture,
    hold,
    transfer,
)
from atomic_balance.postgres.verify import DIFFERENCES_MAX, Money, Summary, verify
from atomic_balance.settings import Settings
from tests.committing import all_of, committing
from tests.database import Database

FULL = 5


async def transfers(database: Database) -> None:
    """User 1, of 100, has paid 60 to user 2 and 10 to user 3; user 3, of 100, paid 4 to user 2. Both had one refused.

    User 2 was given 5 from outside, and has a hold of 1. User 3 had one of 8; 6 of it
    were captured, to user 1. User 5 is full.
    """
    database.open(dict.fromkeys((1, 2, 3), 100) | {FULL: BALANCE_LIMIT})
    asked = {
        transfer(1, [Credit(2, 60), Credit(3, 10)], "both", "r"): Applied,
        transfer(1, [Credit(2, 500)], "too much", None): Refused(Refusal.INSUFFICIENT_FUNDS),
        transfer(3, [Credit(2, 4)], None, None): Applied,
        transfer(3, [Credit(2, 1), Credit(FULL, 1)], "full", None): Refused(Refusal.BALANCE_LIMIT_EXCEEDED),
        Change(2, 5, "from outside"): Applied,
        hold(2, "h", 1, 3_600, None): Applied,
        hold(3, "c", 8, 3_600, None): Applied,
        capture(3, "c", 8, 6, [Credit(1, 6)]): Applied,
    }
    async with committing(Settings(database_url=database.url)) as committer:
        for change, expected in asked.items():
            (outcome,) = await all_of(committer.submit(change))
            assert expected in (outcome, type(outcome)), (change, outcome)


async def test_sound_transfers_pass(database: Database) -> None:
    await transfers(database)
    money = Money(300 + BALANCE_LIMIT + 5, 300 + BALANCE_LIMIT, 5)
    assert verify(database.url) == Summary(4, 10, money, [])


async def test_the_audit_passes_while_transfers_are_made(database: Database) -> None:
    database.open(dict.fromkeys((1, 2, 3), 100))
    async with committing(Settings(database_url=database.url)) as committer:

        async def pay(payer: int) -> None:
            for number in range(150):
                payees = [Credit(user_id, 1 + number % 9) for user_id in (1, 2, 3) if user_id != payer]
                outcome = await committer.submit(transfer(payer, payees, None, None))
                assert not isinstance(outcome, Undecided)

        paying = asyncio.gather(*(pay(payer) for payer in (1, 1, 2, 2, 3, 3)))
        audits = 0
        while not paying.done():
            found = await asyncio.to_thread(verify, database.url)
            assert (found.money, found.differences) == (Money(300, 300, 0), [])
            audits += 1
        await paying
    assert audits > 1
    assert verify(database.url).differences == []


CREDIT = "user_id = 2 AND idempotency_key = ' 1 both'"
PAYER = "user_id = 1 AND version = 1"
WITHOUT_THE_CREDIT = (
    "UPDATE balance_changes SET version = version - 1, balance = balance - 60 WHERE user_id = 2 AND version > 1;"
    "UPDATE users SET version = version - 1, balance = balance - 60 WHERE id = 2"
)
NO_CREDIT = "user 1: version 1: it pays 60 to user 2, and the journal has no such credit"


@pytest.mark.parametrize(
    ("damage", "differences", "made"),
    [
        pytest.param(
            f"DELETE FROM balance_changes WHERE {CREDIT}; {WITHOUT_THE_CREDIT}",
            [NO_CREDIT],
            -60,
            id="a credit deleted, its account set to fit",
        ),
        pytest.param(
            "UPDATE balance_changes SET version = NULL, refusal = 'balance_limit_exceeded', balance = 9007199254740991"
            f" WHERE {CREDIT}; {WITHOUT_THE_CREDIT}",
            [NO_CREDIT, "user 2: refused: a credit of 60 by user 1, who has no such transfer"],
            -60,
            id="a credit made a refusal",
        ),
        pytest.param(
            f"DELETE FROM balance_changes WHERE {CREDIT}",
            ["user 2: after version 0 the journal goes on with version 2", NO_CREDIT],
            0,
            id="a credit deleted",
        ),
        pytest.param(
            f"UPDATE balance_changes SET amount = 61 WHERE {CREDIT};"
            "UPDATE balance_changes SET balance = balance + 1 WHERE user_id = 2;"
            "UPDATE users SET balance = balance + 1 WHERE id = 2",
            [NO_CREDIT, "user 2: version 1: a credit of 61 by user 1, who has no such transfer"],
            1,
            id="a credit of another amount",
        ),
        pytest.param(
            "INSERT INTO balance_changes (user_id, version, amount, balance, idempotency_key, payer)"
            " VALUES (2, 5, 7, 176, ' 1 other', 1);"
            "UPDATE users SET version = 5, balance = 176 WHERE id = 2",
            ["user 2: version 5: a credit of 7 by user 1, who has no such transfer"],
            7,
            id="a credit added",
        ),
        pytest.param(
            "ALTER TABLE balance_changes DROP CONSTRAINT balance_changes_pkey;"
            "INSERT INTO balance_changes (user_id, version, amount, balance, idempotency_key, payer, reference)"
            " VALUES (2, 5, 60, 229, ' 1 both', 1, 'r');"
            "UPDATE users SET version = 5, balance = 229 WHERE id = 2",
            ["user 2: version 1: a credit of 60 by user 1, who has no such transfer"],
            60,
            id="a credit twice",
        ),
        pytest.param(
            "INSERT INTO balance_changes (user_id, version, amount, balance, idempotency_key, payer)"
            " VALUES (2, 5, 500, 669, ' 1 too much', 1);"
            "UPDATE users SET version = 5, balance = 669 WHERE id = 2",
            ["user 2: version 5: a credit of 500 by user 1, who has no such transfer"],
            500,
            id="a credit of a refused transfer",
        ),
        pytest.param(
            "INSERT INTO balance_changes (user_id, amount, balance, refusal, idempotency_key, payer)"
            " VALUES (2, -500, 3, 'insufficient_funds', ' 1 too much', 1)",
            ["user 2: refused: a credit of -500 by user 1, who has no such transfer"],
            0,
            id="a credit that was refused",
        ),
        pytest.param(
            f"UPDATE balance_changes SET payer = 3 WHERE {CREDIT}",
            [NO_CREDIT, "user 2: version 1: a credit of 60 by user 3, who has no such transfer"],
            0,
            id="another payer",
        ),
        pytest.param(
            f"UPDATE balance_changes SET payer = NULL WHERE {CREDIT}", [NO_CREDIT], -60, id="a credit without a payer"
        ),
        pytest.param(
            f"UPDATE balance_changes SET idempotency_key = ' 1 bot' WHERE {CREDIT}",
            ["user 2: version 1: a credit of 60 by user 1, who has no such transfer", NO_CREDIT],
            0,
            id="another key",
        ),
        pytest.param(
            f"UPDATE balance_changes SET reference = NULL WHERE {CREDIT}",
            [NO_CREDIT, "user 2: version 1: a credit of 60 by user 1, who has no such transfer"],
            0,
            id="another reference",
        ),
        pytest.param(
            f"UPDATE balance_changes SET idempotency_key = 'bot' WHERE {PAYER}",
            [
                NO_CREDIT,
                "user 2: version 1: a credit of 60 by user 1, who has no such transfer",
                "user 1: version 1: it pays 10 to user 3, and the journal has no such credit",
                "user 3: version 1: a credit of 10 by user 1, who has no such transfer",
            ],
            0,
            id="another key of the payer's",
        ),
        pytest.param(
            f"UPDATE balance_changes SET payees = '{{2,59,3,11}}' WHERE {PAYER}",
            [
                "user 1: version 1: it pays 59 to user 2, and the journal has no such credit",
                "user 2: version 1: a credit of 60 by user 1, who has no such transfer",
                "user 1: version 1: it pays 11 to user 3, and the journal has no such credit",
                "user 3: version 1: a credit of 10 by user 1, who has no such transfer",
            ],
            0,
            id="other amounts, and the same sum",
        ),
        pytest.param(
            f"UPDATE balance_changes SET payees = '{{2,60}}' WHERE {PAYER}",
            [
                "user 1: version 1: it takes 70 and pays 60",
                "user 3: version 1: a credit of 10 by user 1, who has no such transfer",
            ],
            0,
            id="a payee less",
        ),
        pytest.param(
            f"UPDATE balance_changes SET payees = NULL WHERE {PAYER}",
            [
                "user 2: version 1: a credit of 60 by user 1, who has no such transfer",
                "user 3: version 1: a credit of 10 by user 1, who has no such transfer",
            ],
            70,
            id="no payees",
        ),
        pytest.param(
            "UPDATE balance_changes SET payees = '{3,5}' WHERE user_id = 2 AND idempotency_key = 'from outside'",
            [
                "user 2: version 3: it takes -5 and pays 5",
                "user 2: version 3: it pays 5 to user 3, and the journal has no such credit",
            ],
            5,
            id="payees of what is no transfer",
        ),
        pytest.param(
            # as many credits as there are legs, and the payer's row, all of another amount
            f"UPDATE balance_changes SET amount = 61 WHERE {CREDIT};"
            f"UPDATE balance_changes SET payees = '{{2,61,3,10}}' WHERE {PAYER};"
            "UPDATE balance_changes SET balance = balance + 1 WHERE user_id = 2;"
            "UPDATE users SET balance = balance + 1 WHERE id = 2",
            ["user 1: version 1: it takes 70 and pays 71"],
            1,
            id="more paid than taken",
        ),
        pytest.param(
            "UPDATE balance_changes SET payees = NULL WHERE user_id = 3 AND hold_amount < 0",
            ["user 1: version 2: a credit of 6 by user 3, who has no such transfer"],
            6,
            id="no payees of a capture",
        ),
        pytest.param(
            "UPDATE balance_changes SET payees = '{1,8}' WHERE user_id = 3 AND hold_amount < 0",
            [
                "user 3: version 4: it takes 6 and pays 8",
                "user 3: version 4: it pays 8 to user 1, and the journal has no such credit",
                "user 1: version 2: a credit of 6 by user 3, who has no such transfer",
            ],
            0,
            id="a capture that pays more than it takes",
        ),
        pytest.param(
            "UPDATE balance_changes SET payees = '{2,501}' WHERE idempotency_key = 'too much'",
            ["user 1: a refused transfer: it takes 500 and pays 501"],
            0,
            id="other payees of a refused transfer",
        ),
        pytest.param(
            "UPDATE balance_changes SET payees = NULL WHERE idempotency_key = 'full'",
            ["user 3: a change by -2 at a balance of 106 can't have been refused for balance_limit_exceeded"],
            0,
            id="no payees of a refused transfer",
        ),
        *(
            pytest.param(
                f"UPDATE balance_changes SET payees = '{{{payees}}}' WHERE idempotency_key = 'too much'",
                ["user 1: a refused transfer: its payees are no list of other users, by id, with what each gets"],
                0,
                id=f"payees {payees}",
            )
            for payees in ("2,500,3", "", "3,1,2,499", "2,250,2,250", "1,500", "2,-1,3,501", "2,0,3,500", "2,NULL")
        ),
    ],
)
async def test_the_audit_of_transfers_finds(database: Database, damage: str, differences: list[str], made: int) -> None:
    await transfers(database)
    database.execute(damage)
    found = verify(database.url)
    assert (found.differences, found.money.made) == (differences, made)


async def test_of_very_many_wrong_legs_the_first_are_listed(database: Database) -> None:
    await transfers(database)
    database.execute(
        "INSERT INTO balance_changes (user_id, version, amount, balance, idempotency_key, payer)"
        "SELECT 2, 4 + number, 1, 169 + number, ' 1 other ' || number, 1 FROM generate_series(1, 20) AS number;"
        "UPDATE users SET version = version + 20, balance = balance + 20 WHERE id = 2"
    )
    assert len(verify(database.url).differences) == DIFFERENCES_MAX
