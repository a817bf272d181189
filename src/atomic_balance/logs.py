"""Where log lines go and what they look like."""

import logging
import sys
import time

_SPARING_SECONDS = 1.0


def set_up_logs(level: str) -> None:
    """Send log lines to standard error, from `level` ("debug", "info", ...) on."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr, force=True
    )
    logging.getLogger("yoyo").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(Sparing())


class Sparing(logging.Filter):
    """Lets one line a second pass, without its traceback: anyone can send what is not HTTP, as often as they like."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is to be written; says in it how many were left out since the last one."""
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return False
        cause = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
        record.msg = f"{record.getMessage()}: {cause} ({self._left_out} more since the last such line)"
        record.args = record.exc_info = record.exc_text = None
        self._next = now + _SPARING_SECONDS
        self._left_out = 0
        return True
