"""Tries the mutations: what a promise rests on is taken out of a copy, and the test that shows it must fail."""

import argparse
import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.processes import ROOT

TABLE = ROOT / "tests" / "mutations.toml"
TRY_SECONDS = 120
"""How long the test of a mutation may take; one that hangs has noticed it too."""

_LEFT_OUT = shutil.ignore_patterns(".venv", ".git", "*_cache", "__pycache__", "*.egg-info")


class Mutation(NamedTuple):
    """What is taken out, by putting `new` in the place of `old`, which is once in `file`; and the `test` that fails."""

    name: str
    file: str
    old: str
    new: str
    test: str


def mutations() -> list[Mutation]:
    """All of the table."""
    rows: list[dict[str, str]] = tomllib.loads(TABLE.read_text())["mutation"]
    return [Mutation(**row) for row in rows]


@contextlib.asynccontextmanager
async def checkout_copy() -> AsyncIterator[Path]:
    """A copy of this checkout, which is gone afterwards, and whose code is what runs in it."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, ignore=_LEFT_OUT)
        _, where = await _run(copy, TRY_SECONDS, "-c", "import atomic_balance; print(atomic_balance.__file__)")
        if not where.startswith(str(copy)):
            raise AssertionError(f"expected the copy's code to run, not {where}")
        yield copy


async def unmutated(copy: Path, chosen: Iterable[Mutation]) -> str:
    """Run the tests of `chosen` mutations on a copy as it is; gives what they print if they don't all pass."""
    status, printed = await _pytest(copy, *{mutation.test: None for mutation in chosen})
    return printed if status else ""


async def verdict(copy: Path, mutation: Mutation) -> str:
    """Try a mutation on a copy, which is then as it was; gives "killed" or "hangs", or else what is wrong with it."""
    file = copy / mutation.file
    text = file.read_text()
    if text.count(mutation.old) != 1:
        return f"DOES NOT APPLY: its text is {text.count(mutation.old)} times in {mutation.file}"
    file.write_text(text.replace(mutation.old, mutation.new))
    try:
        status, printed = await _pytest(copy, mutation.test)
    except TimeoutError:
        return "hangs"
    finally:
        file.write_text(text)
    if status == 0:
        return "SURVIVED"
    # An error before or after a test shows that something does not run, and not that the test fails for it.
    return "killed" if status == 1 and re.search(r"^FAILED ", printed, re.MULTILINE) else f"DOES NOT RUN:\n{printed}"


async def _pytest(copy: Path, *tests: str) -> tuple[int, str]:
    options = ("-x", "-q", "-rfE", "-p", "no:cacheprovider", "-p", "no:xdist")
    return await _run(copy, len(tests) * TRY_SECONDS, "-m", "pytest", *options, *tests)


async def _run(copy: Path, seconds: float, *arguments: str) -> tuple[int, str]:
    """Run Python in the copy, for so long at most; its exit status, and what it printed. Raises TimeoutError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")


async def _try(chosen: Sequence[Mutation]) -> bool:
    """Try some mutations, a line for each; gives whether every one was noticed."""
    noticed = 0
    async with checkout_copy() as copy:
        print(f"{len(chosen)} mutations; first their tests, on the code as it is", flush=True)
        if printed := await unmutated(copy, chosen):
            print(printed)
            return False
        for number, mutation in enumerate(chosen, 1):
            began = time.monotonic()
            found = await verdict(copy, mutation)
            noticed += found in ("killed", "hangs")
            took = f"{time.monotonic() - began:.0f} s"
            print(f"[{number}/{len(chosen)}] {mutation.name}: {found} ({took})", flush=True)
    print(f"{noticed} of {len(chosen)} were noticed")
    return noticed == len(chosen)


def main() -> None:
    """The command; exits with 1 if a mutation was not noticed."""
    parser = argparse.ArgumentParser(
        prog="scripts/mutations",
        description="Take out what promises rest on, one after the other, in a copy; its test must fail each time.",
    )
    parser.add_argument("--sample", type=int, metavar="COUNT", help="so many of them, at random")
    parser.add_argument("--seed", type=int, help="which sample (printed)")
    parser.add_argument("--name", default="", help="those with this in their name")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in mutations() if arguments.name in mutation.name]
    if arguments.sample:
        seed = time.time_ns() % 1_000_000 if arguments.seed is None else arguments.seed
        print(f"seed {seed}")
        chosen = random.Random(seed).sample(chosen, min(arguments.sample, len(chosen)))
    sys.exit(not asyncio.run(_try(chosen)))


if __name__ == "__main__":
    main()
