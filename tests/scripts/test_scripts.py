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


async def test_the_race_script_twice_in_a_row(checkout: Path, port: int) -> None:
    process, _ = await started(checkout, port)
    status, output = await run("./scripts/start.sh", "--local", directory=checkout, environment={"PORT": str(port)})
    busy = f"something else answers at http://127.0.0.1:{port}: stop it, or choose another port with PORT"
    assert (status, output) == (1, f"error: {busy}\n")
    for environment in ({"BASE_URL": f"http://127.0.0.1:{port}"}, {"PORT": str(port)}):
        status, output = await run("./scripts/test-concurrency.sh", directory=checkout, environment=environment)
        assert status == 0, output
        assert re.search(r"200, with the new balance +5000 +5000  ok", output)
        assert re.search(r"balance at the end +0 +0  ok", output)
    smaller = {"REQUESTS": "100", "AMOUNT": "30", "BALANCE": "1000", "PARALLEL": "7"}
    status, output = await run("./scripts/test-concurrency.sh", directory=checkout, environment=environment | smaller)
    assert (status, "33         33  ok" in output) == (0, True), output
    os.killpg(process.pid, signal.SIGINT)
    await process.communicate()


async def test_the_race_script_says_how_it_is_used(checkout: Path) -> None:
    status, output = await run("./scripts/test-concurrency.sh", "--help", directory=checkout)
    assert (status, output.startswith("The reference race: "), "BASE_URL" in output) == (0, True, True)
    status, output = await run("./scripts/test-concurrency.sh", "--fast", directory=checkout)
    assert (status, "Usage: scripts/test-concurrency.sh" in output) == (2, True)


async def test_the_race_script_fails_where_nothing_answers(checkout: Path) -> None:
    environment = {"BASE_URL": "http://127.0.0.1:1"}
    status, output = await run("./scripts/test-concurrency.sh", directory=checkout, environment=environment)
    assert (status, output) == (1, "error: nothing answers at http://127.0.0.1:1: run scripts/start.sh\n")


async def test_the_tests_run_from_a_clean_checkout(checkout: Path) -> None:
    arguments = ("quick", "-v", "tests/test_settings.py", "tests/whole/test_soak.py")
    status, output = await run("./scripts/test.sh", *arguments, directory=checkout, environment=_INSTALLING)
    assert status == 0, output
    assert re.search(r" passed in ", output), output
    assert ("test_settings.py::" in output, "test_soak.py::" in output) == (True, False), output
