"""The soak test from the command line: exits 0 if nothing was wrong."""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.run import soak

_LINES_MAX = 20


async def _run(seconds: float, seed: int) -> tuple[str, list[str]]:
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # or what was started would be left
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        return await soak(seconds, seed, Path(directory), _draw)


def _draw(share: float) -> None:
    if sys.stderr.isatty():
        bar = "#" * int(40 * share)
        print(f"\rsoak [{bar:40}] {share:4.0%}", end="\n" if share == 1 else "", file=sys.stderr, flush=True)


def main() -> None:
    """Run it with the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Load and faults of every kind, then an audit.")
    parser.add_argument("--seconds", type=float, default=600, help="how long the load lasts (default: 600)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="of all that is random")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.seconds:g} s", flush=True)
    summary, wrong = asyncio.run(_run(arguments.seconds, arguments.seed))
    print(summary)
    for line in wrong[:_LINES_MAX]:
        print(line)
    print(f"{len(wrong)} wrong" if wrong else "every answer agrees with the journal, and every balance with both")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
