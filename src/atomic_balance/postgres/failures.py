"""What a statement that failed leaves behind, told from its error."""

import re
from enum import Enum, auto

import asyncpg


class Failure(Enum):
    """What a statement that failed leaves behind."""

    CONTENDED = auto()
    """Rolled back, because of another transaction."""
    CANNOT_WRITE = auto()
    """Rolled back, because this server can't write now - read-only, or full: connect anew."""
    KEY_TAKEN = auto()
    """Rolled back: another transaction has just bound a key of this batch."""
    REJECTED = auto()
    """Rolled back, for what is in it."""
    UNKNOWN = auto()
    """It may have been committed, or may still be; the connection is not to be used again."""


class StatementError(Exception):
    """A statement failed, and left `failure` behind; its cause is the error itself.

    `reported`: the server said so, and takes further statements.
    """

    def __init__(self, failure: Failure, reported: bool = False) -> None:
        super().__init__(failure.name)
        self.failure = failure
        self.reported = reported


class UnreachableError(Exception):
    """PostgreSQL did not answer in time, or can't do now what was asked. Its text, if any, may be shown to anyone."""


class EncodingError(Exception):
    """The database has another encoding than the one it must have; the text says so."""


MISCONFIGURED = (
    EncodingError,
    ValueError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)
"""Why a database can't be had with this URL, however long one waits: what `UnreachableError` has as its cause then."""

_ROLLED_BACK = {
    "55P03": Failure.CONTENDED,  # lock_not_available
    "40P01": Failure.CONTENDED,  # deadlock_detected
    "40001": Failure.CONTENDED,  # serialization_failure
    "57014": Failure.CONTENDED,  # query_canceled
    "25006": Failure.CANNOT_WRITE,  # read_only_sql_transaction
    "53": Failure.CANNOT_WRITE,  # insufficient_resources
}
_UNKNOWN = ("08", "57P01", "57P02", "40003")

# A partition's has its name; Citus appends the shard's number.
_JOURNAL_KEY = re.compile(r"balance_changes\w*_pkey(_\d+)?")


def is_reported(error: BaseException) -> bool:
    """Whether a server has told of `error` and keeps the session; after a FATAL it does not."""
    return (getattr(error, "severity_en", None) or getattr(error, "severity", None)) == "ERROR"


def failure_of(error: BaseException, citus: bool = False) -> Failure:
    """What `error`, raised by a statement, leaves behind: UNKNOWN unless the error proves a rollback.

    `citus`: the statement may have gone to other servers, and their failures come as internal errors.
    Decided on SQLSTATE (https://www.postgresql.org/docs/current/errcodes-appendix.html) and on the severity, because
    after a FATAL nobody told us whether the transaction had ended.
    """
    code = getattr(error, "sqlstate", None) or ""
    if not is_reported(error) or not code or code.startswith(_UNKNOWN):
        return Failure.UNKNOWN
    if code == "23505" and _JOURNAL_KEY.fullmatch(getattr(error, "constraint_name", None) or ""):
        return Failure.KEY_TAKEN
    if citus and code in ("23505", "XX000") and not getattr(error, "constraint_name", None):
        if _JOURNAL_KEY.search(getattr(error, "message", None) or ""):  # a shard's, which only the text names
            return Failure.KEY_TAKEN
        if code == "XX000":
            return Failure.UNKNOWN
    return _ROLLED_BACK.get(code) or _ROLLED_BACK.get(code[:2], Failure.REJECTED)
