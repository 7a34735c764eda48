"""Performer's time and memory against length, between the Transformer and no attention at all.

Choromanski et al. 2021 (arXiv 2009.14794), figure 3: "X (OPT)" is a layer that returns its values.

    python -m efficient_attn.tools.ablate --config=configs/ablations/performer_cost.py --scale=small

Three CPU minutes at small: one layer of the paper's regular model, four lengths up to 16,384, time
up to 4,096. "paper" has its 6 layers and 32,768 tokens. Expect slope 1 of the Performer and of the
bound, and a constant factor between them. Memory's slope over all four lengths is 1.12, the bound's
own 1.15: of a short sequence XLA holds less at once; from 1,024 on they are 1.07 and 1.09.
"""

from efficient_attn.tools.ablate import Claim, Column, Measuring, Panel, Results, Scale, Sweep
from efficient_attn.tools.growth import exponent
from efficient_attn.tools.measures.cost import measure

TRANSFORMER, PERFORMER, BOUND = "materialised", "performer(features=256)", "identity"
SIZES = {
    "smoke": {"width": 32, "heads": 2, "depth": 1, "timed": 64, "turns": 1},
    "small": {"width": 512, "heads": 8, "depth": 1, "timed": 4096, "turns": 2},
    "paper": {"width": 512, "heads": 8, "depth": 6, "timed": 32768, "turns": 5},
}
LENGTHS = {
    "smoke": (64,),
    "small": (512, 1024, 4096, 16384),
    "paper": (512, 1024, 2048, 4096, 8192, 16384, 32768),
}


def get_sweep(scale: Scale) -> Sweep:
    """Three models, and softmax by tiles, at each length; at "paper" the forward pass as well."""
    expressions = (TRANSFORMER, "softmax", PERFORMER, BOUND)
    if scale == "smoke":
        expressions = ("performer(features=8)", BOUND)
    modes = ("training", "forward") if scale == "paper" else ("training",)
    rows = [
        (f"{e}, {n} tokens, {mode}", {"expression": e, "length": n, "mode": mode})
        for mode in modes
        for e in expressions
        for n in LENGTHS[scale]
    ]
    base = {
        "against": BOUND, "part": "block", "mlp_ratio": 4.0, "batch": 1, **SIZES[scale],
    }  # fmt: skip
    lines = {
        "x": "length", "where": {"mode": "training"}, "by": ("expression",), "log": "xy",
        "xlabel": "tokens L",
    }  # fmt: skip
    return Sweep(
        title="Performer: cost against length, and the bound without attention",
        source="Performer, arXiv 2009.14794, figure 3",
        rows=rows,
        runner=Measuring(measure, base),
        columns=[
            Column("multiply_adds", "multiply-adds, G", 1e-9),
            Column("held_bytes", "MiB held", 2**-20),
            Column("step_seconds", "seconds", digits=3),
        ],
        claims=CLAIMS,
        panels=[
            Panel(y="step_seconds", ylabel="seconds, forward and backward", **lines),
            Panel(y="multiply_adds", ylabel="multiply-adds, forward", **lines),
            Panel(y="held_bytes", ylabel="bytes held, training", **lines),
        ],
        note=(
            "The paper's figure has no printed numbers; a V100 of 16 GB there. The regular model: "
            "8 heads, width 512, feed-forward 2,048. `identity` returns the values, projections "
            "included: what attention could at best cost. `materialised` holds all weights, as the "
            "paper's Transformer does; `softmax` is the same by tiles. Memory and multiply-adds "
            "are exact, seconds are of a shared machine."
        ),
    )  # fmt: skip


def curve(results: Results, expression: str, metric: str):
    """(lengths, metric)."""
    return results.curve("length", metric, {"expression": expression, "mode": "training"})


def over_bound(results: Results, expression: str, metric: str):
    """The metric as a multiple of the bound's, by length."""
    ours, bound = (curve(results, e, metric)[1] for e in (expression, BOUND))
    return ours / bound


CLAIMS = [
    Claim(
        "multiply-adds of Performer and bound are linear in L: slope 1 to 1e-3",
        lambda r: all(
            abs(exponent(*curve(r, e, "multiply_adds")) - 1) < 1e-3
            for e in (PERFORMER, BOUND)
        ),
    ),
    Claim(
        "multiply-adds of the Transformer grow faster between the two longest: slope over 1.7",
        lambda r: exponent(
            *(x[-2:] for x in curve(r, TRANSFORMER, "multiply_adds"))
        ) > 1.7,
    ),
    Claim(
        "training memory of Performer is linear in L: slope below 1.1",
        lambda r: exponent(*curve(r, PERFORMER, "held_bytes")) < 1.1,
    ),
    Claim(
        "the Transformer's training memory: slope over 1.7 between the two longest",
        lambda r: exponent(
            *(x[-2:] for x in curve(r, TRANSFORMER, "held_bytes"))
        ) > 1.7,
    ),
    Claim(
        "Performer is a constant factor from the bound in multiply-adds, the same to 1 %",
        lambda r: over_bound(r, PERFORMER, "multiply_adds").std()
        < 0.01 * over_bound(r, PERFORMER, "multiply_adds").mean(),
    ),
    Claim(
        "from 4,096 tokens on Performer needs less than the Transformer: multiply-adds and memory",
        lambda r: all(
            (over_bound(r, PERFORMER, metric) < over_bound(r, TRANSFORMER, metric))[
                curve(r, PERFORMER, metric)[0] > 4000
            ].all()
            for metric in ("multiply_adds", "held_bytes")
        ),
    ),
]  # fmt: skip
