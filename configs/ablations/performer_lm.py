r"""Performer's kernels, redrawing and regularised features, on a language model (figures 5, 15-17).

    python -m efficient_attn.tools.ablate --config=configs/ablations/performer_lm.py:PATH --seeds=3

"Rethinking Attention with Performers" (arXiv 2009.14794) asks on TrEMBL's proteins and on ImageNet
pixels: positive or trigonometric features, redrawn or not (figure 5), the regularised kernel SMREG,
and which generalised kernel (figures 15 to 17). PATH is a text file or a folder of .txt files, this
repository's README.md unless given: a character language model on it stands in for the proteins.

Scales: "small" has contexts of 128, 4 layers of width 64 and 1,500 steps, 1 to 4 minutes a row on
two CPU cores; "paper" contexts of 1,024 and the regular model of the paper's figure 3 (6 layers of
width 512, 8 heads, 256 features), for an accelerator.

Expect what the paper says: trigonometric features are unstable, positive ones drawn once stop short
of the Transformer, redrawn ones match it (figure 5, PG-19); a ReLU kernel is better than softmax
and than softmax's features (section 4.4, TrEMBL). Less clear are ImageNet64, where ReLU and the
regularised kernel have 3.67 bits and softmax's features 3.69, "the same result" as ReLU's (figure
15), and redrawing, since a lucky draw needs no other (there too). A row whose loss is not finite
fails, as elu + 1 did in figure 18.

Traps: published on TrEMBL, one direction, accuracy and perplexity of 25 amino acids: Transformer
30.80 % and 9.37, Performer with ReLU 31.58 % and 9.17; bidirectional 33.32 and 9.22, ReLU 36.09 and
8.36, softmax features 33.00 and 9.24. They are of other data, and so are not put beside ours.
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
from efficient_attn.tools.ablate.claims import below

VARIANTS = {
    "positive": "",
    "hyperbolic": "feature_map='hyperbolic'",
    "trigonometric": "feature_map='trigonometric'",
    "iid": "projection='iid'",
    "regularised": "projection='regularised'",
    "redraw": "redraw=100",
    "relu": "feature_map='relu'",
    "elu": "feature_map='elu'",
    "exp": "feature_map='exp'",
    "abs": "feature_map='abs'",
    "gelu": "feature_map='gelu'",
    "sigmoid": "feature_map='sigmoid'",
    "cos": "feature_map='cos'",
    "tanh": "feature_map='tanh'",
    "identity": "feature_map='identity'",
}
SMALL = ("positive", "trigonometric", "iid", "regularised", "redraw", "relu", "elu", "exp")
FEATURES = {"smoke": 8, "small": 64, "paper": 256}


def get_sweep(scale: Scale, argument: str = "README.md") -> Sweep:
    """softmax, its estimates, and generalised kernels."""
    config = lm(argument)
    features = f"features={FEATURES[scale]}"
    performer = {
        name: f"performer({', '.join(filter(None, (features, option)))})"
        for name, option in VARIANTS.items()
    }
    chosen = {"smoke": ("positive", "relu"), "small": SMALL, "paper": tuple(VARIANTS)}[scale]
    rows = attentions(*(performer[name] for name in chosen))
    if scale != "smoke":
        rows = [*attentions("softmax"), *rows]
    if scale == "paper":
        config.data.text.max_len = 1024
        config.model.update({"width": 512, "depth": 6, "heads": 8})
        config.train.update({"steps": 100_000, "eval_every": 5000})
        config.optimizer.update({"learning_rate": 1e-3, "warmup": 1000})
    else:
        config.model.update({"width": 64, "dropout": 0.0})
        config.train.steps = 1500
    if scale == "smoke":
        at_smoke(config).data.text.max_len = 16
    return Sweep(
        title="Performer's kernels and features, language model",
        source="Performer, arXiv 2009.14794, figures 5 and 15 to 17",
        rows=rows,
        runner=Training(config),
        columns=[
            Column("loss", "loss, nats a character"),
            Column("accuracy", "accuracy, %", 100),
            Column("steps_per_second", "steps/s", digits=3),
        ],
        claims=_claims(performer),
        panels=[Panel(y="loss", ylabel="loss, nats a character", points=True)],
        note="Test loss of a character language model. The paper's figures are of TrEMBL and "
        "ImageNet64 and print curves; its numbers (in the config) are of other data.",
    )


def _claims(names: dict[str, str]) -> list[Claim]:
    """The paper's orderings by the rows' short names; softmax stands for itself."""
    lower = [
        ("positive", "trigonometric", "positive features are better than trigonometric ones"),
        ("redraw", "positive", "features that are redrawn are better than one draw"),
        ("relu", "positive", "a ReLU kernel is better than softmax's features (TrEMBL)"),
        ("regularised", "positive", "the regularised kernel is better than softmax's (ImageNet64)"),
        ("relu", "softmax", "a ReLU kernel is better than softmax attention (TrEMBL)"),
    ]

    return [
        Claim(text, below("loss", *(names.get(name, name) for name in (one, other))))
        for one, other, text in lower
    ]
