"""FAVOR+ in place of softmax in a stack of layers: how its error grows with the depth.

Choromanski et al. 2021 (arXiv 2009.14794), figure 14.

    python -m efficient_attn.tools.ablate --config=configs/ablations/favor_depth.py --scale=small

Two CPU minutes at small. Expect the squared error to grow with every layer and to fall with the
features: errors of the attention compound, which is why pretrained weights of a Transformer need
finetuning in a Performer. As a share of the output it grows over the first layers only. Queries
and keys of fresh blocks are of N(0, 1), where orthogonal rows do not help (`favor_error`).
"""

from efficient_attn.tools.ablate import Claim, Column, Measuring, Panel, Results, Scale, Sweep
from efficient_attn.tools.measures.favor_depth import measure

SIZES = {
    "smoke": {"width": 16, "heads": 2, "length": 32, "samples": 1},
    "small": {"width": 256, "heads": 4, "length": 512, "samples": 3},
    "paper": {"width": 512, "heads": 8, "length": 1024, "samples": 15},
}
DEPTHS = (1, 2, 4, 8, 12)
FEATURES = (64, 256, 1024)
PROJECTIONS = ("orthogonal", "iid")


def get_sweep(scale: Scale) -> Sweep:
    """Depths by features, orthogonal; and independent rows at the middle number of features."""
    depths, features = (DEPTHS, FEATURES) if scale != "smoke" else ((1, 2), (8,))
    kinds = [(m, "orthogonal") for m in features]
    kinds += [(FEATURES[1], "iid")] if scale != "smoke" else []
    rows = []
    for m, projection in kinds:
        expression = f"performer(features={m}, projection={projection!r})"
        rows += [
            (f"{expression}, depth {n}", {"expression": expression, "depth": n}) for n in depths
        ]
    lines = {"x": "depth", "by": ("expression",), "log": "y", "xlabel": "layers"}
    return Sweep(
        title="FAVOR+ in place of softmax: error against depth",
        source="Performer, arXiv 2009.14794, figure 14",
        rows=rows,
        runner=Measuring(measure, {"mlp_ratio": 4.0, **SIZES[scale]}),
        columns=[
            Column("relative_error", "relative error", digits=3),
            Column("output_error", "squared error", digits=3),
        ],
        claims=CLAIMS,
        panels=[
            Panel(y="output_error", ylabel="mean squared error", **lines),
            Panel(y="relative_error", ylabel="squared error over softmax's square", **lines),
        ],
        grid=("depth", "expression"),
        note=(
            "The figure's numbers are not printed in the paper, nor whose weights they are of. "
            "Here the blocks are freshly drawn (normalised first, Xavier, heads of 64) on inputs "
            "of N(0, 1), and the same weights are read with FAVOR+, drawn anew in every layer."
        ),
    )  # fmt: skip


def curve(results: Results, features: int, metric: str, projection: str = "orthogonal"):
    """The error over the depths."""
    expression = f"performer(features={features}, projection={projection!r})"
    return results.curve("depth", metric, {"expression": expression})[1]


def grows(results: Results, metric: str) -> bool:
    """Whether the error is greater after every further block, at every number of features."""
    curves = [curve(results, m, metric) for m in FEATURES]
    return all((one[1:] > one[:-1]).all() for one in curves)


CLAIMS = [
    Claim("the squared error grows with the depth", lambda r: grows(r, "output_error")),
    Claim(
        "and as a share of softmax's output, whose square grows as well",
        lambda r: grows(r, "relative_error"),
    ),
    Claim(
        "more features, less error, at every depth",
        lambda r: all(
            (curve(r, more, "output_error") < curve(r, fewer, "output_error")).all()
            for fewer, more in zip(FEATURES, FEATURES[1:], strict=False)
        ),
    ),
    Claim(
        "orthogonal rows below independent ones, 256 features, at every depth (figure 4's claim)",
        lambda r: bool(
            (curve(r, 256, "output_error") < curve(r, 256, "output_error", "iid")).all()
        ),
    ),
]
