r"""Attention matrices are nearly of low rank: their singular values in a trained model.

Wang et al. 2020 (arXiv 2006.04768), figure 1.

    python -m efficient_attn.tools.ablate --config=configs/ablations/linformer_spectrum.py:PATH

PATH is a text file or a folder of .txt files, this repository's README.md unless given. The paper
looks into RoBERTa at n = 512; here a masked language model of characters is trained first: at
"small" 4 layers of width 64 on contexts of 128, 1,000 steps, two minutes on two free CPU cores;
"paper" has RoBERTa-base's shape on 512 byte-pair tokens. Expect a long tail, and in the paper's
model a longer one in higher layers; at small so few steps teach it hardly anything, and the model
before them has the same tail.
"""

import numpy as np

from configs.mlm import get_config as mlm
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
from efficient_attn.tools.measures.spectrum import spectrum

TRAINED, FRESH = "softmax", "softmax, 1 step"


def get_sweep(scale: Scale, argument: str = "README.md") -> Sweep:
    """The trained model, and the same after one step."""
    config = mlm(argument)
    if scale == "paper":
        config.data.text.update({"max_len": 512, "vocab": 50_000})
        config.data.batch_size = 256
        config.model.update({"width": 768, "depth": 12, "heads": 12})
        config.train.update({"steps": 250_000, "eval_every": 5000})
        config.optimizer.update({"warmup": 10_000, "learning_rate": 6e-4})
    else:
        config.data.text.tokenizer = "chars"
        config.model.update({"width": 64, "dropout": 0.0})
        config.train.update({"steps": 1000, "eval_every": 500})
        config.optimizer.update({"warmup": 100, "learning_rate": 2e-3})
    fresh = {"train.steps": 1, "train.eval_every": 1, "optimizer.warmup": 0}
    if scale == "smoke":
        at_smoke(config).data.text.max_len = 16
    return Sweep(
        title="Linformer: the spectrum of attention matrices",
        source="Linformer, arXiv 2006.04768, figure 1",
        rows=[(TRAINED, {}), (FRESH, fresh)][: 1 if scale == "smoke" else 2],
        runner=Training(config, after=spectrum),
        columns=[
            Column("quarter", "share of the first quarter, %", 100),
            Column("lower_quarter", "lower layers", 100),
            Column("upper_quarter", "upper layers", 100),
            Column("rank_90", "singular values for 90 %, % of n", 100),
            Column("loss", "test loss, nats"),
        ],
        claims=CLAIMS,
        panels=[
            Panel(draw=curves, title="cumulative singular values, mean of heads"),
            Panel(draw=heads, title="at a quarter of n, trained"),
        ],
        note=(
            "The figure prints no numbers; its words are the claims. Sums of the largest singular "
            "values over the sum of all, of softmax(Q K^T / sqrt(D)), the mean over 16 test "
            "contexts. `1 step` is the same model before it has learnt anything. Where it shows "
            "the same, the low rank is that of the heads, whose scores have rank D at most (16 of "
            "128 at small, 64 of 512 in the paper), and nothing that was learnt."
        ),
    )


def curves(results: Results, axes) -> None:
    """One line a layer; dashed before training."""
    for label, style in ((TRAINED, "-"), (FRESH, "--")):
        if not results.values(label, "by_layer"):
            continue
        layers = results.mean(label, "by_layer")
        for layer, values in enumerate(layers):
            index = np.arange(1, len(values) + 1)
            name = f"layer {layer + 1}" if label == TRAINED else None
            axes.plot(index, values, style, color=f"C{layer % 10}", lw=1.2, label=name)
    axes.set(
        xlabel="number of largest singular values", ylabel="share of their sum", ylim=(0, 1.02)
    )
    axes.legend(title="dashed: 1 step", loc="lower right")


def heads(results: Results, axes) -> None:
    """Layers down, heads across."""
    values = results.mean(TRAINED, "by_head")
    image = axes.imshow(values, cmap="viridis", aspect="auto", vmin=0, vmax=1)
    for (layer, head), value in np.ndenumerate(values):
        axes.text(head, layer, f"{value:.2f}", ha="center", va="center", color="w", fontsize=8)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
    axes.set_yticks(range(values.shape[0]), range(1, values.shape[0] + 1))
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes)


CLAIMS = [
    Claim(
        "a long tail: the first quarter of the singular values has over three quarters of the sum",
        lambda r: r.mean(TRAINED, "quarter") > 0.75,
    ),
    Claim(
        "in every head of every layer over half of the sum",
        lambda r: bool((r.mean(TRAINED, "by_head") > 0.5).all()),
    ),
    Claim(
        "higher layers are more skewed than lower ones",
        lambda r: r.mean(TRAINED, "upper_quarter") > r.mean(TRAINED, "lower_quarter"),
    ),
]
