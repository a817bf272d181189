"""Where log lines go and what they look like: readable on a terminal, JSON elsewhere."""

import logging
import sys
import time
from contextvars import ContextVar

from msgspec import json

from atomic_balance.observe.log_writer import LogWriter

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being handled, on every line that is written meanwhile.

A line about a request that another task handles is given the id of that one: `extra={"request_id": ...}`.
"""

_RATE_SECONDS = 1.0


def set_up_logs(level: str) -> None:
    """Send log lines to standard error, from `level` ("debug", "info", ...) on."""
    handler = LogWriter(sys.stderr.fileno())
    handler.setFormatter(ReadableLines() if sys.stderr.isatty() else JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("yoyo").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(RateLimit())


class ReadableLines(logging.Formatter):
    """Time, level, message, and the request's id if there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line, without a traceback."""
        request_id = _request_id(record)
        return super().formatMessage(record) + (f" [request {request_id}]" if request_id else "")


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, message, request_id, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; members without a value are left out."""
        milliseconds = f"{record.msecs:03.0f}"
        line = {
            "time": time.strftime(f"%Y-%m-%dT%H:%M:%S.{milliseconds}Z", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "request_id": _request_id(record),
            "traceback": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.encode({name: value for name, value in line.items() if value is not None}).decode()


def _request_id(record: logging.LogRecord) -> str | None:
    """The id that the line was given, else that of the request that is being handled; None if there is neither."""
    given: str | None = getattr(record, "request_id", None)
    return given or REQUEST_ID.get()


class RateLimit(logging.Filter):
    """Lets one line a second pass, without its traceback: anyone can send what is not HTTP, as often as they like."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is to be written; adds to it how many were left out since the last one."""
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return False
        cause = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
        record.msg = f"{record.getMessage()}: {cause} ({self._left_out} more since the last such line)"
        record.args = record.exc_info = record.exc_text = None
        self._next = now + _RATE_SECONDS
        self._left_out = 0
        return True
