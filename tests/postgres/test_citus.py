"""What is particular to Citus, as far as a PostgreSQL without it can show: the tests of both statements do the rest."""

import asyncio
import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

import psycopg
import pytest
from asyncpg import exceptions

from atomic_balance.changes import Applied, Change, Credit, Undecided, transfer
from atomic_balance.postgres.failures import Failure, failure_of
from atomic_balance.postgres.statements import in_schema
from atomic_balance.postgres.verify import verify
from atomic_balance.settings import Settings
from tests.committing import committing
from tests.database import Database
from tests.processes import ROOT

PARTITIONS = 16
STATEMENTS = {
    path.name.removesuffix(".sql"): in_schema(path.read_text(), None)
    for path in resources.files("atomic_balance.postgres.statements").iterdir()
    if path.name.endswith(".sql")
}
# Each statement's parameters for the user 1, who has one change, "a".
CHANGES = (
    "ARRAY[-1, -1, 0], ARRAY[NULL, NULL, 2], ARRAY[NULL, NULL, NULL]::text[], ARRAY[NULL, NULL, 60],"
    " ARRAY[NULL, NULL, NULL]::text[], ARRAY[true, false, false], '1s'"
)
OF_ONE_USER = {
    "apply_changes": f"1, ARRAY[1, 1, 1], ARRAY['a', 'b', 'c'], {CHANGES}",
    "apply_shard_changes": "1, '{1}', '{b}', '{-1}', NULL, NULL, NULL, NULL, '{true}', '1s'",
    "open_account": "1, 0, 0",
    "read_account": "1",
    "read_change": "1, 'a'",
    "read_changes": "1, NULL, 10",
    "read_changes_after": "1, 5, 10",
    "read_open_holds": "1, '', 10",
    "read_past_balance": "1, now()",
    "read_shard_holds": "ARRAY[1, 1], ARRAY['a', 'b']",
    "record_refusals": "ARRAY[1], ARRAY['c'], ARRAY[-99], ARRAY[NULL]::bigint[], ARRAY[NULL]::text[],"
    " ARRAY[NULL]::text[], ARRAY[9], ARRAY['insufficient_funds'], '1s'",
    "set_minimum_balance": "1, -5",
}
OF_ALL_USERS = {"verify_accounts", "verify_changes", "verify_open_holds"}
BETWEEN_USERS = {
    "export_accounts",
    "import_accounts",
    "import_differences",
    "list_accounts",
    "verify_money",
    "verify_transfers",
}
OF_THE_FEED = {
    "keep_feed_ascending",
    "read_feed",
    "read_feed_head",
}  # which is not offered with Citus
OF_A_BATCH = {
    "apply_transfers",
    "apply_transfers_between_shards",
    "blocked_accounts",
    "count_open_holds",
    "count_overdue_holds",
    "expired_holds",
    "read_holds",
    "sum_balances",
}
OF_NO_USER = {
    "applied_migrations",
    "count_imported_accounts",
    "import_lines",
    "import_table",
    "learn_types",
    "read_shards",
    "take_expiry_turn",
}


@pytest.fixture
def partitioned(database: Database) -> Database:
    """A database whose journal is partitioned as the documentation says."""
    (recipe,) = re.findall(r"```sql\n(BEGIN;\n.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
    database.execute(recipe)
    return database


@pytest.fixture
def sharded(partitioned: Database) -> Database:
    """A database with both tables partitioned by the hash of the user id: as Citus shards them, within one server."""
    database = partitioned
    database.execute("CREATE TABLE accounts (LIKE users INCLUDING ALL) PARTITION BY HASH (id)")
    database.execute("DROP TABLE users")
    database.execute("ALTER TABLE accounts RENAME TO users")
    database.execute("ALTER TABLE users RENAME CONSTRAINT accounts_pkey TO users_pkey")
    for number in range(PARTITIONS):
        database.execute(
            f"CREATE TABLE users_{number} PARTITION OF users FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {number})"
        )
    database.execute(
        "INSERT INTO users (id, balance, opening_balance) SELECT id, 10, 10 FROM generate_series(1, 10000) AS id"
    )
    database.execute("SELECT FROM apply_shard_changes(1, '{1}', '{a}', '{-1}', NULL, NULL, NULL, NULL, NULL, '1s')")
    database.execute(
        "INSERT INTO balance_changes (user_id, idempotency_key, version, amount, balance)"
        " SELECT user_id, 'key ' || version, version, 1, 1 FROM generate_series(2, 50) AS user_id,"
        " generate_series(1, 1000) AS version"
    )
    database.execute("ANALYZE")
    return database


def scanned(plan: dict[str, Any]) -> Iterator[str]:
    """The partitions of which a plan that was run has read or written."""
    if "Relation Name" in plan and plan.get("Actual Loops"):
        yield plan["Relation Name"]
    for child in plan.get("Plans", ()):
        yield from scanned(child)


def test_every_statement_is_known_here() -> None:
    assert set(STATEMENTS) == {*OF_ONE_USER, *OF_ALL_USERS, *BETWEEN_USERS, *OF_A_BATCH, *OF_THE_FEED, *OF_NO_USER}


@pytest.mark.parametrize("name", sorted(OF_ONE_USER))
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_a_statement_for_one_user_goes_to_one_shard(sharded: Database, name: str, mode: str) -> None:
    """It names the distribution column of every table that it touches, or the server would look everywhere."""
    home = sharded.execute("SELECT tableoid::regclass::text FROM users WHERE id = 1")[0][0].removeprefix("users")
    statement = STATEMENTS[name]
    notices: list[str] = []
    with psycopg.connect(sharded.url) as connection:
        connection.execute(f"SET plan_cache_mode = {mode}".encode())
        # What the function does is not in its caller's plan: auto_explain says it.
        connection.execute("LOAD 'auto_explain'")
        for setting, value in (
            ("log_min_duration", "0"),
            ("log_analyze", "on"),
            ("log_nested_statements", "on"),
            ("log_format", "json"),
            ("log_level", "notice"),
        ):
            connection.execute(f"SET auto_explain.{setting} = '{value}'".encode())
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
        connection.execute(f"PREPARE it AS {statement}".encode())
        connection.execute(f"EXECUTE it ({OF_ONE_USER[name]})".encode())
    plans = [json.loads(notice.split("plan:", 1)[1])["Plan"] for notice in notices if "plan:" in notice]
    touched = {relation for plan in plans for relation in scanned(plan)}
    assert touched, "nothing was read"
    assert touched <= {f"users{home}", f"balance_changes{home}", "users", "balance_changes", "open_holds"}


async def test_a_partitioned_journal_keeps_keys_unique(partitioned: Database) -> None:
    partitioned.open(dict.fromkeys(range(1, 21), 10))
    settings = Settings(database_url=partitioned.url)
    async with committing(settings) as one, committing(settings) as other:
        storm = [
            committer.submit(Change(user_id, -1, f"k{number % 3}"))
            for number in range(60)
            for user_id in range(1, 21)
            for committer in (one, other)
        ]
        outcomes = await asyncio.gather(*storm)
    assert {type(outcome) for outcome in outcomes} == {Applied}
    assert partitioned.execute("SELECT DISTINCT balance, version FROM users") == [(7, 3)]
    assert verify(partitioned.url).differences == []


@pytest.mark.parametrize("name", sorted(OF_ALL_USERS))
def test_a_statement_for_all_users_is_in_order_of_the_distribution_column(name: str) -> None:
    assert STATEMENTS[name].rstrip().endswith(("ORDER BY id", "ORDER BY user_id, version", "ORDER BY user_id, hold_id"))


def test_the_migrations_shard_both_tables_by_user_and_the_function_with_them(database: Database) -> None:
    assert database.execute("SELECT question FROM asked_of_citus") == [
        ("users by id with default",),
        ("balance_changes by user_id with users",),
        ("apply_account(bigint,text[],bigint[],text[],boolean[],text) by account with users",),
        ("open_holds by user_id with users",),
        (
            "apply_account_changes(bigint,text[],bigint[],bigint[],text[],integer[],text[],boolean[],text)"
            " by account with users",
        ),
        (
            "apply_shard_changes(bigint,bigint[],text[],bigint[],bigint[],text[],integer[],text[],boolean[],text)"
            " by account with users",
        ),
    ]


async def test_changes_and_transfers_go_through_functions_of_their_own(database: Database) -> None:
    database.open({1: 10, 2: 10})
    database.execute("ALTER FUNCTION apply_changes RENAME TO gone")
    database.execute("ALTER FUNCTION apply_transfers RENAME TO gone_too")
    pay = transfer(1, [Credit(2, 1)], None, None)
    async with committing(Settings(database_url=database.url, citus=True)) as committer:
        assert await committer.submit(Change(1, -1)) == Applied(9)
        assert await committer.submit(pay) == Applied(8, payee_balances={2: 11})
        database.execute("ALTER FUNCTION apply_shard_changes RENAME TO gone_as_well")
        assert await committer.submit(Change(1, -1)) == Undecided.FAILED


async def test_a_key_conflict_of_a_shard_is_sent_again(database: Database) -> None:
    """As Citus says it: an internal error, with the name of the shard's constraint in its text alone."""
    database.open({1: 10, 2: 10})
    database.execute(
        """
        CREATE SEQUENCE raised;
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('raised') = 1 THEN
                RAISE EXCEPTION 'duplicate key value violates unique constraint "balance_changes_pkey_102008"'
                      USING ERRCODE = 'XX000';
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER fail BEFORE INSERT ON balance_changes FOR EACH ROW EXECUTE FUNCTION fail();
        """
    )
    async with committing(Settings(database_url=database.url, citus=True)) as committer:
        together = [committer.submit(Change(user_id, -1, "k")) for user_id in (1, 2)]
        assert [await outcome for outcome in together] == [Applied(9), Applied(9)]


@pytest.mark.parametrize(("citus", "outcome"), [(False, Undecided.FAILED), (True, Undecided.UNKNOWN)])
async def test_an_internal_error_may_be_that_of_a_worker_which_has_committed(
    database: Database, citus: bool, outcome: Undecided
) -> None:
    database.open({1: 10})
    database.fail("true", "XX000")
    settings = Settings(database_url=database.url, citus=citus, deadline_seconds=2, statement_seconds=1)
    async with committing(settings) as committer:
        assert await committer.submit(Change(1, -1)) == outcome


@pytest.mark.parametrize(
    ("code", "message", "constraint", "state"),
    [
        ("23505", "", "balance_changes_pkey_102008", Failure.KEY_TAKEN),
        ("23505", "", "balance_changes_version_key_102008", Failure.REJECTED),
        ("23505", "", "balance_changes_7_pkey", Failure.KEY_TAKEN),  # of a partition
        (
            "23505",
            'duplicate key value violates unique constraint "balance_changes_pkey_102008"',
            None,
            Failure.KEY_TAKEN,
        ),
        ("23505", 'duplicate key value violates unique constraint "users_pkey_102001"', None, Failure.REJECTED),
        ("XX000", 'violates unique constraint "balance_changes_pkey_102008"', None, Failure.KEY_TAKEN),
        ("XX000", "terminating connection due to unexpected postmaster exit", None, Failure.UNKNOWN),
        ("08003", "connection not open", None, Failure.UNKNOWN),
        ("08006", "connection to the remote node failed", None, Failure.UNKNOWN),
        ("40P01", "canceling the transaction since it was involved in a distributed deadlock", None, Failure.CONTENDED),
    ],
)
def test_what_the_errors_of_a_cluster_say(code: str, message: str, constraint: str | None, state: Failure) -> None:
    fields = {"S": "ERROR", "V": "ERROR", "C": code, "M": message, "n": constraint}
    error = exceptions.PostgresError.new({name: value for name, value in fields.items() if value is not None})
    assert failure_of(error, citus=True) is state
