"""The command: measures, prints the page, and writes what is made of it."""

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarking.contenders import CONTENDERS, Contender, service
from benchmarking.figures import DOCUMENTS, chart, quoted
from benchmarking.generators import program
from benchmarking.loads import BEFORE, LOADS
from benchmarking.machine import PAGES, ROOT, ending_in_one_line, machine_of, staged
from benchmarking.report import page
from benchmarking.results import Figures, Key, Results
from benchmarking.rounds import measure
from benchmarking.scenarios import SCENARIOS

_LOADS = [*LOADS, *(name for name, _, _ in SCENARIOS)]


def main() -> None:
    """Measure and write; exits with 1 where that is not possible, or something wrong was found."""
    arguments = _arguments()
    with ending_in_one_line():
        text = page(_measure(arguments))
    print(text)
    whole = not any((arguments.quick, arguments.loads, arguments.contenders, arguments.against, arguments.output))
    if output := PAGES if whole else arguments.output:
        output.mkdir(parents=True, exist_ok=True)
        (output / "README.md").write_text(text)
        (output / "throughput.svg").write_text(chart(text))
    for document in (ROOT / name for name in DOCUMENTS if whole):
        document.write_text(quoted(document.read_text(), text))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark",
        description="Measure atomic-balance beside what else one might do, on this machine, and print the page. "
        "Without options that leave something out, also write docs/benchmarks and the figures that documents quote.",
    )
    parser.add_argument("--quick", action="store_true", help="one round of 1 s: about 3 minutes, instead of 15")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement (5)")
    parser.add_argument("--seconds", type=int, help="seconds of each round (2)")
    for option, names in (("--loads", _LOADS), ("--contenders", list(CONTENDERS))):
        listed = " ".join(f"'{name}'" if " " in name else name for name in names)
        parser.add_argument(option, nargs="+", choices=names, metavar="NAME", help=f"of {listed}")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="also the service of another checkout, by its .venv"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the page and its chart there, nothing else")
    arguments = parser.parse_args()
    if arguments.against and not _python_of(arguments.against).exists():
        parser.error(f"--against: expected a checkout with its .venv, found no {_python_of(arguments.against)}")
    return arguments


def _python_of(checkout: Path) -> Path:
    return checkout.absolute() / ".venv" / "bin" / "python"


def _measure(arguments: argparse.Namespace) -> Results:
    contenders = {name: CONTENDERS[name] for name in CONTENDERS if name in (arguments.contenders or CONTENDERS)}
    if arguments.against:
        start = partial(service, python=str(_python_of(arguments.against)))
        before = Contender("the service of another checkout", start)
        contenders = {BEFORE: before, **contenders}
    needs = {name: contender.needs for name, contender in contenders.items() if contender.needs}
    missing = {name: f"{needed} is not installed" for name, needed in needs.items() if not program(needed)}
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    seconds = arguments.seconds or (1 if arguments.quick else 2)
    measured: dict[Key, list[Figures]] = {}
    present = {name: contender for name, contender in contenders.items() if name not in missing}
    with staged() as stage:
        chosen = arguments.loads or _LOADS
        loads = {name: load for name, load in LOADS.items() if name in chosen}
        for key, figures in measure(loads, present, rounds, seconds, stage):
            measured.setdefault(key, []).append(figures)
        for key, run in SCENARIOS.items():
            if key[0] in chosen:
                with ExitStack() as ends:
                    measured[key] = [run(stage._replace(stack=ends))]
        machine = machine_of(stage)
    what = {name: contender.what for name, contender in contenders.items()}
    return Results(measured, rounds, seconds, what, missing, machine)


if __name__ == "__main__":
    main()
