"""What is measured: the contenders' names, and the table of loads."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

NO_DATABASE = "no database"
SERVICE = "atomic-balance"
TWO_WORKERS = "atomic-balance, 2 workers"
FOUR_WORKERS = "atomic-balance, 4 workers"
FOUR_PROCESSES = "atomic-balance, 4 processes"
BEFORE = "before"  # the service of another checkout, under every load that SERVICE meets
BARE_UPDATE = "bare UPDATE"
FOR_UPDATE = "SELECT ... FOR UPDATE"
SERIALIZABLE = "SERIALIZABLE, retried"
PGBENCH = "pgbench, no HTTP"
REDIS_ALWAYS = "Redis, fsync always"
REDIS_EVERYSEC = "Redis, fsync everysec"

WORKERS = {SERVICE: 1, TWO_WORKERS: 2, FOUR_WORKERS: 4}
USERS = 1_000

_CORE = (NO_DATABASE, SERVICE, BARE_UPDATE)
_ALL = (*_CORE, FOR_UPDATE, SERIALIZABLE, PGBENCH, REDIS_ALWAYS, REDIS_EVERYSEC)
_TRANSFERS = {1: (NO_DATABASE, SERVICE), 256: (NO_DATABASE, SERVICE, FOR_UPDATE)}


class Load(NamedTuple):
    """Requests by so many connections, to each of these contenders.

    `requests`: the function of wrk.lua that makes them, and its number if it takes one. They are for the first `users`
    accounts, each with `balance`; `status` is what every answer must have. A request has so many `updates`, and adds so
    many `rows` to the service's journal, unless its answer is a replay. `prepared_by`: the function whose requests go
    before each turn, for twice as long, and are not measured.
    """

    title: str
    contenders: Mapping[int, Sequence[str]]
    requests: Sequence[str | int] = ("update",)
    users: int = USERS
    balance: int = 10**12
    status: int = 200
    updates: int = 1
    rows: int = 1
    prepared_by: str = ""


LOADS: Mapping[str, Load] = {
    "hot": Load("one hot row", {1: _ALL, 64: _CORE, 256: (*_ALL, TWO_WORKERS, FOUR_WORKERS), 1024: _CORE}, users=1),
    "exhausted": Load("one exhausted row", {256: _ALL}, users=1, balance=0, status=400, rows=0),
    "rows": Load("1,000 rows", {1: _CORE, 256: (*_ALL, TWO_WORKERS, FOUR_WORKERS)}),
    "keyed": Load("1,000 rows, keyed", {256: (NO_DATABASE, SERVICE)}, ("keyed", 0)),
    "replays": Load("1,000 rows, keyed, 50 % replays", {256: (NO_DATABASE, SERVICE)}, ("keyed", 50)),
    # More connections with so many updates each would be more than the service lets wait.
    "bulk": Load("1,000 rows, bulk of 500", {16: (SERVICE,)}, ("bulk", 500), updates=500, rows=500),
    "fifty": Load("50 rows", {256: (SERVICE, FOUR_PROCESSES)}, users=50),
    "holds": Load("one hot row, holds", {1: (SERVICE,), 256: (SERVICE,)}, ("hold",), users=1, status=201),
    "captures": Load(
        "one hot row, captures of holds", {1: (SERVICE,), 256: (SERVICE,)}, ("capture",), users=1, prepared_by="hold"
    ),
    "one payee": Load("1,000 payers, one payee", _TRANSFERS, ("transfer", 1), rows=2),
    "transfers": Load("1,000 payers, 1,000 payees", _TRANSFERS, ("transfer", 0), rows=2),
    "fifty transfers": Load(
        "transfers among 50 accounts", {256: (SERVICE, FOUR_PROCESSES)}, ("transfer", 0), users=50, rows=2
    ),
}
