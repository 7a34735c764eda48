r"""How many layers of softmax a recurrence needs: pure, 7:1, 3:1, 1:1 (Kimi Linear).

    python -m efficient_attn.tools.ablate --config=configs/ablations/hybrid_ratio.py:PATH --seeds=3

"Kimi Linear" (arXiv 2510.26692) mixes layers of a gated delta rule with full attention and prints
validation perplexity by their ratio: 15:1 5.82, 7:1 5.70, 3:1 5.65, 1:1 5.66, full attention alone
5.77. Here `gated_delta` and `softmax` alternate by the arithmetic of expressions in 8 layers, on
PATH, a text file or a folder of .txt files (this repository's README.md unless given).

Scales: "small" has characters in contexts of 128, width 64 and 1,500 steps, 3 to 6 minutes a row on
two CPU cores; "paper" byte-pair tokens in contexts of 2,048 and 16 layers of width 1,024 (our
numbers: the paper's model has 48 billion parameters).

Expect: any mixture beats softmax alone; which is the best of them is a matter of a percent.

Trap: the paper's recurrence forgets by channel (KDA), gated_delta by head; its full attention is
MLA without positions, ours has rotary ones. So its perplexities are in this text, not in the table.
"""

from configs.lm import get_config as lm
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
from efficient_attn.tools.ablate.claims import below, not_below
from efficient_attn.tools.measures.state_size import state_of_run

PURE, SEVEN, THREE, ONE, SOFTMAX = (
    "gated_delta", "gated_delta*7 + softmax", "gated_delta*3 + softmax", "gated_delta + softmax",
    "softmax",
)  # fmt: skip


def get_sweep(scale: Scale, argument: str = "README.md") -> Sweep:
    """From the recurrence alone to softmax alone."""
    config = lm(argument)
    expressions = (PURE, SEVEN, THREE, ONE, SOFTMAX)
    if scale == "paper":
        config.data.text.update({"tokenizer": "bpe", "vocab": 32_000, "max_len": 2048})
        config.model.update({"width": 1024, "depth": 16, "heads": 8})
        config.train.update({"steps": 100_000, "eval_every": 5000, "eval_batch_size": 16})
        config.optimizer.update({"learning_rate": 6e-4, "warmup": 1000})
    else:
        config.model.update({"width": 64, "depth": 8, "heads": 2, "dropout": 0.0})
        config.train.steps = 1500
    if scale == "smoke":
        at_smoke(config).data.text.max_len = 16
        config.model.depth = 2
        expressions = (ONE,)
    return Sweep(
        title="Layers of gated_delta for each of softmax",
        source="Kimi Linear, arXiv 2510.26692, the ablation of its hybrid ratio",
        rows=attentions(*expressions),
        runner=Training(config, after=state_of_run),
        columns=[
            Column("perplexity", "perplexity"),
            Column("state_bytes", "state, bytes a layer"),
            Column("parameters", "parameters"),
            Column("steps_per_second", "steps/s", digits=3),
        ],
        claims=[
            Claim(
                "three recurrent layers for each of softmax beat softmax alone",
                below("perplexity", THREE, SOFTMAX),
            ),
            Claim(
                "they beat seven for each",
                below("perplexity", THREE, SEVEN),
            ),
            Claim(
                "one for each is no better than three",
                not_below("perplexity", ONE, THREE),
            ),
            Claim(
                "seven for each still beat softmax alone",
                below("perplexity", SEVEN, SOFTMAX),
            ),
        ],
        panels=[Panel(y="perplexity", points=True)],
        note="Perplexity of a character of test at small. Published, of another model and data: "
        "3:1 5.65, 1:1 5.66, 7:1 5.70, softmax alone 5.77.",
    )
