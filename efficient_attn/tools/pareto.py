"""Published accuracy against what a network costs, and which networks none other beats."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from efficient_attn.tools.published import published


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of (cost, accuracy) that no cheaper or equally cheap one reaches, cheap first."""
    kept, best = [], float("-inf")
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            kept.append(i)
            best = points[i][1]
    return kept


def draw(profiles: Sequence[Any], path: str | Path) -> None:
    """Top-1 against multiply-adds and parameters of `profile.Profile`s, with the Pareto fronts."""
    told = published()
    shown = [p for p in profiles if (p.name, p.image_size) in told]
    shown = [p for p in shown if told[p.name, p.image_size].top1]
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    families = {p.name: _family(p.name) for p in shown}
    for axis, what, scale in zip(
        figure.subplots(1, 2, sharey=True),
        ("multiply_adds", "parameters"),
        (("multiply-adds of one image, G", 1e9), ("parameters, M", 1e6)),
        strict=True,
    ):
        label, unit = scale
        points = [
            (getattr(p.total, what) / unit, float(told[p.name, p.image_size].top1)) for p in shown
        ]
        for i, family in enumerate(sorted(set(families.values()))):
            own = [x for x, p in zip(points, shown, strict=True) if families[p.name] == family]
            marker = "osD^vPX*"[i // 10 % 8]
            axis.plot(*zip(*sorted(own), strict=True), marker=marker, ms=4, lw=0.6, label=family)
        kept = [points[i] for i in front(points)]
        axis.step(
            *zip(*kept, strict=True), where="post", color="black", lw=1.2, ls="--", alpha=0.6,
            label="Pareto front",
        )  # fmt: skip
        axis.set(xscale="log", xlabel=label)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("published top-1 on ImageNet, %")
    lines, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=8, loc="outside right center")
    figure.savefig(path)


def _family(name: str) -> str:
    """The first word of a name: "mobilevit" of "mobilevit_xs"; two where one says too little."""
    word, _, rest = name.partition("_")
    if not rest:
        return word.rstrip("0123456789")
    two = word in ("t2t", "pvt", "mobile", "dynamicvit")
    return "_".join(name.split("_")[:2]) if two else word
