"""Nystromformer's memory and time of one self-attention layer, 512 to 8,192 tokens.

Xiong et al. 2021 (arXiv 2102.03902), table 1.

    python -m efficient_attn.tools.ablate --config=configs/ablations/nystrom_cost.py --scale=small

Four CPU minutes at small, which has every other length; memory is compiled for, not used, and time
is taken up to 1,024 tokens ("paper": all).

The paper does not say how wide its layer is, nor whether its memory is that of training; 10,233 MB
for the Transformer at 8,192 tokens is three copies of 12 heads' weights and something, which is
what a backward pass of BERT's base model keeps: that is what is measured.
"""

from efficient_attn.tools.ablate import Claim, Column, Measuring, Panel, Results, Scale, Sweep
from efficient_attn.tools.ablate.claims import under
from efficient_attn.tools.growth import exponent
from efficient_attn.tools.measures.cost import measure

LENGTHS = (512, 1024, 2048, 4096, 8192)
TRANSFORMER, LINFORMER, LONGFORMER = "materialised", "linformer(rank=256)", "longformer(window=256)"
NYSTROM_64, NYSTROM_32 = "nystrom(landmarks=64)", "nystrom(landmarks=32)"
BARE = "nystrom(landmarks=64, kernel=None)"
PUBLISHED = {
    TRANSFORMER: ((54, 186, 685, 2620, 10233), (0.8, 2.4, 10.0, 32.9, 155.4)),
    LINFORMER: ((41, 81, 165, 366, 635), (0.7, 1.3, 2.7, 5.3, 11.3)),
    LONGFORMER: ((32.2, 65, 130, 263, 455), (2.4, 4.6, 9.2, 18.5, 36.2)),
    NYSTROM_64: ((35, 63, 118, 229, 450), (0.7, 1.3, 2.7, 5.9, 12.3)),
    NYSTROM_32: ((26, 49, 96, 193, 383), (0.6, 1.2, 2.6, 5.6, 11.5)),
}
"""Megabytes, and milliseconds, for one example at each length."""
SIZES = {
    "smoke": {"width": 32, "heads": 2, "timed": 128, "turns": 1},
    "small": {"width": 768, "heads": 12, "timed": 1024, "turns": 3},
    "paper": {"width": 768, "heads": 12, "timed": 8192, "turns": 5},
}


def get_sweep(scale: Scale) -> Sweep:
    """The rows of the table, and Nystromformer without its convolution."""
    expressions, lengths = (*PUBLISHED, BARE), LENGTHS if scale == "paper" else LENGTHS[::2]
    if scale == "smoke":
        expressions, lengths = ("nystrom(landmarks=8)", LONGFORMER), (128,)
    rows = [
        (f"{e}, {n} tokens", {"expression": e, "length": n}) for e in expressions for n in lengths
    ]
    published = {
        f"{e}, {n} tokens": {"held_bytes": megabytes * 2**20, "step_seconds": ms / 1000}
        for e, columns in PUBLISHED.items()
        for n, megabytes, ms in zip(LENGTHS, *columns, strict=True)
        if n in lengths
    }
    base = {
        "against": TRANSFORMER, "mode": "training", "part": "attention", "depth": 1,
        "mlp_ratio": 4.0, "batch": 1, **SIZES[scale],
    }  # fmt: skip
    lines = {"x": "length", "by": ("expression",), "log": "xy", "xlabel": "tokens"}
    return Sweep(
        title="Nystromformer: memory and time of self-attention",
        source="Nystromformer, arXiv 2102.03902, table 1",
        rows=rows,
        runner=Measuring(measure, base),
        columns=[
            Column("held_bytes", "MiB held", 2**-20),
            Column("step_seconds", "ms", 1000, digits=3),
            Column("memory_saved", "memory, times less", digits=3),
            Column("adds_saved", "multiply-adds, times fewer", digits=3),
        ],
        published=published,
        claims=CLAIMS,
        panels=[
            Panel(y="held_bytes", ylabel="bytes held, forward and backward", **lines),
            Panel(y="multiply_adds", ylabel="multiply-adds, forward", **lines),
        ],
        grid=("expression", "length"),
        note=(
            "One layer with its projections, width 768, 12 heads, float32, batch 1, gradients by "
            "parameters and input; ours on the device below, the paper's milliseconds on a GPU it "
            "does not name there. Memory and multiply-adds are exact. `materialised` is the "
            "paper's Transformer; `kernel=None` leaves out the convolution that skips the "
            "attention."
        ),
    )  # fmt: skip


def rows_of(expression: str) -> dict[str, str]:
    """Those of an expression, over the lengths."""
    return {"expression": expression}


def growth(results: Results, expression: str) -> float:
    """The p of the n^p that fits the memory best."""
    return exponent(*results.curve("length", "held_bytes", rows_of(expression)))


def held(results: Results, expression: str) -> float:
    """Bytes at 8,192 tokens."""
    return results.curve("length", "held_bytes", rows_of(expression))[1][-1]


CLAIMS = [
    Claim(
        "memory: the Transformer grows faster than n^1.7",
        lambda r: growth(r, TRANSFORMER) > 1.7,
    ),
    *(
        Claim(f"memory: {e} grows slower than n^1.1", lambda r, e=e: growth(r, e) < 1.1)
        for e in (LINFORMER, LONGFORMER, NYSTROM_64, NYSTROM_32)
    ),
    Claim(
        "Nystromformer-64 holds less than the Transformer at every length",
        under("length", "held_bytes", rows_of(NYSTROM_64), rows_of(TRANSFORMER)),
    ),
    Claim(
        "32 landmarks hold less than 64 at every length",
        under("length", "held_bytes", rows_of(NYSTROM_32), rows_of(NYSTROM_64)),
    ),
    Claim(
        "at 8,192 tokens Nystromformer-64 holds less than Linformer-256",
        lambda r: held(r, NYSTROM_64) < held(r, LINFORMER),
    ),
    Claim(
        "at 8,192 tokens Nystromformer-64 holds no more than Longformer-257",
        lambda r: held(r, NYSTROM_64) <= held(r, LONGFORMER),
    ),
    Claim(
        "without its convolution Nystromformer-64 holds less than both",
        lambda r: held(r, BARE) < min(held(r, LINFORMER), held(r, LONGFORMER)),
    ),
]
