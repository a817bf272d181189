"""The SQL that the service runs, read from the files beside this one.

In it `{schema}` stands before every table and function of the service's; `in_schema` says which schema that is.
"""

import functools
from importlib import resources


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(f"{name}.sql").read_text()


APPLIED_MIGRATIONS = _read("applied_migrations")
APPLY_CHANGES = _read("apply_changes")
APPLY_SHARD_CHANGES = _read("apply_shard_changes")
APPLY_TRANSFERS = _read("apply_transfers")
APPLY_TRANSFERS_BETWEEN_SHARDS = _read("apply_transfers_between_shards")
BLOCKED_ACCOUNTS = _read("blocked_accounts")
COUNT_IMPORTED_ACCOUNTS = _read("count_imported_accounts")
COUNT_OPEN_HOLDS = _read("count_open_holds")
COUNT_OVERDUE_HOLDS = _read("count_overdue_holds")
EXPIRED_HOLDS = _read("expired_holds")
EXPORT_ACCOUNTS = _read("export_accounts")
IMPORT_ACCOUNTS = _read("import_accounts")
IMPORT_DIFFERENCES = _read("import_differences")
IMPORT_LINES = _read("import_lines")
IMPORT_TABLE = _read("import_table")
LEARN_TYPES = _read("learn_types")
LIST_ACCOUNTS = _read("list_accounts")
KEEP_FEED_ASCENDING = _read("keep_feed_ascending")
OPEN_ACCOUNT = _read("open_account")
READ_ACCOUNT = _read("read_account")
READ_CHANGE = _read("read_change")
READ_CHANGES = _read("read_changes")
READ_CHANGES_AFTER = _read("read_changes_after")
READ_FEED = _read("read_feed")
READ_FEED_HEAD = _read("read_feed_head")
READ_HOLDS = _read("read_holds")
READ_OPEN_HOLDS = _read("read_open_holds")
READ_PAST_BALANCE = _read("read_past_balance")
READ_SHARDS = _read("read_shards")
READ_SHARD_HOLDS = _read("read_shard_holds")
RECORD_REFUSALS = _read("record_refusals")
SET_MINIMUM_BALANCE = _read("set_minimum_balance")
SUM_BALANCES = _read("sum_balances")
TAKE_EXPIRY_TURN = _read("take_expiry_turn")
VERIFY_ACCOUNTS = _read("verify_accounts")
VERIFY_CHANGES = _read("verify_changes")
VERIFY_MONEY = _read("verify_money")
VERIFY_OPEN_HOLDS = _read("verify_open_holds")
VERIFY_TRANSFERS = _read("verify_transfers")


@functools.cache
def in_schema(statement: str, schema: str | None) -> str:
    """`statement` as it is sent, for tables and functions in `schema`; None: wherever the search path finds them.

    A search path of the session's own would do for neither pooler, which share sessions, nor Citus, which has others.
    """
    return statement.replace("{schema}", f'"{schema}".' if schema else "")
