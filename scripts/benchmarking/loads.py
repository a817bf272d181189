"""What is measured: the contenders by name, the loads, and how many connections each meets."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

USERS = 1_000
BULK_UPDATES = 500

NO_DATABASE = "no database"
SERVICE = "atomic-balance"
BARE_STATEMENT = "bare statement"
FOR_UPDATE = "SELECT ... FOR UPDATE"
SERIALIZABLE = "SERIALIZABLE, retried"
POSTGRES_ALONE = "PostgreSQL alone"
REDIS_ALWAYS = "Redis, fsync always"
REDIS_EVERYSEC = "Redis, fsync everysec"

CONTENDERS: Mapping[str, str] = {
    NO_DATABASE: "the same handler, which answers at once: the limit",
    SERVICE: "this service, `python -m atomic_balance`, with its journal and keys",
    BARE_STATEMENT: "the handler, and `UPDATE ... WHERE balance >= ... RETURNING` for each request",
    FOR_UPDATE: "the handler, and a transaction: `SELECT ... FOR UPDATE`, look, `UPDATE`",
    SERIALIZABLE: "the handler, and a serializable transaction: `SELECT`, look, `UPDATE`; again after a conflict",
    POSTGRES_ALONE: "pgbench with the conditional statement: no HTTP at all",
    REDIS_ALWAYS: "the handler, and a Lua script in Redis, `appendfsync always`: as durable",
    REDIS_EVERYSEC: "the same, `appendfsync everysec`: a crash may lose a second of what was answered",
}

_AMPLE = 10**12
_CORE = (NO_DATABASE, SERVICE, BARE_STATEMENT)


class Load(NamedTuple):
    """Withdrawals from random users of the first `users`, by so many connections from these contenders.

    `status`: what every answer must be. `replay_percent`: how many requests repeat the key of one before; None sends no
    keys. `updates`: of one request; more than one go to the bulk endpoint.
    """

    title: str
    contenders: Mapping[int, Sequence[str]]
    users: int = USERS
    balance: int = _AMPLE
    status: int = 200
    replay_percent: int | None = None
    updates: int = 1


HOT, EXHAUSTED, ROWS, KEYED, REPLAYS, BULK = "hot", "exhausted", "rows", "keyed", "replays", "bulk"

LOADS: Mapping[str, Load] = {
    HOT: Load("one hot row", {1: tuple(CONTENDERS), 64: _CORE, 256: tuple(CONTENDERS), 1024: _CORE}, users=1),
    EXHAUSTED: Load("one exhausted row", {256: tuple(CONTENDERS)}, users=1, balance=0, status=400),
    ROWS: Load("1,000 rows", {1: _CORE, 256: tuple(CONTENDERS)}),
    KEYED: Load("1,000 rows, keyed", {256: (NO_DATABASE, SERVICE)}, replay_percent=0),
    REPLAYS: Load("1,000 rows, keyed, 50 % replays", {256: (NO_DATABASE, SERVICE)}, replay_percent=50),
    # More connections with so many updates each would be more than the service lets wait.
    BULK: Load(f"1,000 rows, bulk of {BULK_UPDATES}", {16: (SERVICE,)}, updates=BULK_UPDATES),
}

FIFTY_ROWS = Load("50 rows", {256: (SERVICE,)}, users=50)
