"""The soak test from the command line: exits 0 if nothing was wrong."""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path

from atomic_balance.progress import progress_bar
from tests.soak.run import soak

_LINES_MAX = 20


async def _run(seconds: float, seed: int) -> tuple[str, list[str]]:
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # or what was started would be left
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        bar = progress_bar("soak", "s")
        return await soak(seconds, seed, Path(directory), lambda share: bar(int(share * seconds), int(seconds)))


def main() -> None:
    """Run it with the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Load and faults of every kind, then an audit.")
    parser.add_argument("--seconds", type=float, default=600, help="how long the load lasts (default: 600)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="of all that is random")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.seconds:g} s", flush=True)
    try:
        summary, wrong = asyncio.run(_run(arguments.seconds, arguments.seed))
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.exit("stopped before its end: nothing was judged")
    print(summary)
    for line in wrong[:_LINES_MAX]:
        print(line)
    print(f"{len(wrong)} wrong" if wrong else "every answer agrees with the journal, and every balance with both")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
