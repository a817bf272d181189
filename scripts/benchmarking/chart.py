"""The chart: what every contender achieved under the loads that all of them met."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarking.loads import CONTENDERS, EXHAUSTED, HOT, LOADS, NO_DATABASE, POSTGRES_ALONE, ROWS, SERVICE
from benchmarking.results import Results, Spread, spread

_LOADS = (HOT, EXHAUSTED, ROWS)
_CONNECTIONS = 256
_LIMIT_COLOR = "#b8bec6"
_COLORS = {SERVICE: "#1a7f5a", NO_DATABASE: _LIMIT_COLOR, POSTGRES_ALONE: _LIMIT_COLOR}
_OTHER_COLOR = "#6c8ebf"
_SPREAD_COLOR = "#57606a"


def write_chart(results: Results, folder: Path) -> None:
    """Write throughput.svg, of the loads that were measured."""
    panels = [
        (load.title, rates) for load in (LOADS[name] for name in _LOADS) if (rates := _rates(results, load.title))
    ]
    # The same figures give the same file: ids from a fixed salt, no date. Text stays text, in the reader's font.
    mpl.rc("svg", hashsalt="atomic-balance", fonttype="none")
    mpl.rc("font", family="sans-serif", size=10)
    figure = Figure(figsize=(8, 0.5 + 3 * max(len(panels), 1)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(panels) or 1, squeeze=False)[:, 0]
    most = max((rate.greatest for _, rates in panels for _, rate in rates), default=1)
    for panel, (title, rates) in zip(axes, panels, strict=False):
        panel.set_title(f"{title}, {_CONNECTIONS} connections: requests per second", loc="left", fontweight="bold")
        _draw(panel, rates, most)
    figure.savefig(
        folder / "throughput.svg", bbox_inches="tight", pad_inches=0.2, metadata={"Date": None, "Creator": None}
    )


def _rates(results: Results, title: str) -> list[tuple[str, Spread]]:
    spreads = (
        (contender, spread([measurement.rate for measurement in results.of(title, _CONNECTIONS, contender)]))
        for contender in CONTENDERS
    )
    return [(contender, rate) for contender, rate in spreads if rate]


def _draw(panel: Axes, rates: Sequence[tuple[str, Spread]], most: float) -> None:
    """Bars of the medians with their names and figures beside them; a line from the least to the greatest."""
    for place, (contender, rate) in enumerate(rates):
        panel.barh(place, rate.median, height=0.7, color=_COLORS.get(contender, _OTHER_COLOR))
        panel.plot([rate.least, rate.greatest], [place, place], color=_SPREAD_COLOR, linewidth=1.2)
        panel.text(rate.greatest + most / 100, place, f"{rate.median:,.0f}", verticalalignment="center")
    panel.set_yticks(range(len(rates)), [contender for contender, _ in rates])
    for label, (contender, _) in zip(panel.get_yticklabels(), rates, strict=True):
        label.set_fontweight("bold" if contender == SERVICE else "normal")
    panel.invert_yaxis()
    panel.set_xlim(0, most * 1.12)
    panel.set_xticks([])
    panel.tick_params(left=False)
    panel.spines[:].set_visible(False)
