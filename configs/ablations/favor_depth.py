"""FAVOR+ in place of softmax in a stack of layers: how its error grows with the depth.

Choromanski et al. 2021 (arXiv 2009.14794), figure 14.

    python -m efficient_attn.tools.ablate --config=configs/ablations/favor_depth.py --scale=small

Two CPU minutes at small. Expect the squared error to grow with every layer and to fall with the
features: errors of the attention compound, which is why pretrained weights of a Transformer need
finetuning in a Performer. As a share of the output it grows over the first layers only. Queries
and keys of fresh blocks are of N(0, 1), where orthogonal rows do not help (`favor_error`).
"""

from efficient_attn.tools.ablate import Claim, Column, Measuring, Panel, Scale, Sweep
from efficient_attn.tools.ablate.claims import rises, under
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


def curve(features: int, projection: str = "orthogonal") -> dict[str, str]:
    """The rows over the depths."""
    return {"expression": f"performer(features={features}, projection={projection!r})"}


CURVES = [curve(features) for features in FEATURES]
CLAIMS = [
    Claim("the squared error grows with the depth", rises("depth", "output_error", *CURVES)),
    Claim(
        "and as a share of softmax's output, whose square grows as well",
        rises("depth", "relative_error", *CURVES),
    ),
    Claim(
        "more features, less error, at every depth",
        under("depth", "output_error", *CURVES[::-1]),
    ),
    Claim(
        "orthogonal rows below independent ones, 256 features, at every depth (figure 4's claim)",
        under("depth", "output_error", curve(256), curve(256, "iid")),
    ),
]
