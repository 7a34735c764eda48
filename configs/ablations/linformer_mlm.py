r"""Linformer's k and its sharing of projections, on a masked language model (figure 3).

    python -m efficient_attn.tools.ablate --config=configs/ablations/linformer_mlm.py:PATH --seeds=3

"Linformer" (arXiv 2006.04768, figure 3) draws validation perplexity of RoBERTa-like pretraining
over the projected length k, and over what shares a projection: nothing, the heads, keys and values
too, or all layers. PATH is a text file or a folder of .txt files, this repository's README.md
unless given; the paper has BookCorpus and English Wikipedia, 3.3 billion words.

Scales: "small" has characters in contexts of 64, 2 layers of width 64 with sinusoidal positions and
1,500 steps of 64, 3 to 6 minutes a row on two CPU cores (4 layers, learned positions and steps of
16 learn no more in that time than how frequent each character is); "paper" byte-pair tokens in
contexts of 512, RoBERTa-base's 12 layers of width 768 and the paper's 250,000 steps; its batch of
256 is our number.

Expect: perplexity falls with k towards that of softmax, and sharing costs next to nothing, while
one matrix for all layers replaces 2 for each head and layer.

Trap: the figure prints curves, no numbers; its words are the claims below.
"""

from configs.mlm import get_config as mlm
from efficient_attn.tools.ablate import (
    Claim,
    Column,
    Panel,
    Scale,
    Sweep,
    Training,
    at_smoke,
    attentions,
)
from efficient_attn.tools.ablate.claims import above

RANKS = {"smoke": (4,), "small": (4, 8, 16, 32), "paper": (32, 64, 128, 256)}
SHARING = ("none", "headwise", "key-value", "layerwise")


def get_sweep(scale: Scale, argument: str = "README.md") -> Sweep:
    """softmax, the ranks, and at a quarter of the length the ways to share."""
    config = mlm(argument)
    ranks = RANKS[scale]
    if scale == "paper":
        config.data.text.update({"max_len": 512, "vocab": 50_000})
        config.data.batch_size = 256
        config.model.update({"width": 768, "depth": 12, "heads": 12})
        config.train.update({"steps": 250_000, "eval_every": 5000})
        config.optimizer.update({"warmup": 10_000, "learning_rate": 6e-4})
    else:
        config.data.text.update({"tokenizer": "chars", "max_len": 64})
        config.data.batch_size = 64
        config.model.update({"width": 64, "depth": 2, "dropout": 0.0, "positions": "sinusoidal"})
        config.train.steps = 1500
        config.optimizer.update({"warmup": 150, "learning_rate": 5e-3})
    middle = ranks[-2] if scale != "smoke" else ranks[0]
    by_rank = [_label(rank) for rank in ranks]
    by_sharing = [_label(middle, sharing) for sharing in SHARING]
    rows = attentions("softmax", *dict.fromkeys(by_rank + by_sharing))
    if scale == "smoke":
        at_smoke(config).data.text.max_len = 16
        rows = [row for row in rows if row[0] in ("softmax", _label(middle, "layerwise"))]
    return Sweep(
        title="Linformer's projected length and sharing, masked language model",
        source="Linformer, arXiv 2006.04768, figure 3",
        rows=rows,
        runner=Training(config),
        columns=[
            Column("perplexity", "perplexity"),
            Column("accuracy", "hidden tokens told, %", 100),
            Column("parameters", "parameters"),
        ],
        claims=[
            Claim("perplexity falls as k grows", above("perplexity", *by_rank)),
            Claim(
                "at a quarter of the length k nearly matches softmax (within 5 %)",
                lambda r: (
                    r.mean(_label(middle), "perplexity") <= 1.05 * r.mean("softmax", "perplexity")
                ),
            ),
            Claim(
                "one projection for all layers costs almost nothing beside one for each head "
                "(within 2 %)",
                lambda r: (
                    r.mean(by_sharing[-1], "perplexity")
                    <= 1.02 * r.mean(by_sharing[0], "perplexity")
                ),
            ),
        ],
        panels=[Panel(y="perplexity", points=True)],
        note="Perplexity of the hidden tokens of test. At small a token is a character of a short "
        "text; the paper's figure prints curves, so nothing stands beside ours.",
    )


def _label(rank: int, sharing: str = "headwise") -> str:
    """headwise is the default of `linformer`."""
    more = "" if sharing == "headwise" else f", sharing='{sharing}'"
    return f"linformer(rank={rank}{more})"
