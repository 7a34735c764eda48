r"""Mechanisms beside each other as language models of equal size (the enwik8 table of RWKV).

    python -m efficient_attn.tools.ablate --config=configs/ablations/lm_six.py:PATH --seeds=3

"RWKV" (arXiv 2305.13048, table 5) prints test bits per byte of enwik8 for models of 12 layers,
width 512 and contexts of 1,024. PATH is enwik8, or any text file or folder of .txt files; this
repository's README.md unless given. Rows must be within 10 % of softmax's parameters, or are not
run: `gated_delta` and `retention`, whose mixers are wider, have a smaller feed-forward layer.

Scales: "small" has characters in contexts of 128, 4 layers of width 64 and 1,500 steps, 1 to 4
minutes a row on two CPU cores: a small text, so its bits cannot be compared with enwik8's, only
their order can. "paper" has bytes, the published shape, and 100,000 steps of 16 (our numbers).

Traps: the published figures are collected by RWKV's authors from several papers and codes; AFT,
which they have too, is not one of our mechanisms.
"""

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
    attentions,
    published_of,
)
from efficient_attn.tools.ablate.claims import below

PUBLISHED = {
    "softmax": 1.137, "reformer": 1.195, "performer": 1.199, "linear": 1.207, "synthesizer": 1.298,
}  # fmt: skip
NARROWER = {"gated_delta": 3.0, "retention": 2.0}
"""mlp_ratio where the mixer has more than 4 E^2 parameters."""


def get_sweep(scale: Scale, argument: str = "README.md") -> Sweep:
    """The published mechanisms, and two recurrences of today."""
    config = lm(argument)
    unit = "byte" if scale == "paper" else "character"
    if scale == "paper":
        config.data.text.update({"tokenizer": "bytes", "max_len": 1024})
        config.model.update({"width": 512, "depth": 12, "heads": 8})
        config.train.update({"steps": 100_000, "eval_every": 5000, "eval_batch_size": 16})
        config.optimizer.update({"learning_rate": 6e-4, "warmup": 1000})
    else:
        config.model.update({"width": 64, "dropout": 0.0})
        config.train.steps = 1500
    published = {_expression(name, scale): value for name, value in PUBLISHED.items()}
    rows = attentions(*published)
    rows += [(name, {"attention": name, "model.mlp_ratio": r}) for name, r in NARROWER.items()]
    if scale == "smoke":
        at_smoke(config).data.text.max_len = 16
        rows = [row for row in rows if row[0] in ("softmax", "linear")]
    metric = f"bits_per_{unit}"
    return Sweep(
        title="Language models of equal size",
        source="RWKV, arXiv 2305.13048, table 5 (enwik8)",
        rows=rows,
        runner=Training(config),
        columns=[
            Column(metric, f"bits a {unit}"),
            Column("parameters", "parameters"),
            Column("steps_per_second", "steps/s", digits=3),
        ],
        published=published_of(rows, metric, published),
        claims=[
            Claim(
                "softmax is the best of the published five",
                lambda r: _in_order(r, metric, scale)[0] == "softmax",
            ),
            Claim(
                "Synthesizer is the worst of them",
                lambda r: _in_order(r, metric, scale)[-1] == "synthesizer",
            ),
            Claim(
                "order: " + ", ".join(PUBLISHED),
                below(metric, *published),
            ),
        ],
        panels=[Panel(y=metric, ylabel=f"bits a {unit}", points=scale != "paper")],
        equal_parameters=0.1,
        note="The paper's figures are of enwik8, at 12 layers of width 512; at small ours are of "
        "the text that is given, bits a character, so only their order compares.",
    )


def _expression(name: str, scale: Scale) -> str:
    """Reformer's chunks are shorter where the context is."""
    return "reformer(chunk=16)" if name == "reformer" and scale != "paper" else name


def _in_order(results: Results, metric: str, scale: Scale) -> list[str]:
    """The published names by our bits, the best first."""
    return sorted(PUBLISHED, key=lambda name: results.mean(_expression(name, scale), metric))
