"""Recall against the size of the state: multi-query associative recall (Zoology, 2312.04927).

python -m efficient_attn.tools.ablate --config=configs/ablations/mqar.py --scale=small --seeds=3
"""

from configs.probes import get_config as probe
from efficient_attn.tools.ablate import Claim, Column, Panel, Scale, Sweep, Training, attentions

EXPRESSIONS = (
    "softmax",
    "local(window=8)",
    "linear",
    "performer",
    "retention",
    "gla",
    "mamba2",
    "gated_delta",
)


def get_sweep(scale: Scale) -> Sweep:
    """The mechanisms of the README's probe."""
    config = probe("mqar,paper" if scale == "paper" else "mqar")
    rows = attentions(*EXPRESSIONS)
    if scale == "smoke":
        config.train.update({"steps": 10, "eval_every": 5, "log_every": 5})
        config.optimizer.warmup = 2
        config.data.probes.update({"train": 256, "validation": 64, "test": 64})
        config.model.update({"depth": 1, "width": 32, "heads": 1})
        rows = rows[:2]
    return Sweep(
        title="Recall of key-value pairs",
        source="Zoology, arXiv 2312.04927, figure 2",
        rows=rows,
        runner=Training(config),
        columns=[Column("accuracy", "accuracy %", 100), Column("parameters", "parameters")],
        claims=[Claim("softmax recalls all", lambda r: r.mean("softmax", "accuracy") > 0.99)],
        panels=[Panel(y="accuracy")],
    )
