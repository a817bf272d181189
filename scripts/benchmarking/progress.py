"""One line on standard error that says how far the run is, where that is a terminal."""

import sys

_WIDTH = 30


class Progress:
    """Counts the steps of a run that has `total`."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0

    def step(self, text: str) -> None:
        """Say what is measured now."""
        if sys.stderr.isatty():
            bar = "#" * (_WIDTH * self._done // self._total)
            print(f"\r\033[K[{bar:{_WIDTH}}] {text}", end="", file=sys.stderr, flush=True)
        self._done += 1

    def end(self) -> None:
        """Take the line away."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
