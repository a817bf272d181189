"""Imports of small files while everything else goes on: all of a file's accounts are opened, or none of them."""

import asyncio
import contextlib
import random
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.processes import bare_environment
from tests.soak.accounts import HOT_USER, Accounts, opening
from tests.soak.asking import PATIENCE_SECONDS
from tests.soak.journal import Journal

_FIRST_ID = 100_000
_IDS_PER_FILE = 100
_LINES_MAX = 60
_OPENED_SHARE = 0.1
"""How many of the imported accounts take part in everything from then on."""
_PAUSE_SECONDS = (0.2, 1.5)


class ImportAsked(NamedTuple):
    """A file to import, and what became of each try: its exit status (below 0: killed) and what it printed.

    `lines`: balance and minimum balance by user id. `fault`: a line that keeps all from being opened, if there is one.
    """

    lines: dict[int, tuple[int, int]]
    fault: str
    ends: list[tuple[int, str]]


class Imports:
    """Imports files, one after the other. `asked`: all of them; `told`: how often a try ended in what way."""

    def __init__(self, accounts: Accounts, database_url: str, directory: Path, chance: random.Random) -> None:
        self.asked: list[ImportAsked] = []
        self.told: Counter[str] = Counter()
        self._accounts = accounts
        self._environment = {**bare_environment(), "DATABASE_URL": database_url}
        self._directory = directory
        self._chance = chance

    async def work(self, until: float) -> None:
        """Import one file after the other until the time is over, and some again."""
        while time.monotonic() < until:
            if self.asked and self._chance.random() < 0.3:
                asked = self._chance.choice(self.asked)
            else:
                asked = self._next()
                self.asked.append(asked)
            await self._run(asked)
            await asyncio.sleep(self._chance.uniform(*_PAUSE_SECONDS))

    def _next(self) -> ImportAsked:
        first = _FIRST_ID + _IDS_PER_FILE * len(self.asked)
        count = self._chance.randrange(1, _LINES_MAX)
        lines = {first + number: (self._chance.randrange(1_000), -number) for number in range(count)}
        balance, minimum = opening(HOT_USER)
        faults = ("", "", "", f"{HOT_USER},{balance + 1},{minimum}", f"{first},1.50,0")
        return ImportAsked(lines, self._chance.choice(faults), [])

    async def _run(self, asked: ImportAsked) -> None:
        file = self._directory / "accounts.csv"
        text = [f"{user_id},{balance},{minimum}" for user_id, (balance, minimum) in asked.lines.items()]
        text.insert(self._chance.randrange(len(text) + 1), asked.fault)
        file.write_text("\n".join(["userId,balance,minimumBalance", *filter(None, text), ""]))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "atomic_balance", "import", str(file)),
            cwd=self._directory,
            env=self._environment,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            start_new_session=True,
        )
        try:
            if self._chance.random() < 0.2:
                await asyncio.sleep(self._chance.uniform(0.3, 1.5))
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            async with asyncio.timeout(PATIENCE_SECONDS):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        asked.ends.append((process.returncode, output.decode()))
        self.told[_in_short(*asked.ends[-1])] += 1
        if process.returncode == 0:
            share = [user_id for user_id in asked.lines if self._chance.random() < _OPENED_SHARE]
            self._accounts.opened.update(share)


def _in_short(status: int, output: str) -> str:
    """How a try ended, to be counted."""
    if status < 0:
        return "killed"
    if "nothing was imported" in output:
        return "turned away"
    return "done" if status == 0 else "failed"


def judge_imports(asked: list[ImportAsked], journal: Journal) -> list[str]:
    """Of which file not all accounts or not none were opened, or other than it was said, a line each."""
    wrong = []
    for one in asked:
        there = {
            user_id: account[:2] for user_id in one.lines if (account := journal.accounts.get(user_id)) is not None
        }
        ends = {_in_short(*end) for end in one.ends}
        failures = [output for status, output in one.ends if _in_short(status, output) == "failed"]
        contradictions = {
            "not all and not none": len(there) not in (0, len(one.lines)),
            "other values": any(there[user_id] != one.lines[user_id] for user_id in there),
            "said to be done, and not there": "done" in ends and not there,
            "imported in spite of its fault": bool(one.fault) and (bool(there) or "done" in ends),
            "turned away without a fault": not one.fault and "turned away" in ends,
            "a failure that is not the database's": not all("atomic-balance: database: " in text for text in failures),
        }
        wrong += [f"{text}: {one}, there: {there}" for text, holds in contradictions.items() if holds][:1]
    known = {user_id for one in asked for user_id in one.lines}
    return wrong + [
        f"an account that no file has: {user_id}"
        for user_id in sorted(journal.accounts)
        if user_id >= _FIRST_ID and user_id not in known
    ]
