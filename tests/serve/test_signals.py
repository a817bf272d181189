"""Signals to a service, whether one process serves or several: none that is not to stop it does."""

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.client import UPDATE
from tests.database import Database
from tests.processes import Service, bare_environment, running_service

CALLERS = 20
BALANCE = 1_000_000_000


@pytest.fixture(params=["1", "2"])
def environment(request: pytest.FixtureRequest, database: Database) -> dict[str, str]:
    """The settings of a service with one worker, or several. Its deadline is longer than any pause of the machine."""
    database.open({1: BALANCE})
    return {
        "DATABASE_URL": database.url,
        "WORKERS": request.param,
        "DEADLINE_SECONDS": "50",
        "SHUTDOWN_SECONDS": "60",
    }


async def until(happened: Callable[[], bool]) -> None:
    """Wait for what must happen; the time is only there for the test to end."""
    async with asyncio.timeout(60):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def said(service: Service, what: str, lines: int = 0) -> None:
    """Wait until a line says so, not counting the first `lines` ones."""
    await until(lambda: any(what in line for line in service.log[lines:]))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def update(service: Service, token: str, client: aiohttp.ClientSession | None = None) -> int:
    """The status of an update; without a `client` it comes on a connection of its own."""
    if client is None:
        async with aiohttp.ClientSession() as fresh:
            return await update(service, token, fresh)
    body = {"userId": 1, "amount": -1}
    async with client.post(service.url + UPDATE, json=body, headers=bearer(token)) as answer:
        return answer.status


async def metrics(service: Service, token: str) -> str:
    async with (
        aiohttp.ClientSession() as client,
        client.get(f"{service.url}/metrics", headers=bearer(token)) as answer,
    ):
        return await answer.text()


async def hung_up(service: Service) -> None:
    """Send SIGHUP, and wait until every process has the tokens of now."""
    lines, before = len(service.log), psutil.Process(service.process.pid).children()
    service.process.send_signal(signal.SIGHUP)
    await said(service, "SIGHUP: the tokens are those of .env now", lines)
    await until(lambda: not any(process.is_running() for process in before))


class Callers:
    """Callers that change a balance again and again, each on a connection of its own, with the token of now."""

    def __init__(self, service: Service, token: str) -> None:
        self.token = token
        self.answers: Counter[int] = Counter()
        self.asked_with: list[str] = [""] * CALLERS
        self._service = service
        self._enough = False

    async def _call(self, number: int) -> None:
        async with aiohttp.ClientSession() as client:
            while not self._enough:
                token = self.token
                self.answers[await update(self._service, token, client)] += 1
                self.asked_with[number] = token

    async def each_asked_with(self, token: str) -> None:
        """Wait until all callers have had an answer with `token`."""
        self.token = token
        await until(lambda: set(self.asked_with) == {token})

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Callers"]:
        async with asyncio.TaskGroup() as tasks:
            for number in range(CALLERS):
                tasks.create_task(self._call(number))
            try:
                yield self
            finally:
                self._enough = True


async def test_a_token_is_rotated_without_a_lost_request(
    environment: dict[str, str], database: Database, tmp_path: Path
) -> None:
    """The new one beside the old, the callers move, the old one goes; they ask all the while, and nobody repeats.

    While workers are replaced a caller may not leave its connection alone for longer than DRAIN_SECONDS.
    """
    environment["DRAIN_SECONDS"] = "2"
    env_file = tmp_path / ".env"
    env_file.write_text("API_TOKEN=old\nREAD_TOKEN=look\n")
    async with running_service(environment, tmp_path) as service:
        async with Callers(service, "old").running() as callers:
            await callers.each_asked_with("old")
            env_file.write_text("API_TOKEN=old,new\nREAD_TOKEN=look\n")
            await hung_up(service)
            await callers.each_asked_with("new")
            env_file.write_text("API_TOKEN=new\nREAD_TOKEN=watch\n")
            await hung_up(service)
            callers.asked_with[:] = [""] * CALLERS
            await callers.each_asked_with("new")
        assert [await update(service, token) for token in ("old", "look", "watch")] == [401, 401, 403]
    assert set(callers.answers) == {200}
    assert database.balance(1) == BALANCE - callers.answers[200]


async def test_what_was_accepted_is_answered_though_its_token_goes(
    environment: dict[str, str], database: Database, tmp_path: Path
) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("API_TOKEN=old\n")
    async with running_service(environment, tmp_path) as service:
        with database.holding(1) as blocker:
            under_way = [asyncio.create_task(update(service, "old")) for _ in range(10)]
            while "atomic_balance_waiting_changes 10.0" not in await metrics(service, "old"):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            lines = len(service.log)
            env_file.write_text("API_TOKEN=new\n")
            service.process.send_signal(signal.SIGHUP)
            await said(service, "SIGHUP: the tokens are", lines)
            blocker.rollback()
        assert set(await asyncio.gather(*under_way)) == {200}
    assert database.balance(1) == BALANCE - 10


async def test_an_answer_ends_its_connection_once_the_service_is_about_to_stop(
    environment: dict[str, str], database: Database, tmp_path: Path
) -> None:
    """Or the next request would come on a connection that is closed just then."""
    environment["DRAIN_SECONDS"] = "3"
    async with running_service(environment, tmp_path) as service, aiohttp.ClientSession() as client:
        body = {"userId": 1, "amount": -1}
        async with client.post(service.url + UPDATE, json=body) as answer:
            assert "Connection" not in answer.headers
        with database.holding(1) as blocker:
            under_way = asyncio.create_task(client.post(service.url + UPDATE, json=body))
            await until(lambda: bool(database.blocked()))
            service.process.send_signal(signal.SIGTERM)
            stopping = "stopping: what was accepted is still answered"
            await until(lambda: sum(stopping in line for line in service.log) == int(environment["WORKERS"]))
            blocker.rollback()
        answer = await under_way
        assert (answer.status, answer.headers.get("Connection")) == (200, "close")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("API_TOKEN=two words\n", "API_TOKEN: expected a token of visible ASCII characters"),
        ("API_TOKEN=new\nLANES=many\n", "LANES: expected a number of connections"),
        ("", "API_TOKEN: expected one, because there was one until now"),
    ],
)
async def test_a_wrong_file_is_said_and_the_tokens_stay(
    text: str, why: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("API_TOKEN=old\n")
    async with running_service(environment, tmp_path) as service:
        assert await update(service, "old") == 200
        (tmp_path / ".env").write_text(text)
        service.process.send_signal(signal.SIGHUP)
        await said(service, f"SIGHUP: the tokens stay as they are: {why}")
        assert [await update(service, token) for token in ("old", "new", "")] == [200, 401, 401]


async def test_a_service_that_had_no_token_can_get_one(environment: dict[str, str], tmp_path: Path) -> None:
    async with running_service(environment, tmp_path) as service:
        assert await update(service, "") == 200
        (tmp_path / ".env").write_text("API_TOKEN=new\n")
        await hung_up(service)
        assert [await update(service, token) for token in ("new", "")] == [200, 401]


async def test_signals_that_mean_nothing_are_ignored_and_logged(environment: dict[str, str], tmp_path: Path) -> None:
    names = ["SIGUSR1", "SIGUSR2"] + (["SIGTTIN", "SIGTTOU"] if environment["WORKERS"] == "1" else [])
    async with running_service(environment, tmp_path) as service:
        for name in names:
            service.process.send_signal(getattr(signal, name))
            await said(service, f"{name} is ignored")
            assert await update(service, "") == 200
        service.process.send_signal(signal.SIGTERM)
        assert await service.process.wait() == 0


async def test_a_service_stops_when_its_terminal_is_closed(environment: dict[str, str], tmp_path: Path) -> None:
    ours, its = os.openpty()
    terminal = os.ttyname(its)
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f"exec {sys.executable} -m atomic_balance < {terminal} 2> {terminal}"),
        cwd=tmp_path,
        env={**bare_environment(), **environment, "PORT": "0"},
        start_new_session=True,  # so that the terminal becomes its own when it is opened
    )
    try:
        seen = b""
        async with asyncio.timeout(60):
            while b" serves on http" not in seen:
                seen += await asyncio.to_thread(os.read, ours, 1000)
        os.close(its)
        os.close(ours)
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
