"""The embedded PostgreSQL: started, killed and restarted, as root and as an ordinary user, and never left behind."""

import asyncio
import fcntl
import os
import signal
import sys
from pathlib import Path

import aiohttp
import psycopg
import pytest

from atomic_balance.embedded import EmbeddedPostgresError, embedded_postgres
from tests.processes import Service, run, running_service

pytestmark = pytest.mark.slow

NOBODY = 65534
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


async def update(service: Service, amount: int) -> str:
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"{service.url}/api/balance/update", json={"userId": 1, "amount": amount}) as answer,
    ):
        return await answer.text()


async def opened(service: Service) -> None:
    async with (
        aiohttp.ClientSession() as client,
        client.put(f"{service.url}/api/users/1", json={"balance": 10_000}) as answer,
    ):
        assert answer.status == 201


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


async def test_a_restart_has_every_committed_balance(directory: Path, through: tuple[str, ...]) -> None:
    async with running_service({}, directory, through) as service:
        await opened(service)
        assert await update(service, -1) == '{"userId":1,"newBalance":9999}'
    assert service.process.returncode == 0
    await server_gone(directory / ".data")
    async with running_service({}, directory, through) as service:
        assert await update(service, -1) == '{"userId":1,"newBalance":9998}'


async def test_a_killed_service_leaves_no_server_and_loses_nothing(directory: Path, through: tuple[str, ...]) -> None:
    async with running_service({}, directory, through) as service:
        await opened(service)
        for left in (9998, 9996, 9994):
            assert await update(service, -2) == f'{{"userId":1,"newBalance":{left}}}'
        service.process.send_signal(signal.SIGKILL)
        await service.process.wait()
    if sys.platform == "linux":
        await server_gone(directory / ".data")
    async with running_service({}, directory, through) as service:
        assert await update(service, -2) == '{"userId":1,"newBalance":9992}'


async def test_a_restart_right_after_a_kill_waits_for_the_dying_server(
    directory: Path, through: tuple[str, ...]
) -> None:
    async with running_service({}, directory, through) as service:
        await opened(service)
        service.process.send_signal(signal.SIGKILL)
        async with running_service({}, directory, through) as next_one:
            assert await update(next_one, -2) == '{"userId":1,"newBalance":9998}'


async def test_a_second_service_shares_the_server(tmp_path: Path) -> None:
    async with running_service({}, tmp_path) as one, running_service({}, tmp_path) as other:
        await opened(one)
        assert await update(other, -1) == '{"userId":1,"newBalance":9999}'
        assert await update(one, -1) == '{"userId":1,"newBalance":9998}'
        status, output = await run(*(sys.executable, "-m", "atomic_balance", "open", "1", "5"), directory=tmp_path)
        assert (status, output) == (0, "user 1 exists already, balance 9998\n")


def test_the_server_listens_on_no_tcp_port_and_its_directory_is_its_own(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path / "data") as url, psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT current_setting('listen_addresses'), current_setting('unix_socket_directories')"
        )
        addresses, directory = row.fetchone() or (None, "")
        assert addresses == ""
        assert Path(directory).stat().st_mode & 0o777 == 0o700
    assert not Path(directory).exists()


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
