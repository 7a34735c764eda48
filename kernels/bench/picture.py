"""The picture of `kernels.bench`: time against the bound, op by op."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.bench.rivals import package
from kernels.shapes import PASSES

MARKS = {"pallas": "o", "xla": "s", "cudnn": "^", "tokamax": "v", "jla": "D", "fla": "P"}


def draw(kept: Mapping[str, Any], picture: Path) -> None:
    """Milliseconds of each case by each implementation, an op a row: forward and training.

    Raises:
        NotImplementedError: there is no matplotlib, or nothing to draw.
    """
    rows = [row for row in kept["rows"] if "ms" in row]
    if not rows:
        raise NotImplementedError("nothing was timed")
    canvas = package("matplotlib.backends.backend_agg").FigureCanvasAgg
    ops = list(dict.fromkeys(row["case"].split()[0] for row in rows))
    cases = {op: list(dict.fromkeys(r["case"] for r in rows if r["case"].split()[0] == op))
             for op in ops}  # fmt: skip
    heights = [1 + 0.34 * len(cases[op]) for op in ops]
    size = (13, 1.2 + sum(heights))
    figure = package("matplotlib.figure").Figure(figsize=size, layout="constrained")
    canvas(figure)
    panels = figure.subplots(len(ops), 2, squeeze=False, height_ratios=heights)
    for op, pair in zip(ops, panels, strict=True):
        for run, axes in zip(PASSES, pair, strict=True):
            _panel(axes, [r for r in rows if r["case"] in cases[op] and r["pass"] == run],
                   cases[op])  # fmt: skip
            axes.set_title(f"{op}, {run}", loc="left", fontsize=10)
        pair[1].set_yticklabels([])
    handles = {}
    for axes in panels.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=8, fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("milliseconds a call: further left is faster")
    figure.suptitle(
        f"{kept['device']}, jax {kept['versions']['jax']}, commit {kept['commit']}; "
        f"time: {kept['timer']}", fontsize=9,
    )  # fmt: skip
    figure.savefig(picture, dpi=110)


def _panel(axes, rows, cases: list[str]) -> None:
    at = {case: i for i, case in enumerate(cases)}
    for i, (by, mark) in enumerate(MARKS.items()):
        if not (mine := [row for row in rows if row["by"] == by]):
            continue
        axes.plot([r["ms"] for r in mine], [at[r["case"]] for r in mine], mark, color=f"C{i}",
                  label=by, markersize=6)  # fmt: skip
    bounds = {row["case"]: row["bound_ms"] for row in rows}
    axes.plot(list(bounds.values()), [at[case] for case in bounds], "|", color="black",
              label="bound: what memory and arithmetic allow", markersize=14)  # fmt: skip
    shown = [*bounds.values(), *(row["ms"] for row in rows)]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    axes.set_xscale("log")
    axes.set_xlim(10.0**low, 10.0**high)
    axes.set_xticks([10.0**n for n in range(low, high + 1)], [f"{10.0**n:g}" for n in
                                                              range(low, high + 1)])  # fmt: skip
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    axes.set_yticks(range(len(cases)), [" ".join(case.split()[1:]) for case in cases], fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.grid(alpha=0.3)
