"""What is counted and measured: plain numbers, in memory that the workers share."""

import mmap
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TypeAlias

from atomic_balance.changes import Applied, Change, NoSuchPayee, Outcome, Refusal, Undecided
from atomic_balance.postgres.failures import Failure

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
HOLD_EVENTS = ("placed", "captured", "released", "expired")
CHANGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
OUTCOMES = ("applied", *Refusal, *Undecided)
FAILURES = tuple(Failure)
KINDS_OF_REQUESTS_MAX = 256
"""The memory is made before it is known which kinds of requests there are: a cell for each of so many."""
GAUGES = {
    "waiting_changes": "Changes that wait for their answer",
    "open_holds": "Holds that are not settled, as the process sees them whose turn it is to settle those that expire",
    "held": "What open holds have set aside together, as that process sees it",
    "overdue_holds": "Open holds that expired over a second ago, as each process counts them",
    "feed_lag_seconds": "For how long a running transaction has held back the next change of the feed",
    "pool_connections": "Connections of the pool for reads",
    "pool_idle_connections": "Those of them that are not in use",
}

_PARTS = {
    "pid": 1,
    "outcomes": len(OUTCOMES),
    "replays": 1,
    "hold_events": len(HOLD_EVENTS),
    "dropped_log_lines": 1,
    "failures": len(FAILURES),
    "requests": KINDS_OF_REQUESTS_MAX,
    "gauges": len(GAUGES),
    "change_seconds": len(SECONDS) + 2,
    "statement_changes": len(CHANGES) + 2,
    "statement_seconds": len(SECONDS) + 2,
}
_GREATEST = ("feed_lag_seconds",)  # of the whole database, and seen by each process: no sum
_GONE = -1
_CELLS = sum(_PARTS.values())
_ENDS = dict(zip(_PARTS, accumulate(_PARTS.values()), strict=True))
_SLICES = {part: slice(end - _PARTS[part], end) for part, end in _ENDS.items()}
_OUTCOME_CELL = {outcome: cell for cell, outcome in enumerate(OUTCOMES)}
_FAILURE_CELL = {state: cell for cell, state in enumerate(FAILURES)}

Cells: TypeAlias = "memoryview[float]"


class Distribution:
    """How often values fell where: `counts[i]` of them at most `bounds[i]`, the last ones above all bounds."""

    def __init__(self, bounds: Sequence[float], cells: Cells) -> None:
        self.bounds = bounds
        self._cells = cells  # the counts, then the values' sum

    @property
    def counts(self) -> list[float]:
        """The counts; one more than there are bounds."""
        return list(self._cells[:-1])

    @property
    def sum(self) -> float:
        """The sum of the values."""
        return self._cells[-1]

    def observe(self, value: float) -> None:
        """Count a value."""
        self._cells[bisect_left(self.bounds, value)] += 1
        self._cells[-1] += value


class Numbers:
    """The numbers of one process, or the sum of several. Counting is an addition: a request hardly notices."""

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self._outcomes = cells[_SLICES["outcomes"]]
        self._replays = cells[_SLICES["replays"]]
        self._hold_events = cells[_SLICES["hold_events"]]
        self._dropped_log_lines = cells[_SLICES["dropped_log_lines"]]
        self._failures = cells[_SLICES["failures"]]
        self.requests = cells[_SLICES["requests"]]
        self._gauges = cells[_SLICES["gauges"]]
        self.change_seconds = Distribution(SECONDS, cells[_SLICES["change_seconds"]])
        self.statement_changes = Distribution(CHANGES, cells[_SLICES["statement_changes"]])
        self.statement_seconds = Distribution(SECONDS, cells[_SLICES["statement_seconds"]])

    def count(self, outcome: Outcome) -> None:
        """Count an outcome that somebody was told."""
        if isinstance(outcome, Undecided):
            self._outcomes[_OUTCOME_CELL[outcome]] += 1
            return
        if isinstance(outcome, NoSuchPayee):
            self._outcomes[_OUTCOME_CELL[Undecided.NO_SUCH_USER]] += 1
            return
        self._outcomes[0 if isinstance(outcome, Applied) else _OUTCOME_CELL[outcome.reason]] += 1
        self._replays[0] += outcome.replayed

    def count_dropped_log_lines(self, count: int) -> None:
        """Count `count` log lines that could not be written."""
        self._dropped_log_lines[0] += count

    def count_hold(self, change: Change) -> None:
        """Count a hold that was placed, or its settlement by kind."""
        if change.hold_amount > 0:
            kind = 0
        elif change.amount:
            kind = 1
        else:
            kind = 3 if change.is_expiry else 2
        self._hold_events[kind] += 1

    def count_failure(self, state: Failure) -> None:
        """Count a statement that failed."""
        self._failures[_FAILURE_CELL[state]] += 1

    def count_request(self, cell: int) -> None:
        """Count a request that was answered, in the `cell` of its kind."""
        self.requests[cell] += 1

    @property
    def outcomes(self) -> Mapping[str, float]:
        """How many were told each outcome."""
        return dict(zip(OUTCOMES, self._outcomes, strict=True))

    @property
    def replays(self) -> float:
        """How many of the outcomes were given again."""
        return self._replays[0]

    @property
    def hold_events(self) -> Mapping[str, float]:
        """How many holds were placed, and settled by each of the ways that there are."""
        return dict(zip(HOLD_EVENTS, self._hold_events, strict=True))

    @property
    def dropped_log_lines(self) -> float:
        """How many log lines could not be written."""
        return self._dropped_log_lines[0]

    @property
    def failures(self) -> Mapping[str, float]:
        """How many statements failed, and how."""
        return {state.name.lower(): count for state, count in zip(FAILURES, self._failures, strict=True)}

    @property
    def gauges(self) -> Mapping[str, float]:
        """The values that GAUGES names."""
        return dict(zip(GAUGES, self._gauges, strict=True))

    @property
    def pid(self) -> int:
        """The process whose numbers they are; 0: it has gone, or there was none yet."""
        return max(0, int(self.cells[0]))

    @property
    def used(self) -> bool:
        """Whether there is or was a process that counted here."""
        return self.cells[0] != 0

    def begin(self, values: Mapping[str, float]) -> None:
        """Say that this process is at work, and what its gauges show."""
        self.cells[0] = os.getpid()
        for cell, name in enumerate(GAUGES):
            self._gauges[cell] = values[name]

    def end(self) -> None:
        """Say that the process has gone. What it counted stays, so that no total ever falls."""
        self.cells[0] = _GONE
        for cell in range(len(GAUGES)):
            self._gauges[cell] = 0

    def __sub__(self, earlier: "Numbers") -> "Numbers":
        """What has come since `earlier`."""
        return _of(now - before for now, before in zip(self.cells, earlier.cells, strict=True))

    @staticmethod
    def total(everyone: Iterable["Numbers"]) -> "Numbers":
        """The sum of several, one of which at least is used."""
        used = [numbers for numbers in everyone if numbers.used]
        total = _of(map(sum, zip(*(numbers.cells for numbers in used), strict=True)))
        for name in _GREATEST:
            cell = list(GAUGES).index(name)
            total._gauges[cell] = max(numbers._gauges[cell] for numbers in used)
        return total


def _of(values: Iterable[float]) -> Numbers:
    return Numbers(memoryview(array("d", values)))


def shared_numbers(count: int) -> list[Numbers]:
    """The numbers of `count` processes, in memory that a process shares with those that it forks."""
    cells = memoryview(mmap.mmap(-1, count * _CELLS * array("d").itemsize)).cast("d")
    return [Numbers(cells[start : start + _CELLS]) for start in range(0, count * _CELLS, _CELLS)]
