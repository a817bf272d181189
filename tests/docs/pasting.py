"""What a page of the documentation shows, run as if pasted into a shell."""

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tests.fault_proxy import FaultProxy
from tests.processes import Service, run

_START = "export BALANCE_URL=http://localhost:3000\n"
_SEPARATOR = "printf '\\n---\\n'\n"


def blocks(page: str) -> list[tuple[str, str]]:
    """The code blocks of a page, each with its language."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def commands_and_answers(found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The commands of a page, but the one that sets BALANCE_URL, each with the block that says what it prints."""
    assert ("bash", _START) in found
    rest = [block for block in found if block != ("bash", _START)]
    return [(one[1], following[1]) for one, following in itertools.pairwise(rest) if one[0] == "bash"]


async def run_and_compare(pairs: Sequence[tuple[str, str]], port: int, directory: Path) -> None:
    """Run commands in their order, in one shell, against a service on `port`; each must print what the page says."""
    script = _START.replace("3000", str(port)) + "".join(command + _SEPARATOR for command, _ in pairs)
    printed = await bash(script, directory)
    assert [_of_any_time(text) for text in printed.split("---\n")] == [_of_any_time(text) for _, text in pairs] + [""]


async def bash(script: str, directory: Path, environment: Mapping[str, str] = {}) -> str:
    """What `script` prints; it must succeed. Its `python3` is the one that runs the tests."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ("bash", "-euo", "pipefail", "-c", f"exec 2> errors\n{script}")
    status, printed = await run(*command, directory=directory, environment={"PATH": path, **environment})
    assert status == 0, (printed, (directory / "errors").read_text())
    return printed


def proxy_before(service: Service) -> contextlib.AbstractAsyncContextManager[FaultProxy]:
    """A proxy through which callers reach `service`."""
    address = urlsplit(service.url)
    return FaultProxy((str(address.hostname), int(address.port or 0))).running()


def _of_any_time(text: str) -> str:
    """`text` without its times; answers on one line each, whether or not a line ended between them."""
    return re.sub(r'(?<="(?:createdAt|expiresAt)":")[^"]+', "", text).replace("}\n{", "}{").strip()
