r"""MobileViT's patch size (table 6).

    python -m efficient_attn.tools.ablate \
        --config=configs/ablations/mobilevit_patch.py:PATH --seeds=3

"MobileViT" (arXiv 2110.02178, table 6) tiles its three maps with patches of 2, 3 or 4 places a
side: a transformer sees one place of every patch, so larger patches mean shorter sequences, faster
and less accurate. PATH is a folder with train/<class>/*, or a set of TFDS; cifar10 unless given.

Scales: "small" has a MobileViT of two transformers on maps of 16 and 8 places, images of 32 x 32
and 1,000 steps of 64, 10 to 25 minutes a row on a CPU core; "paper" MobileViT-S on ImageNet by
DeiT's recipe (`configs/imagenet.py`) at 256 x 256.

Traps: of the paper's rows 3, 3, 3 needs maps that 3 divides, and 8, 4, 2 a size for each map, which
`model.patch` does not say; both are left out. A patch of 1, all
places in one sequence, is not in the paper. The published accuracies are of ImageNet.
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

STAGES = (
    {"width": 16, "stride": 1},
    {"width": 32, "stride": 1, "inner": 48, "layers": 2},
    {"width": 48, "stride": 2, "inner": 64, "layers": 2},
)
PUBLISHED = {"patch 2": 0.784, "patch 4": 0.776}
PATCHES = {"smoke": (2,), "small": (1, 2, 4, 8), "paper": (2, 4)}


def get_sweep(scale: Scale, argument: str = "cifar10") -> Sweep:
    """A row for each side of a patch."""
    if scale == "paper":
        config = imagenet("mobilevit_s")
        config.data.image.size = 256
    else:
        config = image(f"{argument},mobilevit_xxs")
        config.model.update({"stages": STAGES, "last": 128})
        config.data.image.size = 32
        config.data.batch_size = 64
        config.train.update({"steps": 1000, "eval_every": 250})
    if scale == "smoke":
        drawn_at_smoke(config, size=32)
        config.model.update({"stages": (STAGES[1] | {"layers": 1, "inner": 16},), "last": 0})
    rows = [(f"patch {patch}", {"model.patch": patch}) for patch in PATCHES[scale]]
    return Sweep(
        title="MobileViT's patch size",
        source="MobileViT, arXiv 2110.02178, table 6",
        rows=rows,
        runner=Training(config, count=True),
        columns=[
            Column("accuracy", "top-1, %", 100),
            Column("multiply_adds", "multiply-adds"),
            Column("steps_per_second", "steps/s", digits=3),
        ],
        published=published_of(rows, "accuracy", PUBLISHED),
        claims=[
            Claim(
                "patches of 2 are more accurate than patches of 4",
                above("accuracy", "patch 2", "patch 4"),
            ),
            Claim(
                "patches of 4 are faster than patches of 2",
                above("steps_per_second", "patch 4", "patch 2"),
            ),
        ],
        panels=[Panel(x="model.patch", y="accuracy", log="x", xlabel="side of a patch")],
        note="The published accuracies are of MobileViT-S on ImageNet; at small ours are of a "
        "network a tenth as large. Patch 1 is ours.",
    )
