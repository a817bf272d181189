"""The lock of a data directory. The server's processes inherit and hold it, so while it is free no server is alive."""

import contextlib
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

_OTHERS = stat.S_IRWXG | stat.S_IRWXO

# A process that is forked while the lock is open here, as a worker may be at any time, would hold it for as long as it
# lives. So until the lock is closed again, only the thread that opened it may fork: it forks the server.
_no_fork = threading.RLock()
os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release)


@contextlib.contextmanager
def locked(lock: Path) -> Iterator[int | None]:
    """A descriptor that holds `lock`, for the server to inherit; None while another process holds it.

    At the end it is closed here, and from then on the server's processes alone hold the lock.
    """
    with _no_fork:
        descriptor = _take(lock)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _take(lock: Path) -> int | None:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), lock.lstat()):
            if is_closed(lock):
                return descriptor
            lock.unlink()  # another user who could open it may still have it open: the next try makes a new file
    os.close(descriptor)
    return None


def is_closed(lock: Path) -> bool:
    """Whether the file exists, and only this process's user can open it."""
    try:
        found = lock.lstat()
    except FileNotFoundError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & _OTHERS
