"""The scripts, in a clean copy of the repository, as a newcomer runs them."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
from asyncio.subprocess import Process
from pathlib import Path

import aiohttp
import pytest

from tests.processes import ROOT, bare_environment, run

pytestmark = pytest.mark.slow

_START_SECONDS = 240
_INSTALLING = {"PIP_NO_COMPILE": "1"}  # which saves the time for modules that are never imported


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would commit, without anything that was built or installed."""
    directory = tmp_path_factory.mktemp("checkout") / "atomic balance"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def port(unused_tcp_port_factory: object) -> int:
    assert callable(unused_tcp_port_factory)
    return int(unused_tcp_port_factory())


async def started(checkout: Path, port: int) -> tuple[Process, str]:
    process = await asyncio.create_subprocess_exec(
        *("./scripts/start.sh", "--local"),
        cwd=checkout,
        env={**bare_environment(), **_INSTALLING, "PORT": str(port)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout
    printed = ""
    async with asyncio.timeout(_START_SECONDS):
        while "Ctrl-C stops it" not in printed:
            line = await process.stdout.readline()
            assert line, f"start.sh ended: {printed}"
            printed += line.decode()
    return process, printed


async def test_start_serves_and_ctrl_c_stops_all_of_it(checkout: Path, port: int) -> None:
    for expected in (10_100, 10_200):
        process, printed = await started(checkout, port)
        url = f"http://127.0.0.1:{port}"
        assert f"curl -X POST {url}/api/balance/update" in printed
        async with (
            aiohttp.ClientSession() as client,
            client.post(f"{url}/api/balance/update", json={"userId": 1, "amount": 100}) as answer,
        ):
            assert await answer.text() == f'{{"userId":1,"newBalance":{expected}}}'
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        async with asyncio.timeout(30):
            await process.communicate()
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert (checkout / ".env").read_text() == (ROOT / ".env.example").read_text()


async def test_a_second_start_on_a_busy_port_says_so_and_leaves_the_first_alone(checkout: Path, port: int) -> None:
    process, _ = await started(checkout, port)
    url = f"http://127.0.0.1:{port}"
    status, output = await run(
        *("./scripts/start.sh", "--local"), directory=checkout, environment={**_INSTALLING, "PORT": str(port)}
    )
    expected = f"error: something answers at {url} already: stop it, or set PORT to another port\n"
    assert (status, output) == (1, expected)
    async with aiohttp.ClientSession() as client, client.get(f"{url}/readyz") as answer:
        assert answer.status == 200
    os.killpg(process.pid, signal.SIGINT)
    await process.communicate()


async def test_a_start_that_fails_says_why_and_no_more(checkout: Path, port: int) -> None:
    """The service ends before it is ready."""
    status, output = await run(
        *("./scripts/start.sh", "--local"),
        directory=checkout,
        environment={**_INSTALLING, "PORT": str(port), "WORKERS": "none"},
    )
    assert status == 2, output  # the service's own
    assert output.splitlines()[-2:] == [
        "atomic-balance: WORKERS: expected a number of processes, 1 to 100",
        "error: the service ended before it was ready, see above",
    ]
    assert "No such process" not in output


async def test_the_race_script_twice_in_a_row(checkout: Path, port: int) -> None:
    process, _ = await started(checkout, port)
    environment = {"PORT": str(port)}
    for _ in range(2):
        status, output = await run("./scripts/test-concurrency.sh", directory=checkout, environment=environment)
        assert status == 0, output
        assert re.search(r"200, with the new balance +5000 +5000  ok", output)
        assert re.search(r"balance at the end +0 +0  ok", output)
    smaller = {"REQUESTS": "100", "AMOUNT": "30", "BALANCE": "1000", "PARALLEL": "7"}
    status, output = await run("./scripts/test-concurrency.sh", directory=checkout, environment=environment | smaller)
    assert (status, "33         33  ok" in output) == (0, True), output
    os.killpg(process.pid, signal.SIGINT)
    await process.communicate()


async def test_the_race_script_fails_where_nothing_answers(checkout: Path) -> None:
    environment = {"BASE_URL": "http://127.0.0.1:1"}
    status, output = await run("./scripts/test-concurrency.sh", directory=checkout, environment=environment)
    assert (status, output) == (1, "error: nothing answers at http://127.0.0.1:1: run scripts/start.sh\n")


async def test_the_race_script_knows_its_port_and_token_from_where_the_service_does(checkout: Path) -> None:
    (checkout / ".env").write_text("#PORT=4\nPORT=3 # not 2\n")
    for environment, port in (({}, 3), ({"PORT": "1"}, 1)):
        status, output = await run("./scripts/test-concurrency.sh", directory=checkout, environment=environment)
        assert (status, output) == (1, f"error: nothing answers at http://127.0.0.1:{port}: run scripts/start.sh\n")
    (checkout / ".env").unlink()


@pytest.mark.parametrize("script", ["start.sh", "test-concurrency.sh"])
async def test_a_script_says_how_it_is_used(checkout: Path, script: str) -> None:
    status, usage = await run(f"./scripts/{script}", "--help", directory=checkout)
    assert (status, f"Usage: scripts/{script}" in usage, "set -euo" in usage) == (0, True, False)
    assert await run(f"./scripts/{script}", "--no-such-option", directory=checkout) == (2, usage)


async def test_the_tests_run_from_a_clean_checkout(checkout: Path) -> None:
    arguments = ("quick", "-v", "tests/test_settings.py", "tests/whole/test_soak.py")
    status, output = await run("./scripts/test.sh", *arguments, directory=checkout, environment=_INSTALLING)
    assert status == 0, output
    assert re.search(r" passed in ", output), output
    assert ("test_settings.py::" in output, "test_soak.py::" in output) == (True, False), output
