r"""What mixes the places in PoolFormer: nothing, pooling, attention (table 5).

    python -m efficient_attn.tools.ablate \
        --config=configs/ablations/poolformer_mixers.py:PATH --seeds=3

"MetaFormer Is Actually What You Need for Vision" (arXiv 2111.11418, table 5) puts other mixers into
PoolFormer-S12: the identity, pooling over 3, 5 and 7 places, and attention in the last two stages.
PATH is a folder with train/<class>/*, or a set of TFDS; cifar10 unless given.

Scales: "small" has four stages of 1, 1, 2, 1 blocks of width 32 to 128 on images of 64 x 64 and
1,000 steps of 64, 2 to 4 minutes a row on two CPU cores; "paper" PoolFormer-S12 on ImageNet by
DeiT's recipe (`configs/imagenet.py`).

Expect: pooling before the identity, and attention in the last stages before pooling everywhere.

Traps: a summary of the paper prints 78.1 for average pooling; that is the depthwise convolution,
which no expression names here, and the frozen random matrix neither: both are left out. The paper's
identity adds the normed input once more, `pool(size=1)` adds nothing: neither mixes places. "About
equal" is what the paper says of sizes 5 and 7. Factors of each branch begin with 0.1 at small (the
paper's 1e-5 is for 300 epochs).
"""

from configs.image import get_config as image
from configs.imagenet import get_config as imagenet
from efficient_attn.tools.ablate import (
    Claim,
    Column,
    Panel,
    Scale,
    Sweep,
    Training,
    drawn_at_smoke,
    published_of,
)
from efficient_attn.tools.ablate.claims import above

SHAPES = {
    "smoke": ((1, 16), (1, 16)),
    "small": ((1, 32), (1, 64), (2, 96), (1, 128)),
    "paper": ((2, 64), (2, 128), (6, 320), (2, 512)),
}
"""Depth and width of each stage."""
HEAD = {"smoke": 16, "small": 32, "paper": 32}
HYBRID = "pool, pool, softmax, softmax"
PUBLISHED = {"pool(size=1)": 0.743, "pool": 0.772, HYBRID: 0.810}
MIXERS = ("pool(size=1)", "pool", "pool(size=5)", "pool(size=7)")


def get_sweep(scale: Scale, argument: str = "cifar10") -> Sweep:
    """One mixer everywhere, or one for each stage."""
    if scale == "paper":
        config = imagenet("poolformer_s12")
    else:
        config = image(f"{argument},poolformer_s12")
        config.model.update({"stages": _stages(scale, "pool", "pool"), "layer_scale": 0.1})
        config.data.image.size = 64
        config.data.batch_size = 64
        config.train.update({"steps": 1000, "eval_every": 250})
    rows = [(mixer, {"attention": mixer}) for mixer in MIXERS]
    rows.append((HYBRID, {"model.stages": _stages(scale, "pool", "softmax")}))
    if scale == "small":
        rows.append(("softmax", {"attention": "softmax"}))
    if scale == "smoke":
        drawn_at_smoke(config, size=32)
        rows = rows[-1:]
    return Sweep(
        title="Mixers in PoolFormer",
        source="MetaFormer, arXiv 2111.11418, table 5",
        rows=rows,
        runner=Training(config, count=True),
        columns=[
            Column("accuracy", "top-1, %", 100),
            Column("parameters", "parameters"),
            Column("multiply_adds", "multiply-adds"),
            Column("steps_per_second", "steps/s", digits=3),
        ],
        published=published_of(rows, "accuracy", PUBLISHED),
        claims=[
            Claim(
                "pooling is better than no mixing",
                above("accuracy", "pool", "pool(size=1)"),
            ),
            Claim(
                "pooling over 3, 5 and 7 places is about equal (within 1 point)",
                lambda r: (
                    max(r.mean(label, "accuracy") for label in MIXERS[1:])
                    - min(r.mean(label, "accuracy") for label in MIXERS[1:])
                    <= 0.01
                ),
            ),
            Claim(
                "attention in the last two stages is better than pooling everywhere",
                above("accuracy", HYBRID, "pool"),
            ),
        ],
        panels=[Panel(y="accuracy", ylabel="top-1 accuracy", points=True)],
        note="The published accuracies are of PoolFormer-S12 on ImageNet. `pool(size=1)` stands "
        "for the identity: places are not mixed.",
    )


def _stages(scale: Scale, early: str, late: str) -> tuple[dict, ...]:
    """The stages, with one mixer in the first half of them and one in the second."""
    shapes = SHAPES[scale]
    return tuple(
        {
            "depth": depth, "width": width, "heads": width // HEAD[scale],
            "mixer": early if 2 * i < len(shapes) else late,
        }
        for i, (depth, width) in enumerate(shapes)
    )  # fmt: skip
