"""FAVOR+'s error against the number of features: orthogonal or iid, positive or trigonometric.

Choromanski et al. 2021 (arXiv 2009.14794), figure 4, lemma 2 and theorem 2.

    python -m efficient_attn.tools.ablate --config=configs/ablations/favor_error.py --scale=small

Five CPU minutes at small; "paper" has the figure's L = 4096, its 15 samples, and more draws of the
kernel. Expect the claims to hold but those on orthogonal rows with N(0, 1); the lines through the
kernel's errors are formulas, no fit.

Trap: the paper says only that its matrices are "appropriately normalized", and that decides who
wins. With entries of N(0, 1) trigonometric features fail, their normaliser being of either sign,
and orthogonal rows hardly help; with half of that (the second panel) positive features are no
longer better for many features, as lemma 2 has it: the trigonometric error vanishes where x = y,
the positive one where x = -y.
"""

import numpy as np

from efficient_attn.tools.ablate import Claim, Column, Measuring, Panel, Results, Scale, Sweep
from efficient_attn.tools.ablate.claims import Predicate, under
from efficient_attn.tools.measures.favor_error import measure

MAPS = ("positive", "hyperbolic", "trigonometric")
SIZES = {
    "smoke": {"length": 64, "samples": 2, "rows": 200},
    "small": {"length": 1024, "samples": 60, "rows": 400_000},
    "paper": {"length": 4096, "samples": 15, "rows": 10_000_000},
}


def get_sweep(scale: Scale) -> Sweep:
    """Two projections, three feature maps, 8 to 128 features."""
    maps, features = MAPS, (8, 16, 32, 64, 128)
    if scale == "smoke":
        maps, features = MAPS[:1], (4,)
    rows = []
    for feature_map in maps:
        for projection in ("iid", "orthogonal"):
            for m in features:
                options = {"features": m, "feature_map": feature_map, "projection": projection}
                written = ", ".join(f"{key}={value!r}" for key, value in options.items())
                rows.append((f"performer({written})", options))
    base = {"dim": 16, "scale": 1.0, "norm": 1.0, "cosine": -0.5} | SIZES[scale]
    lines = {"x": "features", "by": ("feature_map", "projection"), "log": "xy"}
    return Sweep(
        title="FAVOR+: error against the number of features",
        source="Performer, arXiv 2009.14794, figure 4, lemma 2, theorem 2",
        rows=rows,
        runner=Measuring(measure, base),
        columns=[
            Column("output_error", "output, N(0, 1)", digits=3),
            Column("output_deviation", "its deviation", digits=2),
            Column("halved_error", "output, N(0, 1/4)", digits=3),
            Column("halved_deviation", "its deviation", digits=2),
            Column("kernel_error", "error of the kernel", digits=3),
            Column("closed_form", "closed form", digits=3),
            Column("z", "off by deviations", digits=2),
        ],
        claims=claims(features),
        panels=[
            Panel(
                y="output_error", xlabel="features m", ylabel="mean squared error",
                title="output of attention, queries and keys N(0, 1)", **lines,
            ),
            Panel(
                y="halved_error", xlabel="features m", ylabel="mean squared error",
                title="output of attention, N(0, 1/4)", **lines,
            ),
            Panel(
                y="kernel_error", line="closed_form", xlabel="features m",
                ylabel="mean squared error", title="exp(<x, y>): points drawn, lines derived",
                **lines,
            ),
        ],
        note=NOTE,
    )  # fmt: skip


NOTE = (
    "The figure's numbers are not printed in the paper: its orderings are the claims. Hyperbolic "
    "and trigonometric features use each of the m rows twice. The kernel is that of one pair, "
    "|x| = |y| = 1 at 120 degrees; its closed form is lemma 2 for iid rows, and for orthogonal "
    "ones the exact value that theorem 2 bounds (`measures.favor_theory`). The deviation of a mean "
    "over draws is beside it; z is the distance from the closed form in such deviations."
)


def claims(features: tuple[int, ...]) -> list[Claim]:
    """Orderings of figure 4 and lemma 2, and the statistics of the closed forms."""
    return [
        *(
            Claim(
                f"orthogonal below iid, output of {size}, {kind} features, at every m (figure 4)",
                lower(metric, (kind, "orthogonal"), (kind, "iid")),
            )
            for size, metric in (("N(0, 1/4)", "halved_error"), ("N(0, 1)", "output_error"))
            for kind in ("positive", "trigonometric")
        ),
        *(
            Claim(
                f"orthogonal below iid, kernel, {kind} features, at every m",
                lower("kernel_error", (kind, "orthogonal"), (kind, "iid")),
            )
            for kind in MAPS
        ),
        *(
            Claim(
                f"positive below trigonometric, output of N(0, 1), {rows} rows, at every m "
                "(figure 4)",
                lower("output_error", ("positive", rows), ("trigonometric", rows)),
            )
            for rows in ("iid", "orthogonal")
        ),
        Claim(
            "hyperbolic below positive, kernel, at every m (lemma 2)",
            lower("kernel_error", ("hyperbolic", "iid"), ("positive", "iid")),
        ),
        Claim(
            "drawn errors within 4 deviations of the closed form in every row (lemma 2)",
            lambda r: max(abs(z) for z in r.each("z").values()) < 4,
        ),
        Claim(
            "slope of log error on log m is -1 within 3 deviations, kernel, iid rows, each map",
            lambda r: all(abs(slope(r, kind)[0] + 1) < 3 * slope(r, kind)[1] for kind in MAPS),
        ),
        Claim(
            "positive orthogonal features keep theorem 2's bound, m <= D, within 3 deviations",
            lambda r: all(bounded(r, m) for m in features if m <= 16),
        ),
    ]  # fmt: skip


def lower(metric: str, low: tuple[str, str], high: tuple[str, str]) -> Predicate:
    """Whether (feature_map, projection) `low` has the smaller metric at every m."""
    curves = ({"feature_map": kind, "projection": rows} for kind, rows in (low, high))
    return under("features", metric, *curves)


def slope(results: Results, feature_map: str) -> tuple[float, float]:
    """Of the logarithms of the kernel's error and of m, iid rows; and its standard error."""
    where = {"feature_map": feature_map, "projection": "iid"}
    m, error = results.curve("features", "kernel_error", where)
    deviation = results.curve("features", "kernel_deviation", where)[1] / error
    x, weight = np.log(m), deviation**-2
    x = x - np.average(x, weights=weight)
    spread = np.sum(weight * x**2)
    return float(np.sum(weight * x * np.log(error)) / spread), float(spread**-0.5)


def bounded(results: Results, features: int) -> bool:
    """Whether the error drawn with so many features is below theorem 2's bound."""
    where = {"feature_map": "positive", "projection": "orthogonal", "features": features}
    (label,) = results.labels(where)
    error, deviation, bound = (
        results.mean(label, name) for name in ("kernel_error", "kernel_deviation", "theorem_2")
    )
    return error <= bound + 3 * deviation
