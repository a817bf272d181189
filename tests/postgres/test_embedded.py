"""The embedded PostgreSQL: started, killed and restarted, as root and as an ordinary user, and never left behind."""

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import psycopg
import pytest

from atomic_balance.postgres.embedded import EmbeddedPostgresError, embedded_postgres, keeper
from atomic_balance.postgres.embedded.programs import find_programs
from tests.client import UPDATE, opened, session, update
from tests.database import until
from tests.killable import postmaster
from tests.processes import ROOT, Service, run, running_service

pytestmark = pytest.mark.slow

NOBODY = 65534
INTRUDER = 65533  # neither us nor the server's user
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user as well")
# Run as an ordinary user who may read all that root may: the interpreter and the tests can lie in root's home.
AS_NOBODY = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)


@pytest.fixture(params=["as we are", "as an ordinary user"])
def through(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """How to run the service: where the tests run as root, as an ordinary user too."""
    return AS_NOBODY if request.param == "as an ordinary user" and os.geteuid() == 0 else ()


@pytest.fixture
def directory(through: tuple[str, ...], tmp_path: Path) -> Path:
    """A working directory, below one of root's if that is who we are, in which the service may write."""
    if through:
        os.chown(tmp_path, NOBODY, NOBODY)
    return tmp_path


async def server_gone(data_dir: Path) -> None:
    """Wait until no server process holds the lock of `data_dir` any more."""
    with (data_dir / "lock").open("a") as lock:
        async with asyncio.timeout(10):
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    await asyncio.sleep(0.02)
                else:
                    return


async def test_a_restart_has_every_committed_balance(
    directory: Path, through: tuple[str, ...], caller: aiohttp.ClientSession
) -> None:
    async with running_service({}, directory, through) as service:
        await opened(caller, url=service.url)
        assert await update(caller, -1, url=service.url) == (200, '{"userId":1,"newBalance":9999}')
    assert service.process.returncode == 0
    await server_gone(directory / ".data")
    async with running_service({}, directory, through) as service:
        assert await update(caller, -1, url=service.url) == (200, '{"userId":1,"newBalance":9998}')


async def test_a_killed_service_leaves_no_server_and_loses_nothing(
    directory: Path, through: tuple[str, ...], caller: aiohttp.ClientSession
) -> None:
    async with running_service({}, directory, through) as service:
        await opened(caller, url=service.url)
        for left in (9998, 9996, 9994):
            assert await update(caller, -2, url=service.url) == (200, f'{{"userId":1,"newBalance":{left}}}')
        service.process.send_signal(signal.SIGKILL)
        await service.process.wait()
    if sys.platform == "linux":
        await server_gone(directory / ".data")
    async with running_service({}, directory, through) as service:
        assert await update(caller, -2, url=service.url) == (200, '{"userId":1,"newBalance":9992}')


async def test_a_restart_right_after_a_kill_waits_for_the_dying_server(
    directory: Path, through: tuple[str, ...], caller: aiohttp.ClientSession
) -> None:
    async with running_service({}, directory, through) as service:
        await opened(caller, url=service.url)
        service.process.send_signal(signal.SIGKILL)
        async with running_service({}, directory, through) as next_one:
            assert await update(caller, -2, url=next_one.url) == (200, '{"userId":1,"newBalance":9998}')


async def test_a_second_service_shares_the_server(tmp_path: Path, caller: aiohttp.ClientSession) -> None:
    async with running_service({}, tmp_path) as one, running_service({}, tmp_path) as other:
        await opened(caller, url=one.url)
        assert await update(caller, -1, url=other.url) == (200, '{"userId":1,"newBalance":9999}')
        assert await update(caller, -1, url=one.url) == (200, '{"userId":1,"newBalance":9998}')
        status, output = await run(*(sys.executable, "-m", "atomic_balance", "open", "1", "5"), directory=tmp_path)
        assert (status, output) == (0, "user 1 exists already, balance 9998\n")


@contextlib.asynccontextmanager
async def withdrawals(service: Service) -> AsyncIterator[Counter[int]]:
    """Withdraw 1 from user 1 again and again, ten at a time, meanwhile; at the end there are all the answers."""
    answers: Counter[int] = Counter()
    over = asyncio.Event()

    async def withdraw() -> None:
        while not over.is_set():
            async with client.post(service.url + UPDATE, json={"userId": 1, "amount": -1}) as answer:
                answers[answer.status] += 1
            await asyncio.sleep(0.01)

    async with session() as client, asyncio.TaskGroup() as tasks:
        for _ in range(10):
            tasks.create_task(withdraw())
        yield answers
        over.set()


async def more(answers: Counter[int]) -> None:
    """Wait until changes are answered that were sent after now: more of them than are under way."""
    enough = answers.total() + 20
    await until(lambda: answers.total() >= enough)


async def logged(service: Service, text: str) -> None:
    await until(lambda: any(text in line for line in service.log))


PATIENT = {"DEADLINE_SECONDS": "20", "SHUTDOWN_SECONDS": "25"}


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_killed_server_is_started_again_and_no_change_is_lost(
    directory: Path, through: tuple[str, ...], workers: str, caller: aiohttp.ClientSession
) -> None:
    async with running_service({**PATIENT, "WORKERS": workers}, directory, through) as service:
        await opened(caller, url=service.url)
        async with withdrawals(service) as answers:
            for _ in range(2):
                await more(answers)
                os.kill(postmaster(directory / ".data"), signal.SIGKILL)
            await more(answers)
        assert set(answers) == {200}
        assert await update(caller, -1, url=service.url) == (
            200,
            f'{{"userId":1,"newBalance":{10_000 - answers.total() - 1}}}',
        )
    assert service.process.returncode == 0
    await server_gone(directory / ".data")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_server_is_taken_over_when_the_service_that_had_it_ends(
    tmp_path: Path, number: signal.Signals, caller: aiohttp.ClientSession
) -> None:
    async with running_service(PATIENT, tmp_path) as one, running_service(PATIENT, tmp_path) as other:
        await opened(caller, url=one.url)
        async with withdrawals(other) as answers:
            await more(answers)
            one.process.send_signal(number)
            await one.process.wait()
            await logged(other, "was started here again")
            await more(answers)
        assert set(answers) == {200}
        assert await update(caller, -1, url=other.url) == (
            200,
            f'{{"userId":1,"newBalance":{10_000 - answers.total() - 1}}}',
        )
    assert other.process.returncode == 0
    await server_gone(tmp_path / ".data")


async def test_a_server_that_does_not_start_is_tried_again_until_it_does(
    tmp_path: Path, caller: aiohttp.ClientSession
) -> None:
    async with running_service(PATIENT, tmp_path) as service:
        await opened(caller, url=service.url)
        (cluster,) = (tmp_path / ".data").glob("postgres-*/")
        (cluster / "global").rename(cluster / "away")
        os.kill(postmaster(tmp_path / ".data"), signal.SIGKILL)
        await logged(service, "can't be started again")
        (cluster / "away").rename(cluster / "global")
        assert await update(caller, -1, url=service.url) == (200, '{"userId":1,"newBalance":9999}')


async def test_the_service_can_be_stopped_while_its_server_does_not_start(tmp_path: Path) -> None:
    async with running_service({}, tmp_path) as service:
        (cluster,) = (tmp_path / ".data").glob("postgres-*/")
        (cluster / "global").rename(cluster / "away")
        os.kill(postmaster(tmp_path / ".data"), signal.SIGKILL)
        await logged(service, "can't be started again")
        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await service.process.wait() == 0


async def test_data_that_have_gone_are_not_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data_dir = tmp_path / "data"
    with embedded_postgres(data_dir) as url:
        (cluster,) = data_dir.glob("postgres-*/")
        running = postmaster(data_dir)
        cluster.rename(tmp_path / "away")
        os.kill(running, signal.SIGKILL)
        await until(lambda: "can't be started again" in caplog.text)
        assert not cluster.exists()
        (tmp_path / "away").rename(cluster)
        await until(lambda: "was started here again" in caplog.text)
        psycopg.connect(url).close()


_FORKING = """
import os, pathlib, signal, sys, time
from atomic_balance.postgres.embedded import embedded_postgres
from tests.killable import postmaster
import psycopg

data_dir = pathlib.Path(sys.argv[1])
children = []
try:
    with embedded_postgres(data_dir) as url:
        for _ in range(3):
            old = postmaster(data_dir)
            os.kill(old, signal.SIGKILL)
            give_up = time.monotonic() + 10
            while True:
                if (child := os.fork()) == 0:
                    time.sleep(60)
                    os._exit(0)
                children.append(child)
                time.sleep(0.005)
                try:
                    if postmaster(data_dir) != old:
                        psycopg.connect(url).close()
                        break
                except (ValueError, IndexError, psycopg.OperationalError):
                    pass
                assert time.monotonic() < give_up, "a child holds the lock"
finally:
    for child in children:
        os.kill(child, signal.SIGKILL)
"""


async def test_processes_forked_meanwhile_do_not_keep_the_lock(tmp_path: Path) -> None:
    """As workers are; they would hold it for as long as they live, and no server could be started."""
    status, output = await run(sys.executable, "-c", _FORKING, str(tmp_path / "data"), directory=ROOT)
    assert status == 0, output


def test_the_server_listens_on_no_tcp_port_and_its_directories_are_its_own(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path / "data") as url, psycopg.connect(url) as connection:
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
        (cluster,) = (tmp_path / "data").glob("postgres-*/")
        assert stat.S_ISSOCK((cluster / ".s.PGSQL.5432").stat().st_mode)
        for path, mode in ((tmp_path / "data", 0o700), (cluster, 0o700), (tmp_path / "data" / "lock", 0o600)):
            assert stat.S_IMODE(path.stat().st_mode) == mode
    assert not (cluster / ".s.PGSQL.5432").exists()


def test_a_path_that_no_socket_could_have(tmp_path: Path) -> None:
    data_dir = tmp_path / ("a, b&c=%d" + 100 * "e")
    with embedded_postgres(data_dir) as url, embedded_postgres(data_dir) as shared:
        for each in (url, shared):
            psycopg.connect(each).close()


def test_a_lock_that_was_removed_starts_no_second_server(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path) as url:
        running = postmaster(tmp_path)
        (tmp_path / "lock").unlink()
        with embedded_postgres(tmp_path):
            psycopg.connect(url).close()
            assert postmaster(tmp_path) == running


@as_root
def test_programs_that_only_root_may_reach_are_copied_and_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    package = find_programs(None).parents[1]
    for part in (package, package.with_name(f"{package.name}.libs")):
        if part.exists():
            shutil.copytree(part, tmp_path / "wheel" / part.name, symlinks=True)
    programs = tmp_path / "wheel" / package.name / find_programs(None).relative_to(package)
    with embedded_postgres(tmp_path / "data", programs):
        running = Path("/proc", str(postmaster(tmp_path / "data")), "exe").readlink()
        copy = Path(*running.parts[:3])
        assert copy.parent == Path("/tmp")
        assert stat.S_IMODE(copy.stat().st_mode) == 0o700
    assert not copy.exists()
    copy.mkdir()
    with embedded_postgres(tmp_path / "data", programs):
        assert not copy.exists()


# Other users of the machine


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that everybody may pass, as those of a test are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        Path(path).chmod(0o755)
        yield Path(path)


def of_an_earlier_version(data_dir: Path) -> None:
    """Data as an earlier version left them: everybody could enter, and open the lock."""
    with embedded_postgres(data_dir) as url, psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS it")
    data_dir.chmod(0o755)
    (data_dir / "lock").chmod(0o644)


@contextlib.contextmanager
def intruding(command: str, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a shell's command as another user, and kill it at the end if it still runs."""
    with subprocess.Popen(
        ["sh", "-c", command],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        user=INTRUDER,
        group=INTRUDER,
        extra_groups=[],
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def intruded(command: str, directory: Path) -> bool:
    """Whether another user could do it."""
    with intruding(command, directory) as process:
        return process.wait() == 0


def test_data_of_an_earlier_version_are_kept_and_closed(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    of_an_earlier_version(data_dir)
    with (data_dir / "lock").open() as opened_before:
        with embedded_postgres(data_dir) as url, psycopg.connect(url) as connection:
            assert connection.execute("SELECT it FROM kept").fetchone() == (1,)
            assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
            fcntl.flock(opened_before, fcntl.LOCK_EX | fcntl.LOCK_NB)  # what it locks is the lock no more
            with embedded_postgres(data_dir) as shared:
                psycopg.connect(shared).close()
        with embedded_postgres(data_dir):
            pass


@as_root
def test_nobody_else_can_hold_the_lock_or_come_near_the_socket(open_directory: Path) -> None:
    data_dir = open_directory / "data"
    of_an_earlier_version(data_dir)
    with embedded_postgres(data_dir):
        (cluster,) = data_dir.glob("postgres-*/")
        for command in (f"exec 3<{data_dir}/lock", f"ls {data_dir}", f"ls {cluster}", f"ln -s x {data_dir}/y"):
            assert not intruded(command, open_directory), command


@as_root
def test_a_lock_held_by_another_user_leads_to_no_server_of_theirs(
    open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their server listens where ours would; nothing is said to it."""
    monkeypatch.setattr(keeper, "_START_SECONDS", 2)
    data_dir = open_directory / "data"
    of_an_earlier_version(data_dir)
    (cluster,) = data_dir.glob("postgres-*/")
    with (
        socket.socket(socket.AF_UNIX) as theirs,
        intruding(f"exec 3<{data_dir}/lock; flock 3 && echo held && exec sleep 60", open_directory) as holder,
    ):
        theirs.bind(str(cluster / ".s.PGSQL.5432"))
        theirs.listen()
        theirs.setblocking(False)
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(EmbeddedPostgresError, match="another process holds"), embedded_postgres(data_dir):
            pass
        with pytest.raises(BlockingIOError):
            theirs.accept()


@as_root
@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("mkdir data", "expected a directory of user root, not of 65533"),
        ("mkdir own && ln -s own data", "expected a directory of user root, not of 65533"),
    ],
)
def test_a_data_directory_of_another_user_is_refused(open_directory: Path, command: str, complaint: str) -> None:
    open_directory.chmod(0o1777)
    assert intruded(command, open_directory)
    with pytest.raises(EmbeddedPostgresError, match=complaint), embedded_postgres(open_directory / "data"):
        pass


@as_root
@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("mkdir -m 700 {cluster}", "expected a directory of user "),
        ("ln -s {elsewhere} {cluster}", "expected PostgreSQL's data"),
        ("ln -s {elsewhere} lock", "can't be started in DATA_DIR"),
        ("ln -s {elsewhere} postgres.log", "can't be started in DATA_DIR"),
    ],
)
def test_what_another_user_has_put_into_the_data_directory_is_not_used(
    open_directory: Path, tmp_path: Path, command: str, complaint: str
) -> None:
    data_dir = open_directory / "data"
    with embedded_postgres(data_dir):
        (cluster,) = data_dir.glob("postgres-*/")
    shutil.rmtree(data_dir)
    data_dir.mkdir()
    data_dir.chmod(0o777)
    elsewhere = tmp_path / "elsewhere"
    assert intruded(command.format(cluster=cluster.name, elsewhere=elsewhere), data_dir)
    with pytest.raises(EmbeddedPostgresError, match=complaint), embedded_postgres(data_dir):
        pass
    assert not elsewhere.exists()


@as_root
def test_a_directory_that_holds_more_and_others_may_write_in_is_refused_and_left_as_it_is(open_directory: Path) -> None:
    (open_directory / "theirs").touch()
    open_directory.chmod(0o777)
    with pytest.raises(EmbeddedPostgresError, match="others may not write in"), embedded_postgres(open_directory):
        pass
    assert stat.S_IMODE(open_directory.stat().st_mode) == 0o777


async def test_a_half_made_data_directory_is_made_again(tmp_path: Path) -> None:
    half = tmp_path / "data" / "postgres-18.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with embedded_postgres(tmp_path / "data") as url:
        assert url.startswith("postgresql://")
    assert not half.exists()


def test_programs_that_are_not_there_are_named(tmp_path: Path) -> None:
    with (
        pytest.raises(EmbeddedPostgresError, match=r"^POSTGRES_BIN_DIR: expected the programs postgres and initdb in"),
        embedded_postgres(tmp_path / "data", tmp_path / "bin"),
    ):
        pass


def test_a_data_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(EmbeddedPostgresError, match=r"^DATA_DIR: expected a directory to write in"),
        embedded_postgres(tmp_path / "file" / "data"),
    ):
        pass
