"""A run: what is measured for how long, and in which order."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from benchmarking.entrants import Stage, entered
from benchmarking.loads import LOADS, Load
from benchmarking.progress import Progress
from benchmarking.results import Measurement

_WARM_UP_CONNECTIONS = 16
_WARM_UP_SECONDS = 1


class Plan(NamedTuple):
    """The names of loads and contenders; rounds of so many seconds."""

    loads: Sequence[str]
    contenders: Sequence[str]
    rounds: int
    seconds: int

    def steps(self) -> int:
        """How many measurements it takes, warm-ups included."""
        return sum(
            len(self._all_who_meet(load))
            + self.rounds * sum(len(self._who_meet(load, connections)) for connections in load.contenders)
            for load in self._chosen_loads()
        )

    def measurements(self, stage: Stage, progress: Progress) -> Iterator[Measurement]:
        """Measure load after load. Raises BenchmarkError.

        In each round every contender has its turn with every number of connections, and another one begins.
        """
        for load in self._chosen_loads():
            with ExitStack() as running:
                entrants = {
                    name: running.enter_context(entered(name, load, stage)) for name in self._all_who_meet(load)
                }
                for name, entrant in entrants.items():
                    progress.step(f"{load.title}: warm-up of {name}")
                    entrant.generate(_WARM_UP_CONNECTIONS, _WARM_UP_SECONDS)
                for round_number in range(1, self.rounds + 1):
                    for connections in load.contenders:
                        for name in _rotated(self._who_meet(load, connections), round_number):
                            step = f"{load.title}, {connections:,} connections, round {round_number}: {name}"
                            progress.step(step)
                            yield entrants[name].measure(connections, self.seconds, round_number)

    def _chosen_loads(self) -> list[Load]:
        return [LOADS[name] for name in self.loads]

    def _who_meet(self, load: Load, connections: int) -> list[str]:
        return [name for name in load.contenders[connections] if name in self.contenders]

    def _all_who_meet(self, load: Load) -> list[str]:
        return [name for name in self.contenders if any(name in names for names in load.contenders.values())]


def _rotated(names: Sequence[str], places: int) -> Sequence[str]:
    places %= len(names) or 1
    return [*names[places:], *names[:places]]
