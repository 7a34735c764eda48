r"""Long-short range attention against softmax at equal multiply-adds, and where each looks.

    python -m efficient_attn.tools.ablate --config=configs/ablations/lsra.py:PATH --seeds=3

"Lite Transformer" (arXiv 2004.11886) gives half of the channels to attention and half to a
convolution, and flattens the feed-forward layer to the width, since the usual four times the width
takes most of a small model's operations (section 3); its figure of attention maps shows attention
that has left what is near to the convolution. PATH is a text file or a folder of .txt files, this
repository's README.md unless given: a character language model stands in for the translation.

Rows: both mechanisms, each with the flat feed-forward layer (hidden width 1 x) and with the usual
one (4 x), at widths that make their multiply-adds equal to within 7 %, most of them the
Transformer's.

Scales: "small" has contexts of 128, 3 layers, about 33 million multiply-adds and 1,500 steps, 1 to
3 minutes a row on two CPU cores; "paper" contexts of 512, 6 layers of kernels 3 to 31, four times
the width, for an accelerator.

Expect: LSRA before softmax, flat before not, and LSRA's attention looking farther than softmax's.

Traps: the paper's numbers are BLEU and cannot stand here: WMT'14 En-Fr 35.3, 39.1 and 39.6 at 90,
360 and 527 million multiply-adds, of the Transformer 33.6, 37.6 and 38.4 (these from memory). Its
IWSLT models have the lightweight convolution without a gate that is used here.
"""

import numpy as np

from configs.lm import get_config as lm
from efficient_attn.tools.ablate import (
    Claim,
    Column,
    Panel,
    Results,
    Scale,
    Sweep,
    Training,
    at_smoke,
)
from efficient_attn.tools.ablate.claims import below
from efficient_attn.tools.measures.attention_maps import attention_maps

LITE = "lsra(conv='lightweight', gate='linear', kernel=(3, 7, 15, 31))"
FLAT, WIDE = "softmax, flat", "softmax, 4 x"
LSRA_FLAT, LSRA_WIDE = "lsra, flat", "lsra, 4 x"
SHAPES = {
    LSRA_FLAT: (LITE, 1.0, 136), LSRA_WIDE: (LITE, 4.0, 88), FLAT: ("softmax", 1.0, 100),
    WIDE: ("softmax", 4.0, 76),
}  # fmt: skip
"""Attention, hidden over width, width at small."""

CLAIMS = [
    Claim(
        "multiply-adds are equal (within 7 %)",
        lambda r: (
            max(r.each("multiply_adds").values()) <= 1.07 * min(r.each("multiply_adds").values())
        ),
    ),
    Claim(
        "at equal multiply-adds LSRA, flat, is better than the usual Transformer",
        below("loss", LSRA_FLAT, WIDE),
    ),
    Claim(
        "a flat feed-forward layer is better for LSRA",
        below("loss", LSRA_FLAT, LSRA_WIDE),
    ),
    Claim(
        "LSRA's attention leaves what is near to the convolution: less of it falls on the "
        "nearest tokens than of the twin's",
        below("attention_near", LSRA_FLAT, WIDE),
    ),
]
MAPS = [
    (WIDE, "attention_map", "softmax"),
    (LSRA_FLAT, "attention_map", "LSRA: attention"),
    (LSRA_FLAT, "convolution_map", "LSRA: convolution"),
]


def get_sweep(scale: Scale, argument: str = "README.md") -> Sweep:
    """Two mechanisms with two feed-forward layers."""
    config = lm(argument)
    shapes, times = SHAPES, 1
    if scale == "paper":
        times = 4
        config.data.text.max_len = 512
        config.model.update({"depth": 6, "heads": 8, "dropout": 0.1})
        config.train.update({"steps": 50_000, "eval_every": 2500})
        config.optimizer.update({"learning_rate": 1e-3, "warmup": 1000})
    else:
        config.model.update({"depth": 3, "heads": 2, "dropout": 0.0})
        config.train.steps = 1500
    if scale == "smoke":
        at_smoke(config).data.text.max_len = 16
        shapes = {LSRA_FLAT: (LITE, 1.0, 16)}
    rows = [
        (
            label,
            {"attention": attention, "model.mlp_ratio": ratio, "model.width": times * width},
        )
        for label, (attention, ratio, width) in shapes.items()
    ]
    return Sweep(
        title="Long-short range attention at equal multiply-adds",
        source="Lite Transformer, arXiv 2004.11886, section 3 and its attention maps",
        rows=rows,
        runner=Training(config, count=True, after=attention_maps),
        columns=[
            Column("loss", "loss, nats a character"),
            Column("multiply_adds", "multiply-adds"),
            Column("parameters", "parameters"),
            Column("attention_distance", "attention looks back, tokens", digits=3),
            Column("attention_near", "of it on the nearest 4 tokens, %", 100, digits=3),
        ],
        claims=CLAIMS,
        panels=[
            Panel(draw=_map(label, metric), title=title)
            for label, metric, title in MAPS
            if label in shapes
        ],
        note="Test loss of a character language model; the paper translates. The maps are means "
        "over 32 examples, heads and layers: a row for each token, darker where it takes more, "
        "the root of the weight.",
    )


def _map(label: str, metric: str):
    def draw(results: Results, axes) -> None:
        weights = np.sqrt(results.mean(label, metric))
        axes.imshow(weights, cmap="Greys", vmin=0)
        axes.grid(visible=False)
        axes.set(xlabel="token that is looked at", ylabel="token that looks")

    return draw
