"""figure.svg and figure.png of a sweep, in the manner of a paper's figure."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from efficient_attn.tools.ablate.results import Missing, Results
from efficient_attn.tools.ablate.sweep import Number, Panel, Sweep

MARKERS = "osD^vPX*<>"
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "legend.fontsize": 8, "legend.frameon": False, "svg.hashsalt": "0",
}  # fmt: skip


def draw(sweep: Sweep, results: Results, path: Path) -> None:
    """The panels side by side, as figure.svg and figure.png in the directory `path`."""
    if not sweep.panels:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 5.0 * len(sweep.panels)), 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        for panel, axes in zip(
            sweep.panels, figure.subplots(1, len(sweep.panels), squeeze=False)[0], strict=True
        ):
            _panel(panel, sweep, results, axes)
        for kind in ("svg", "png"):
            figure.savefig(
                path / f"figure.{kind}", dpi=160, metadata={"Date": None} if kind == "svg" else {}
            )


def _panel(panel: Panel, sweep: Sweep, results: Results, axes: Any) -> None:
    try:
        if panel.draw:
            panel.draw(results, axes)
        elif panel.x == "label":
            _bars(panel, sweep, results, axes)
        else:
            again = any(p.by == panel.by for p in sweep.panels[sweep.panels.index(panel) + 1 :])
            _lines(panel, results, axes, legend=bool(panel.by) and not again)
    except Missing as missing:
        axes.text(0.5, 0.5, str(missing.args[0]), ha="center", transform=axes.transAxes)
    axes.set_title(panel.title)


def _have(results: Results, labels: Sequence[str], *metrics: str) -> list[str]:
    """The rows with all these numbers; a sweep may be under way.

    Raises:
        Missing: there is none.
    """
    found = [label for label in labels if all(results.values(label, m) for m in metrics)]
    if not found:
        raise Missing("no row has a result yet")
    return found


def _bars(panel: Panel, sweep: Sweep, results: Results, axes: Any) -> None:
    labels = _have(results, results.labels(panel.where), panel.y)
    places = np.arange(len(labels))[::-1]
    means = [results.mean(label, panel.y) for label in labels]
    errors = [results.deviation(label, panel.y) or 0.0 for label in labels]
    if panel.points:
        axes.errorbar(means, places, xerr=errors, fmt="C0o", capsize=2, label="ours")
    else:
        axes.barh(places, means, xerr=errors, height=0.6, color="C0", label="ours")
    told = [
        (y, sweep.published.get(x, {}).get(panel.y)) for x, y in zip(labels, places, strict=True)
    ]
    told = [(y, value) for y, value in told if value is not None]
    if told:
        axes.plot([v for _, v in told], [y for y, _ in told], "kD", mfc="white", label="paper")
        if not axes.figure.legends:  # beside the axes: any place inside may have a bar
            handles = axes.get_legend_handles_labels()
            axes.figure.legend(*handles, loc="outside upper right", ncols=2)
    axes.set_yticks(places, labels)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(panel.ylabel or panel.y)
    if panel.log:
        axes.set_xscale("log")


def _lines(panel: Panel, results: Results, axes: Any, *, legend: bool) -> None:
    """Points with deviations, by x; one line for each value of `by`.

    Panels that divide their rows alike share the last one's legend.
    """
    options = dict(results.rows)
    groups: dict[tuple, list[str]] = {}
    for label in _have(results, results.labels(panel.where), panel.y):
        groups.setdefault(tuple(options[label].get(k) for k in panel.by), []).append(label)
    for (key, labels), color in zip(groups.items(), itertools.cycle(range(10))):
        points = sorted(
            (_x(panel.x, label, options, results), results.mean(label, panel.y),
             results.deviation(label, panel.y) or 0.0, label)
            for label in labels
        )  # fmt: skip
        x, y, error, ordered = (list(c) for c in zip(*points, strict=True))
        name = ", ".join(str(value) for value in key)
        look = {"color": f"C{color}", "marker": MARKERS[color], "ms": 4, "capsize": 2}
        axes.errorbar(x, y, error, ls="" if panel.line else "-", lw=1.2, label=name or None, **look)
        if panel.line:
            theory = [results.mean(label, panel.line) for label in ordered]
            axes.plot(x, theory, color=f"C{color}", lw=1.0)
    axes.set(xlabel=panel.xlabel or panel.x, ylabel=panel.ylabel or panel.y)
    _scales(panel, axes)
    if legend:
        beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if len(groups) > 4 else {}
        axes.legend(title=", ".join(panel.by), **beside)


def _x(name: str, label: str, options: Any, results: Results) -> Number:
    return options[label][name] if name in options[label] else results.mean(label, name)


def _scales(panel: Panel, axes: Any) -> None:
    if "x" in panel.log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    if "y" in panel.log:
        axes.set_yscale("log")
