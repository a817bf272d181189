"""What tests of group commit share."""

import logging

import pytest


@pytest.fixture
def debug_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Everything that the service logs."""
    caplog.set_level(logging.DEBUG, "atomic_balance")
    return caplog
