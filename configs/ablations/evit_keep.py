r"""EViT's keep rate: fewer patches, fewer operations, how much accuracy (its README's table).

    python -m efficient_attn.tools.ablate --config=configs/ablations/evit_keep.py:PATH --seeds=3

"Not All Patches are What You Need" (EViT, arXiv 2202.07800) keeps in three layers the patches that
the class token looks at most and fuses the others into one token. The released README has DeiT-S
at five rates with fusion, and without. PATH is a folder with train/<class>/*, or a set of TFDS;
cifar10 unless given.

Scales: "small" has a transformer of 6 layers of width 64 on 64 patches, which drops in layers 2, 3
and 5, and 1,000 steps of 64, a quarter of an hour a row on a CPU core; "paper" EViT-DeiT-S on
ImageNet by DeiT's recipe (`configs/imagenet.py`), 300 epochs from scratch.

Expect: multiply-adds as 4.6, 3.0 and 2.3 of DeiT-S at 1, 0.7 and 0.5; accuracy falls slowly.

Traps: the survey that this project follows prints the rows of 0.5 and 0.7 exchanged. The paper
lowers the rate while it trains, here it stays.
"""

from configs.image import get_config as image
from configs.imagenet import get_config as imagenet
from efficient_attn.tools.ablate import (
    Claim,
    Column,
    Panel,
    Results,
    Scale,
    Sweep,
    Training,
    drawn_at_smoke,
    published_of,
)
from efficient_attn.tools.ablate.claims import above, not_below

FUSED = {1.0: 0.799, 0.9: 0.798, 0.8: 0.798, 0.7: 0.795, 0.6: 0.789, 0.5: 0.785}
DROPPED = {0.9: 0.799, 0.8: 0.797, 0.7: 0.794, 0.6: 0.791, 0.5: 0.784}
RATES = {"smoke": (0.5,), "small": (1.0, 0.9, 0.7, 0.5), "paper": tuple(FUSED)}
SMALL = {"width": 64, "depth": 6, "heads": 2, "patch": 4, "layers": (2, 3, 5)}


def get_sweep(scale: Scale, argument: str = "cifar10") -> Sweep:
    """The rates with fusion, then without."""
    if scale == "paper":
        config = imagenet("evit_small")
    else:
        config = image(f"{argument},evit_small")
        config.model.update(SMALL)
        config.data.image.size = 32
        config.data.batch_size = 64
        config.train.update({"steps": 1000, "eval_every": 250})
    if scale == "smoke":
        drawn_at_smoke(config, size=32)
        config.model.update({"depth": 1, "heads": 2, "patch": 8, "layers": (1,)})
    fused = {rate: {"model.keep_rate": rate, "model.rest": "fuse"} for rate in RATES[scale]}
    dropped = {
        rate: {"model.keep_rate": rate, "model.rest": "drop"} for rate in RATES[scale] if rate < 1
    }
    rows = [(_label(rate), overrides) for rate, overrides in fused.items()]
    rows += [(_label(rate, "drop"), overrides) for rate, overrides in dropped.items()]
    published = {_label(rate): FUSED[rate] for rate in fused}
    published |= {_label(rate, "drop"): DROPPED[rate] for rate in dropped}
    return Sweep(
        title="EViT's keep rate",
        source="EViT, arXiv 2202.07800, the table of its repository's README",
        rows=rows,
        runner=Training(config, count=True),
        columns=[
            Column("accuracy", "top-1, %", 100),
            Column("multiply_adds", "multiply-adds"),
            Column("steps_per_second", "steps/s", digits=3),
        ],
        published=published_of(rows, "accuracy", published),
        claims=[
            Claim(
                "keeping 0.7 costs at most half a point",
                lambda r: (
                    r.mean(_label(0.7), "accuracy") >= r.mean(_label(1.0), "accuracy") - 0.005
                ),
            ),
            Claim(
                "accuracy falls from 0.9 to 0.7 to 0.5",
                not_below("accuracy", *(_label(rate) for rate in (0.9, 0.7, 0.5))),
            ),
            Claim("at 0.7 and 0.5 fusing the others is better than dropping them", _fusing_helps),
        ],
        panels=[
            Panel(
                x="multiply_adds", y="accuracy", by=("model.rest",), xlabel="multiply-adds",
                ylabel="top-1 accuracy",
            )
        ],
        note="The published accuracies are of EViT-DeiT-S on ImageNet, fine-tuned from DeiT's "
        "weights; ours are trained from scratch.",
    )  # fmt: skip


def _label(rate: float, rest: str = "fuse") -> str:
    return f"keep {rate:g}" + (", drop" if rest == "drop" else "")


def _fusing_helps(results: Results) -> bool:
    return all(
        above("accuracy", _label(rate), _label(rate, "drop"))(results) for rate in (0.7, 0.5)
    )
