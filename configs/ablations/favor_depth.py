"""FAVOR+ in place of softmax in a stack of layers: how its error grows with the depth.

Choromanski et al. 2021 (arXiv 2009.14794), figure 14.

    python -m efficient_attn.tools.ablate --config=configs/ablations/favor_depth.py --scale=small

Two CPU minutes at small. Expect the error to grow with every layer and to fall with the features:
small errors of the attention compound, which is why pretrained weights of a Transformer need
finetuning in a Performer (the paper, section 4.2).
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
            Panel(
                x="depth", y="relative_error", by=("expression",), log="xy", xlabel="layers",
                ylabel="squared error over softmax's square",
            )
        ],
        grid=("depth", "expression"),
        note=(
            "The figure's numbers are not printed in the paper, nor whose weights they are of. "
            "Here the blocks are freshly drawn (normalised first, Xavier, heads of 64) on inputs "
            "of N(0, 1), and the same weights are read with FAVOR+, drawn anew in every layer."
        ),
    )  # fmt: skip


def curve(results: Results, features: int, projection: str = "orthogonal"):
    """The error over the depths."""
    expression = f"performer(features={features}, projection={projection!r})"
    return results.curve("depth", "relative_error", {"expression": expression})[1]


CLAIMS = [
    Claim(
        "the error grows with the depth, at every number of features",
        lambda r: all((curve(r, m)[1:] > curve(r, m)[:-1]).all() for m in FEATURES),
    ),
    Claim(
        "more features, less error, at every depth",
        lambda r: all(
            (curve(r, more) < curve(r, fewer)).all()
            for fewer, more in zip(FEATURES, FEATURES[1:], strict=False)
        ),
    ),
    Claim(
        "orthogonal rows below independent ones, 256 features, at every depth",
        lambda r: bool((curve(r, 256) < curve(r, 256, "iid")).all()),
    ),
]  # fmt: skip
