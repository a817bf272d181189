"""Directories that other users of the machine can neither enter nor replace."""

import contextlib
import fcntl
import os
import pwd
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from atomic_balance.postgres.embedded.errors import EmbeddedPostgresError

_OURS = re.compile(r"lock|postgres[.-].*")


def close_data_dir(data_dir: Path) -> None:
    """Make sure that other users can't write in `data_dir`, and can't enter it if it holds nothing but our data.

    Raises EmbeddedPostgresError if it is another user's, or others may write in it; OSError if it can't be opened.
    """
    with open_directory(data_dir) as descriptor:
        found = os.fstat(descriptor)
        ours = found.st_uid == os.geteuid()
        if not ours and found.st_uid != 0:
            owners = f"user {_name(os.geteuid())}, not of {_name(found.st_uid)}"
            raise EmbeddedPostgresError(f"DATA_DIR: expected a directory of {owners}: {data_dir}")
        if ours and all(_OURS.fullmatch(name) for name in os.listdir(descriptor)):  # noqa: PTH208 - what is open
            os.fchmod(descriptor, 0o700)
            return
        writers = stat.S_IWGRP | stat.S_IWOTH if ours else stat.S_IWOTH  # root may let a group write in its own
        if found.st_mode & writers and not found.st_mode & stat.S_ISVTX:
            raise EmbeddedPostgresError(f"DATA_DIR: expected a directory that others may not write in: {data_dir}")


def close_cluster(cluster: Path, user: pwd.struct_passwd | None) -> None:
    """Make sure that only the server's `user` (None: this process's) can enter the directory of its data and socket.

    Raises EmbeddedPostgresError if it is another user's, a link or not there.
    """
    owner = user.pw_uid if user else os.geteuid()
    try:
        with open_directory(cluster) as descriptor:
            if os.fstat(descriptor).st_uid == owner:
                os.fchmod(descriptor, 0o700)
                return
    except OSError as error:
        raise EmbeddedPostgresError(f"{cluster}: expected PostgreSQL's data ({error.strerror})") from error
    raise EmbeddedPostgresError(f"{cluster}: expected a directory of user {_name(owner)}")


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """A descriptor of the directory at `path`, which must not be a symbolic link. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_unless_link(path: str, flags: int) -> int:
    """An `opener` for `open()`: a new file is ours alone, and a symbolic link raises OSError."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


@contextlib.contextmanager
def temporary_directory(prefix: str) -> Iterator[Path]:
    """A directory in /tmp with a random name that only this process's user may enter."""
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir="/tmp", ignore_cleanup_errors=True) as path,
        open_directory(Path(path)) as descriptor,
    ):
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # systemd-tmpfiles(8) removes what is old, unless it is locked
        yield Path(path)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
