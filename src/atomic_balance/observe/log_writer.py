"""Writes log lines without making anybody wait: a bounded queue, and a thread that empties it."""

import contextlib
import logging
import os
import queue
import signal
import threading
import time

LINES_MAX = 1_000
FLUSH_SECONDS = 1.0
_RETRY_SECONDS = 0.05


class LogWriter(logging.Handler):
    """Writes lines to a file descriptor in a thread of its own, which the first line starts.

    A line is dropped if LINES_MAX are waiting already, or if it can't be written. As soon as lines can be written
    again, one says how many were dropped. A forked process begins with an empty queue.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._waiting: queue.Queue[bytes | threading.Event] = queue.Queue(LINES_MAX)
        self._thread: threading.Thread | None = None
        self._turned_away = 0
        self._failed = 0

    @property
    def dropped(self) -> int:
        """How many lines this process has dropped."""
        return self._turned_away + self._failed

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line; it is formatted here, where the request that it belongs to is known."""
        try:
            self._waiting.put_nowait(self._line(record))
        except queue.Full:
            self._turned_away += 1
        except Exception:  # noqa: BLE001 - a mistake in a log call must not fail the code around it
            self.handleError(record)
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="log writer", daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Wait until the lines so far are written, but not for long: perhaps nobody reads them."""
        if self._thread is not None:
            written = threading.Event()
            with contextlib.suppress(queue.Full):
                self._waiting.put(written, timeout=FLUSH_SECONDS)
                written.wait(FLUSH_SECONDS)

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode(errors="backslashreplace")

    def _write_all(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # signals are for the main thread
        said = 0
        while True:
            waiting = self._waiting.get()
            if isinstance(waiting, threading.Event):
                waiting.set()
                continue
            self._failed += not self._written(waiting)
            dropped = self.dropped
            if dropped > said and self._written(self._line(_of_dropped(dropped - said))):
                said = dropped

    def _written(self, line: bytes) -> bool:
        """Write `line`, however long that takes; gives whether it was written."""
        while line:
            try:
                line = line[os.write(self._descriptor, line) :]
            except BlockingIOError:  # another process may have set O_NONBLOCK on the file that they share
                time.sleep(_RETRY_SECONDS)
            except OSError:
                return False
        return True


def dropped_lines() -> int:
    """How many log lines this process has dropped."""
    return sum(handler.dropped for handler in logging.getLogger().handlers if isinstance(handler, LogWriter))


def _of_dropped(count: int) -> logging.LogRecord:
    message = "%d log lines were dropped, because they could not be written"
    return logging.LogRecord("atomic_balance", logging.WARNING, __file__, 0, message, (count,), None)
