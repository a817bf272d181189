"""A small disk of the database's own, which can be made full: then PostgreSQL says "No space left on device" (53100).

All tables and indexes lie on it, and the WAL does not: without room for the WAL the server would end itself.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

_ROOM = "8g"  # of memory, and only what is used of it


class SmallDisk:
    """A file system in memory, mounted at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def fill(self) -> None:
        """Leave no room at all: the file system is made as small as what is on it."""
        while True:  # until it happens between two writes
            status = os.statvfs(self._path)
            used = (status.f_blocks - status.f_bfree) * status.f_frsize
            with contextlib.suppress(subprocess.CalledProcessError):  # more was written meanwhile
                self._resize(str(used))
                return

    def make_room(self) -> None:
        """Leave as much room as anybody needs."""
        self._resize(_ROOM)

    def _resize(self, size: str) -> None:
        options = f"remount,size={size}"
        subprocess.run(["mount", "-o", options, str(self._path)], check=True, capture_output=True, timeout=60)


class Disks:
    """Gives a server its small disk; to be entered before the server is started, so that it is there until it stops."""

    def __init__(self) -> None:
        self._mounted: list[Path] = []

    def small_disk(self, url: str) -> SmallDisk | None:
        """Move all tables and indexes of the database at `url` to a small disk; None where none can be mounted."""
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("SET allow_in_place_tablespaces = on")
            connection.execute("CREATE TABLESPACE small LOCATION ''")
            ((oid,),) = connection.execute("SELECT oid FROM pg_tablespace WHERE spcname = 'small'").fetchall()
            (path,) = (Path(str(conninfo_to_dict(url)["host"])) / "pg_tblspc" / str(oid)).glob("PG_*")
            if not self._mount(path):
                return None
            for what in ("TABLE", "INDEX"):
                connection.execute(f"ALTER {what} ALL IN TABLESPACE pg_default SET TABLESPACE small".encode())
            connection.execute("CHECKPOINT")  # so that no recovery begins before it was mounted
        return SmallDisk(path)

    @contextlib.contextmanager
    def unmounted_at_the_end(self) -> Iterator["Disks"]:
        """Unmount at the end what was mounted; a process that is killed with -9 leaves that to whoever killed it."""
        try:
            yield self
        finally:
            for path in self._mounted:
                subprocess.run(["umount", str(path)], check=True, timeout=60)

    def _mount(self, path: Path) -> bool:
        owner = path.stat()
        options = f"size={_ROOM},mode=0700,uid={owner.st_uid},gid={owner.st_gid}"
        try:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True, capture_output=True, timeout=60
            )
        except (OSError, subprocess.CalledProcessError):
            return False
        self._mounted.append(path)
        return True
