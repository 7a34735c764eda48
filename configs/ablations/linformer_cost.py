"""Linformer's time and memory beside the Transformer's, over length and projected length.

Wang et al. 2020 (arXiv 2006.04768), table 3.

    python -m efficient_attn.tools.ablate --config=configs/ablations/linformer_cost.py --scale=small

Three CPU minutes at small: memory is compiled for, not used, so all 8 lengths are there; time is
taken up to 2,048 tokens. "paper" has 12 layers and takes time as far as a GPU of 80 GB goes. Expect
the claims to hold, and up to 16,384 tokens the paper's figures of memory at k = 128; beyond, its
memory saved stops at 60, where it compared the largest batches that fit a V100, and ours goes on.
"""

from efficient_attn.tools.ablate import Claim, Column, Measuring, Panel, Results, Scale, Sweep
from efficient_attn.tools.ablate.claims import rises, under
from efficient_attn.tools.growth import exponent
from efficient_attn.tools.measures.cost import measure

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
TIME = {
    128: (1.5, 1.7, 2.6, 3.4, 5.5, 8.6, 13, 20),
    256: (1.3, 1.6, 2.4, 3.2, 5.0, 7.8, 12, 18),
    512: (None, 1.3, 2.1, 2.8, 4.4, 7.0, 11, 16),
    1024: (None, None, 1.3, 2.2, 3.5, 5.6, 8.8, 14),
    2048: (None, None, None, 1.3, 2.1, 3.3, 5.0, 7.9),
}
MEMORY = {
    128: (1.7, 3.0, 6.1, 14, 28, 56, 56, 60),
    256: (1.5, 2.9, 5.6, 13, 26, 48, 48, 52),
    512: (None, 1.8, 3.6, 8.3, 17, 32, 36, 40),
    1024: (None, None, 2.0, 4.3, 8.5, 16, 18, 20),
    2048: (None, None, None, 2.3, 4.5, 8, 16, 18),
}
SIZES = {
    "smoke": {"width": 32, "heads": 2, "depth": 1, "timed": 64, "turns": 1},
    "small": {"width": 768, "heads": 12, "depth": 1, "timed": 2048, "turns": 3},
    "paper": {"width": 768, "heads": 12, "depth": 12, "timed": 16384, "turns": 5},
}
TILES = "softmax"


def name(rank: int) -> str:
    """The expression of a projected length."""
    return f"linformer(rank={rank}, sharing='layerwise')"


def get_sweep(scale: Scale) -> Sweep:
    """The cells of the table, and softmax by tiles at each length."""
    lengths, ranks = (LENGTHS, tuple(TIME)) if scale != "smoke" else ((64,), (16,))
    cells = [(name(k), n) for k in ranks for n in lengths if 2 * k <= n or k == 256 and n == 512]
    cells += [(TILES, n) for n in lengths]
    rows = [(f"{e}, {n} tokens", {"expression": e, "length": n}) for e, n in cells]
    published = {
        f"{name(k)}, {n} tokens": {"speed_up": TIME[k][at], "memory_saved": MEMORY[k][at]}
        for k in TIME
        for at, n in enumerate(LENGTHS)
        if TIME[k][at] and (name(k), n) in cells
    }
    base = {
        "against": "materialised", "mode": "forward", "part": "block", "mlp_ratio": 4.0,
        "batch": 1, **SIZES[scale],
    }  # fmt: skip
    lines = {"x": "length", "by": ("expression",), "log": "xy", "xlabel": "tokens n"}
    return Sweep(
        title="Linformer: what it saves over the Transformer",
        source="Linformer, arXiv 2006.04768, table 3",
        rows=rows,
        runner=Measuring(measure, base),
        columns=[
            Column("memory_saved", "memory saved, x", digits=3),
            Column("speed_up", "speed-up, x", digits=3),
            Column("adds_saved", "multiply-adds saved, x", digits=3),
            Column("held_bytes", "MiB held", 2**-20),
        ],
        published=published,
        claims=claims(ranks),
        panels=[
            Panel(y="memory_saved", ylabel="times less memory", **lines),
            Panel(y="adds_saved", ylabel="times fewer multiply-adds", **lines),
        ],
        grid=("length", "expression"),
        note=(
            "Forward pass of one transformer block as wide as RoBERTa's base model, batch 1, "
            "float32, against softmax with all its weights in memory; the paper's is a V100 of "
            "16 GB at the largest batch that fits, where weights and fixed costs weigh as well. "
            "Memory and multiply-adds are exact, seconds are of a shared machine. The column "
            "`softmax` is the same attention by tiles: it saves as much memory as k = 128. At "
            "n = 2 k projecting keys and values takes exactly what attending to fewer saves."
        ),
    )  # fmt: skip


def claims(ranks: tuple[int, ...]) -> list[Claim]:
    """What table 3 says, in exact terms."""
    return [
        Claim(
            "every cell saves memory",
            lambda r: all((curve(r, k, "memory_saved") > 1).all() for k in ranks),
        ),
        Claim(
            "multiply-adds are saved where n > 2 k, and at n = 2 k they are the same",
            lambda r: all(
                (curve(r, k, "adds_saved")[0] == 1) and (curve(r, k, "adds_saved")[1:] > 1).all()
                for k in ranks
                if k > 128
            ),
        ),
        Claim(
            "memory saved grows with n at every k",
            rises("length", "memory_saved", *({"expression": name(k)} for k in ranks)),
        ),
        Claim(
            "less is saved with a greater k, at every n: multiply-adds",
            under("length", "adds_saved", *({"expression": name(k)} for k in ranks[::-1])),
        ),
        Claim(
            "Linformer's multiply-adds are linear in n: slope 1 to 1e-3 at every k",
            lambda r: all(
                abs(exponent(*r.curve("length", "multiply_adds", {"expression": name(k)})) - 1)
                < 1e-3
                for k in ranks
            ),
        ),
    ]  # fmt: skip


def curve(results: Results, rank: int, metric: str):
    """A metric over the lengths that there are with this projected length."""
    return results.curve("length", metric, {"expression": name(rank)})[1]
