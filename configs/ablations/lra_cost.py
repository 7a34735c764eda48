"""Long Range Arena's speed and memory: training steps of the text model at 1K to 4K tokens.

Tay et al. 2020 (arXiv 2011.04006), table 2.

    python -m efficient_attn.tools.ablate --config=configs/ablations/lra_cost.py --scale=small

Four CPU minutes at small (one layer, 1K and 4K; time at 1K). "paper" has the 6 layers and 2
examples, its share of 32 on one of 16 chips; it takes time everywhere. Expect the orders of growth
to hold, and no speed of a busy CPU to mean much. Two claims fail for what ours are: the Synthesizer
does not hold its T x T weights at 4K, and Reformer, with one projection less, has the fewest
multiply-adds.

Two published cells look like misprints: the Synthesizer's speed at 3K (2.9, which is Sinkhorn's)
and Linformer's memory at 3K (0.99 GB, which is that of 4K). As released, Linformer has rank 16
everywhere, and "Sinkhorn" never calls its operator; the Sparse Transformer and Longformer were not
timed.
"""

from efficient_attn.tools.ablate import Claim, Column, Measuring, Panel, Results, Scale, Sweep
from efficient_attn.tools.ablate.claims import above
from efficient_attn.tools.growth import exponent
from efficient_attn.tools.measures.cost import measure

LENGTHS = (1024, 2048, 3072, 4096)
TRANSFORMER = "materialised"
GIGABYTES = (0.85, 2.65, 5.51, 9.48)
PUBLISHED = {
    "local(window=50, pattern='blocked')": ((1.1, 1.7, 3.2, 5.3), (0.42, 0.76, 1.06, 1.37)),
    "linformer(rank=16)": ((1.2, 1.9, 3.7, 5.5), (0.37, 0.55, 0.99, 0.99)),
    "reformer(rounds=1, chunk=10, buckets=10)": ((0.5, 0.4, 0.7, 0.8), (0.48, 0.99, 1.53, 2.28)),
    "sinkhorn(block=50, iterations=1)": ((1.1, 1.6, 2.9, 3.8), (0.47, 0.83, 1.13, 1.48)),
    "synthesizer(mixture=('random', 'vanilla'))": (
        (1.1, 1.2, 2.9, 1.4), (0.65, 1.98, 4.09, 6.99),
    ),
    "bigbird(block=64)": ((0.9, 0.8, 1.2, 1.1), (0.77, 1.49, 2.18, 2.88)),
    "linear": ((1.1, 1.9, 3.7, 5.6), (0.37, 0.57, 0.80, 1.03)),
    "performer(features=256, feature_map='relu')": (
        (1.2, 1.9, 3.8, 5.7), (0.37, 0.59, 0.82, 1.06),
    ),
}  # fmt: skip
"""Speed-up over the Transformer, and GB for each device, at each length."""
LOCAL, LINFORMER, REFORMER, SINKHORN, SYNTHESIZER, BIGBIRD, LINEAR, PERFORMER = PUBLISHED
SUBQUADRATIC = (LOCAL, LINFORMER, REFORMER, SINKHORN, BIGBIRD, LINEAR, PERFORMER)
SIZES = {
    "smoke": {"width": 16, "heads": 2, "depth": 1, "batch": 1, "timed": 64, "turns": 1},
    "small": {"width": 512, "heads": 8, "depth": 1, "batch": 1, "timed": 1024, "turns": 3},
    "paper": {"width": 512, "heads": 8, "depth": 6, "batch": 2, "timed": 4096, "turns": 5},
}


def get_sweep(scale: Scale) -> Sweep:
    """The models of the table, and softmax by tiles, at each length."""
    lengths = {"smoke": (64,), "small": (1024, 4096), "paper": LENGTHS}[scale]
    expressions = (TRANSFORMER, "softmax", *PUBLISHED)
    if scale == "smoke":
        expressions = (LINFORMER, LINEAR)
    rows = [
        (f"{e}, {n} tokens", {"expression": e, "length": n}) for e in expressions for n in lengths
    ]
    published = {
        f"{e}, {n} tokens": {
            "speed_up": speeds[LENGTHS.index(n)],
            "memory_saved": GIGABYTES[LENGTHS.index(n)] / memory[LENGTHS.index(n)],
        }
        for e, (speeds, memory) in PUBLISHED.items()
        for n in lengths
        if scale != "smoke"
    }
    base = {
        "against": TRANSFORMER, "mode": "training", "part": "block", "mlp_ratio": 4.0,
        **SIZES[scale],
    }  # fmt: skip
    lines = {"x": "length", "by": ("expression",), "log": "xy", "xlabel": "tokens"}
    return Sweep(
        title="Long Range Arena: speed and memory of the text model",
        source="Long Range Arena, arXiv 2011.04006, table 2",
        rows=rows,
        runner=Measuring(measure, base),
        columns=[
            Column("memory_saved", "memory, times less", digits=3),
            Column("held_bytes", "MiB held", 2**-20),
            Column("adds_saved", "multiply-adds, times fewer", digits=3),
            Column("speed_up", "speed-up, x", digits=3),
        ],
        published=published,
        claims=CLAIMS,
        panels=[
            Panel(y="held_bytes", ylabel="bytes held, training step", **lines),
            Panel(y="multiply_adds", ylabel="multiply-adds, forward", **lines),
        ],
        grid=("expression", "length"),
        note=(
            "Gradients of the blocks of the paper's text model (width 512, 8 heads, feed-forward "
            "2,048) by all parameters, float32; embedding, classifier and optimizer are left out, "
            "being the same in all rows. `materialised` is the paper's Transformer, all weights in "
            "memory; the paper's memory is its quotient with that. The paper's 16 TPU v3 hold 2 "
            "examples each. Mechanisms as the released code sets them. Printed cells that look "
            "like misprints: the Synthesizer's speed and Linformer's memory at 3K."
        ),
    )  # fmt: skip


def growth(results: Results, expression: str, metric: str) -> float:
    """The p of the n^p that fits best."""
    return exponent(*results.curve("length", metric, {"expression": expression}))


def longest(results: Results, metric: str) -> dict[str, float]:
    """A metric of every model at 4K."""
    found = results.each(metric, {"length": LENGTHS[-1]})
    return {label.rpartition(",")[0]: value for label, value in found.items()}


CLAIMS = [
    Claim(
        "at 4K every model but the Synthesizer holds less than half of the Transformer",
        lambda r: all(longest(r, "memory_saved")[e] > 2 for e in SUBQUADRATIC),
    ),
    Claim(
        "memory: the Transformer and the Synthesizer grow faster than n^1.5",
        lambda r: all(growth(r, e, "held_bytes") > 1.5 for e in (TRANSFORMER, SYNTHESIZER)),
    ),
    Claim(
        "memory: all others grow slower than n^1.2",
        lambda r: all(growth(r, e, "held_bytes") < 1.2 for e in SUBQUADRATIC),
    ),
    Claim(
        "the least memory at 4K is Linformer's, the Linear Transformer's or Performer's",
        lambda r: (
            max(PUBLISHED, key=longest(r, "memory_saved").__getitem__)
            in (LINFORMER, LINEAR, PERFORMER)
        ),
    ),
    Claim(
        "BigBird holds more than Sinkhorn, and Sinkhorn more than local attention, at 4K",
        above("held_bytes", *(f"{e}, {LENGTHS[-1]} tokens" for e in (BIGBIRD, SINKHORN, LOCAL))),
    ),
    Claim(
        "multiply-adds at 4K: fewest with a linear model (linformer, linear, performer or local)",
        lambda r: (
            min(PUBLISHED, key=longest(r, "multiply_adds").__getitem__)
            in (LINFORMER, LINEAR, PERFORMER, LOCAL)
        ),
    ),
]
