r"""Four light vision transformers, and other attention inside MobileViT.

    python -m efficient_attn.tools.ablate --config=configs/ablations/vit_swaps.py:PATH

The networks of MobileViT (arXiv 2110.02178), MobileViT V2 (2206.02680), LeViT (2104.01136) and
Mobile-Former (2108.05895) on one image set, and MobileViT-XXS with three linear mechanisms in the
place of its softmax. PATH is a folder with train/<class>/*, or a set of TFDS; cifar10 unless given.

Scales: "small" has images of 64 x 64, of which the four take 21 to 32 million multiply-adds,
batches of 64 and 1,000 steps, 10 to 25 minutes a row on two CPU cores; "paper" ImageNet by DeiT's
recipe (`configs/imagenet.py`), the published sizes.

Expect at small: networks of so few steps come in another order than on ImageNet.

Traps: the published accuracies are of ImageNet and of each paper's own recipe. LeViT's is with a
teacher, ours is not. That Linformer costs MobileViT 0.2 points is quoted from memory.
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

PUBLISHED = {
    "mobilevit_xxs": 0.690, "mobilevitv2_050": 0.7018, "levit_128s": 0.766,
    "mobile_former_151m": 0.752,
}  # fmt: skip
SWAPS = ("performer", "linear", "linformer")


def get_sweep(scale: Scale, argument: str = "cifar10") -> Sweep:
    """The networks as they are, then the swaps."""
    rows = [(name, {"model": {"name": name}}) for name in PUBLISHED]
    rows += [(f"mobilevit_xxs, {swap}", {"attention": swap}) for swap in SWAPS]
    if scale == "paper":
        config = imagenet("mobilevit_xxs")
        for _, overrides in rows[:2]:
            overrides["data.image.size"] = 256
        for _, overrides in rows[len(PUBLISHED) :]:
            overrides["data.image.size"] = 256
    else:
        config = image(f"{argument},mobilevit_xxs")
        config.data.image.size = 64
        config.data.batch_size = 64
        config.train.update({"steps": 1000, "eval_every": 250, "log_every": 50})
    if scale == "smoke":
        drawn_at_smoke(config, size=64)
        rows = [("mobilevit_xxs, linformer", {"attention": "linformer", "model": SMALLEST})]
    return Sweep(
        title="Light vision transformers, and attention swapped inside MobileViT",
        source="MobileViT, arXiv 2110.02178; V2, 2206.02680; LeViT, 2104.01136; Mobile-Former, "
        "2108.05895",
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
                "order: LeViT-128S, Mobile-Former-151M, MobileViT V2-0.5, MobileViT-XXS",
                above("accuracy", *sorted(PUBLISHED, key=lambda name: -PUBLISHED[name])),
            ),
            Claim(
                "Linformer inside MobileViT costs little (0.2 points there; here within 1)",
                lambda r: (
                    r.mean("mobilevit_xxs, linformer", "accuracy")
                    >= r.mean("mobilevit_xxs", "accuracy") - 0.01
                ),
            ),
        ],
        panels=[Panel(y="accuracy", ylabel="top-1 accuracy")],
        note="The published accuracies are of ImageNet at full size and 300 to 1,000 epochs; they "
        "stand here for their order.",
    )


SMALLEST = {
    "name": "mobilevit_xxs",
    "stages": ({"width": 8, "stride": 4}, {"width": 8, "inner": 8, "layers": 1}),
}
"""Of the family, one transformer after two convolutions."""
