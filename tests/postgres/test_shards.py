"""On which shard an account lies: as PostgreSQL hashes, and as a cluster says."""

import random

import pytest

from atomic_balance.changes import BALANCE_LIMIT
from atomic_balance.postgres.session import connect
from atomic_balance.postgres.shards import Shards, hash_of
from atomic_balance.settings import Settings
from tests.database import Database


def test_an_account_is_hashed_as_postgresql_does(database: Database) -> None:
    chance = random.Random(1)
    user_ids = [1, 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, BALANCE_LIMIT]
    user_ids += [chance.randint(1, 2 ** chance.randint(1, 53) - 1) for _ in range(20_000)]
    rows = database.execute("SELECT id, hashint8(id) FROM unnest(%s::bigint[]) AS id", user_ids)
    assert {user_id: hash_of(user_id) for user_id in user_ids} == dict(rows)


def test_a_shard_has_the_hashes_from_its_own_bound_up_to_the_next() -> None:
    shards = Shards((hash_of(1), hash_of(1) + 1))
    assert shards.of(1) == 1
    assert {shards.of(user_id) for user_id in range(2, 1_000)} == {0, 2}
    assert {Shards().of(user_id) for user_id in range(1, 100)} == {0}


@pytest.mark.parametrize("citus", [False, True])
async def test_a_session_knows_the_shards(database: Database, citus: bool) -> None:
    session = await connect(Settings(database_url=database.url, citus=citus))
    await session.close()
    assert session.shards.count == (8 if citus else 1)
    assert session.shards.bounds == tuple(range(-(2**31) + 2**29, 2**31, 2**29)) * citus
