"""How far something is that takes its time, drawn on standard error where that is a terminal."""

import sys
from collections.abc import Callable


def progress_bar(task: str, unit: str) -> Callable[[int, int | None], None]:
    """A function that draws how far `task` is, told how many `unit` are done, and of how many (None: not known)."""

    def draw(done: int, total: int | None) -> None:
        if not sys.stderr.isatty():
            return
        if total is None:
            print(f"\r{task} {done:,} {unit}", end="", file=sys.stderr, flush=True)
            return
        bar = "#" * int(40 * done / total if total else 40)
        end = "\n" if done >= total else ""
        print(f"\r{task} [{bar:40}] {done:,} of {total:,} {unit}", end=end, file=sys.stderr, flush=True)

    return draw
