"""Keeps one server running for all processes that share a data directory."""

import contextlib
import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from atomic_balance.postgres.embedded.directories import close_cluster, close_data_dir
from atomic_balance.postgres.embedded.errors import EmbeddedPostgresError
from atomic_balance.postgres.embedded.lock import is_closed, locked
from atomic_balance.postgres.embedded.programs import find_programs, find_user, run_program
from atomic_balance.postgres.embedded.server import Installation, answers, listens, running_server, socket_directory

log = logging.getLogger("atomic_balance")

_START_SECONDS = 60
_POLL_SECONDS = 0.02
_WATCH_SECONDS = 0.2
_RETRY_SECONDS = 1.0


@contextlib.contextmanager
def embedded_postgres(data_dir: Path, bin_dir: Path | None = None) -> Iterator[str]:
    """Keep a PostgreSQL running on `data_dir` until the end, here or in another process, and give its URL.

    The programs come from `bin_dir`, else from the wheel, else from PATH or where systems keep them. The URL stays the
    same whenever the server is started again, by whichever process. Raises EmbeddedPostgresError.
    """
    installation = _install(data_dir.resolve(), bin_dir)
    with socket_directory(installation.cluster) as path:
        url = f"postgresql://postgres@/postgres?host={path}"
        up: Future[None] = Future()
        stop = threading.Event()
        keeper = threading.Thread(target=_keep, args=(installation, url, up, stop), name="embedded PostgreSQL")
        keeper.start()
        try:
            try:
                up.result()
            except OSError as error:
                raise EmbeddedPostgresError(f"PostgreSQL can't be started in DATA_DIR: {error}") from error
            yield url
        finally:
            stop.set()
            keeper.join()


def _install(data_dir: Path, bin_dir: Path | None) -> Installation:
    """Make `data_dir`, close it to other users, and find what a server is started from."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        close_data_dir(data_dir)
    except OSError as error:
        raise EmbeddedPostgresError(f"DATA_DIR: expected a directory to write in ({error})") from error
    programs = find_programs(bin_dir)
    version = re.search(r"\d+", run_program(programs / "postgres", "--version", user=None))
    cluster = data_dir / f"postgres-{version[0] if version else ''}"
    return Installation(data_dir, cluster, programs, find_user(cluster))


def _keep(installation: Installation, url: str, up: Future[None], stop: threading.Event) -> None:
    """Start a server whenever no process has one, until `stop` is set.

    `up` is done when a server answers for the first time, or fails with the reason why none does. Later failures are
    logged and tried again: the data are there, and callers wait for them. The server dies with the thread that started
    it, so this thread runs for as long as the process needs the server.
    """
    give_up = time.monotonic() + _START_SECONDS
    while not stop.is_set():
        try:
            with _server_of_our_own(installation, make_data=not up.done()) as server:
                if server is not None:
                    _watch(server, installation, url, up, stop)
                elif up.done():
                    stop.wait(_WATCH_SECONDS)
                elif _is_shared(installation) and answers(url):
                    up.set_result(None)
                elif time.monotonic() > give_up:
                    raise EmbeddedPostgresError(
                        f"another process holds {installation.lock}, and its PostgreSQL does not answer: stop it"
                    )
                else:
                    stop.wait(_POLL_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever it is, there is no server
            if not up.done():
                up.set_exception(error)
                return
            log.error("the embedded PostgreSQL can't be started again: %r", error)
            stop.wait(_RETRY_SECONDS)


@contextlib.contextmanager
def _server_of_our_own(installation: Installation, make_data: bool) -> Iterator[subprocess.Popen[bytes] | None]:
    """A server that was started here; None while another process has one, is starting one or is just losing one.

    `make_data`: make the data where there are none. Once a server has answered, that would be another, empty database
    in place of the one that has gone.
    """
    with contextlib.ExitStack() as running:
        with locked(installation.lock) as lock:
            # A server may be there although the lock is free: its file may have been removed.
            if lock is None or listens(installation.cluster):
                server = None
            else:
                server = running.enter_context(running_server(installation, lock, make_data))
        yield server


def _watch(
    server: subprocess.Popen[bytes], installation: Installation, url: str, up: Future[None], stop: threading.Event
) -> None:
    """Wait until a server that was just started answers, and then until it ends or `stop` is set."""
    warn_at = time.monotonic() + _START_SECONDS
    while not answers(url):  # without a limit while it lives: to recover may take it long
        if stop.is_set():
            return
        if time.monotonic() > warn_at:
            warn_at += _START_SECONDS
            log.warning("PostgreSQL was started, and does not answer yet: see %s", installation.server_log)
        if server.poll() is not None:
            last = installation.server_log.read_text(errors="replace").strip().rsplit("\n", 1)[-1]
            raise EmbeddedPostgresError(f"PostgreSQL did not start: {last} (more in {installation.server_log})")
        stop.wait(_POLL_SECONDS)
    if up.done():
        log.warning("the embedded PostgreSQL had gone, and was started here again")
    else:
        up.set_result(None)
    while server.poll() is None:
        if stop.wait(_WATCH_SECONDS):
            return
    log.error("the embedded PostgreSQL ended by itself: see %s", installation.server_log)


def _is_shared(installation: Installation) -> bool:
    """Whether a process of the same user holds the lock.

    Raises EmbeddedPostgresError if the server's data and its socket could be another user's.
    """
    if not is_closed(installation.lock) or not os.path.lexists(installation.cluster):
        return False
    close_cluster(installation.cluster, installation.user)
    return True
