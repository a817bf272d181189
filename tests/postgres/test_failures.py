"""What a failure of a statement means for its changes, by the server's code for it."""

import asyncio

import asyncpg
import pytest

from atomic_balance.postgres.failures import Failure, failure_of


def server_error(code: str, severity: str = "ERROR", **fields: str) -> asyncpg.PostgresError:
    error: asyncpg.PostgresError = asyncpg.PostgresError.new(
        {"C": code, "S": severity, "V": severity, "M": "on purpose", **fields}
    )
    return error


@pytest.mark.parametrize("code", ["55P03", "40P01", "40001", "57014", "25006", "53100", "23505", "P0001", "XX000"])
def test_after_a_fatal_error_of_any_code_the_outcome_is_unknown(code: str) -> None:
    for severity in ("FATAL", "PANIC"):
        assert failure_of(server_error(code, severity)) is Failure.UNKNOWN
    assert failure_of(server_error(code)) is not Failure.UNKNOWN


@pytest.mark.parametrize(
    "error",
    [
        OSError(),
        ConnectionResetError(),
        TimeoutError(),
        asyncio.CancelledError(),
        asyncpg.InterfaceError("on purpose"),
        asyncpg.InternalClientError("on purpose"),
        asyncpg.ConnectionDoesNotExistError("on purpose"),
        ValueError(),
    ],
    ids=repr,
)
def test_after_an_error_that_is_not_the_servers_the_outcome_is_unknown(error: BaseException) -> None:
    assert failure_of(error) is Failure.UNKNOWN


def test_a_unique_violation_is_a_taken_key_on_the_journals_key_alone() -> None:
    assert failure_of(server_error("23505", n="balance_changes_pkey")) is Failure.KEY_TAKEN
    for other in ("balance_changes_version_key", "users_pkey"):
        assert failure_of(server_error("23505", n=other)) is Failure.REJECTED
