"""One server: its data made, started without what an earlier one left, asked whether it answers, stopped."""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg

from atomic_balance.postgres.embedded.directories import close_cluster, open_unless_link, temporary_directory
from atomic_balance.postgres.embedded.programs import (
    dying_with_parent,
    give,
    path_for,
    programs_for,
    run_program,
    start_program,
)

_STOP_SECONDS = 10
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_directories": ".",  # the server works in the directory of its data
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "log_line_prefix": "%m [%p] ",
    "lc_messages": "C",
}
_SOCKET = ".s.PGSQL.5432"
_LEFT_BEHIND = ("postmaster.pid", _SOCKET, f"{_SOCKET}.lock")
# What a URL and PostgreSQL take as it is: a socket's path may have 103 bytes (macOS; Linux 107).
_PLAIN_PATH = re.compile(rf"[\w./-]{{1,{103 - len(_SOCKET) - 1}}}", re.ASCII)


class Installation(NamedTuple):
    """What a server is started from.

    `cluster`: the directory of PostgreSQL's data, in `data_dir`. `programs`: the directory of `postgres` and `initdb`.
    `user`: whom the server runs as; None: the user of this process.
    """

    data_dir: Path
    cluster: Path
    programs: Path
    user: pwd.struct_passwd | None

    @property
    def lock(self) -> Path:
        """The file that a living server holds locked."""
        return self.data_dir / "lock"

    @property
    def server_log(self) -> Path:
        """The file that PostgreSQL's log lines go to."""
        return self.data_dir / "postgres.log"


@contextlib.contextmanager
def running_server(installation: Installation, lock: int, make_data: bool) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, and stop it at the end. Raises EmbeddedPostgresError or OSError.

    `lock`: a descriptor that holds the lock, so that no other server is alive and what an earlier one left can go; it
    must stay open until the server has been started. `make_data`: make the data where there are none.
    """
    user, cluster = installation.user, installation.cluster
    with programs_for(user, installation.programs, installation.data_dir) as programs:
        if make_data and not os.path.lexists(cluster):
            _make_cluster(cluster, programs, user)
        close_cluster(cluster, user)
        for name in _LEFT_BEHIND:
            (cluster / name).unlink(missing_ok=True)
        with (
            open(installation.server_log, "ab", opener=open_unless_link) as server_log,
            path_for(user, cluster) as (path, descriptors),
        ):
            server = start_program(
                programs / "postgres",
                *("-D", path, *(f"--{name}={value}" for name, value in _SETTINGS.items())),
                user=user,
                pass_fds=(lock, *descriptors),
                output=server_log,
                before_start=dying_with_parent(),
            )
        try:
            yield server
        finally:
            _stop(server)


def _make_cluster(cluster: Path, programs: Path, user: pwd.struct_passwd | None) -> None:
    """Make PostgreSQL's data under another name first, so that `cluster` is never half made."""
    unfinished = cluster.with_suffix(".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    give(unfinished, user)
    with path_for(user, unfinished) as (path, descriptors):
        options = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-instructions")
        run_program(programs / "initdb", "-D", path, *options, user=user, pass_fds=descriptors)
    unfinished.rename(cluster)


def _stop(server: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):  # PostgreSQL's fast and immediate shutdown, then force
        server.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_SECONDS)
            return


@contextlib.contextmanager
def socket_directory(cluster: Path) -> Iterator[Path]:
    """`cluster`, or a symbolic link to it if its own path is too long for a socket or needs quoting in a URL."""
    if _PLAIN_PATH.fullmatch(str(cluster)):
        yield cluster
        return
    with temporary_directory("atomic-balance-") as own:
        link = own / "postgres"
        link.symlink_to(cluster)
        yield link


def listens(cluster: Path) -> bool:
    """Whether a server listens on the socket in `cluster`."""
    with socket_directory(cluster) as path, socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path / _SOCKET))
        except OSError:
            return False
    return True


def answers(url: str) -> bool:
    """Whether a server accepts connections at `url`; waits for up to 2 seconds."""
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.Error:
        return False
    return True
