"""Pathfinder: are two circles joined by a dashed curve? (arXiv 2011.04006, section 2.2.5.)

    python train.py --config=configs/pathfinder.py --workdir=runs/path              # small
    python train.py --config=configs/pathfinder.py:32,paper --workdir=runs/path
    python train.py --config=configs/pathfinder.py:32,released --workdir=runs/path
    python train.py --config=configs/pathfinder.py:128,released --workdir=runs/path_x

After the colon stands the image size, 32 (Long Range Arena's Pathfinder), 64, 128 (its Path-X) or
256, and after a comma the setting. The images are drawn on first use: 200,000 take 45 minutes of
one core at 32 x 32 and 6 hours (and 3.3 GB of memory and, until all is done, twice that of disk)
at 128 x 128, on several cores at once; a run that is killed goes on drawing where it stopped.

"small" has 40,000 images of shorter curves without distractors, for trying things out. "paper" is
the model of the paper's appendix, which does not tell the sizes apart, "released" that of the
code's Transformer, another one for each size. Both have the code's batch and positions of the size
and 200 epochs, 100 at 256. They have not been run here: an accelerator is needed. Published
(Table 1): Transformer 71.40 %, Local 66.63, Sparse Transformer 71.71, Longformer 69.71, Linformer
76.34, Reformer 68.50, Sinkhorn 67.45, Synthesizer 69.45, BigBird 74.87, Linear Transformer 75.30,
Performer 77.05; on Path-X all of them fail (50 %).

Traps: the released code has another shape for each mechanism (Linformer 1 layer and 2 heads, Linear
Transformer 1 layer of width 128, Reformer 2 of width 64), and by its authors' word (issue 37) the
Performer of the table had 1 layer of width 128 with 8 heads, not the 4 of its config; queries, keys
and values have half the width there at 32 and 128 (here the whole, as at 64 and 256); it takes
black pixels for padding; its classifier has a hidden layer (here none). Of the images, see
`efficient_attn/data/pathfinder.py`.
"""

import dataclasses

from ml_collections import ConfigDict

from efficient_attn.data.pathfinder import PRESETS
from efficient_attn.errors import unknown
from efficient_attn.train import settings
from efficient_attn.train.config import base

IMAGES = 160_000
SIZES = {
    # batch, epochs, positions
    "32": (512, 200, "sinusoidal"),
    "64": (256, 200, "learned"),
    "128": (64, 200, "learned"),
    "256": (32, 100, "learned"),
}
RELEASED = {
    "32": {"model": {"depth": 4, "heads": 4, "pool": "mean", "dropout": 0.2}},
    "64": {"model": {"depth": 2, "heads": 4, "pool": "cls", "dropout": 0.1}},
    "128": {
        "model": {"depth": 1, "heads": 2, "pool": "mean", "dropout": 0.1},
        "optimizer": {"clip": 1.0},
    },
    "256": {"model": {"depth": 2, "heads": 4, "pool": "cls", "dropout": 0.1}},
}
LRA = {"optimizer": {"weight_decay": 0.0, "b2": 0.98, "clip": 0.0}}
SETTINGS = {
    "small": (
        {
            "data": {
                "batch_size": 64,
                "pathfinder": {
                    "dashes": 6, "distractors": 0,
                    "train": 40_000, "validation": 2000, "test": 2000,
                },
            },
            "model": {"width": 64, "depth": 2, "heads": 4, "mlp_ratio": 2.0, "dropout": 0.0},
            "train": {"steps": 5000, "eval_every": 500},
            "optimizer": {"learning_rate": 1e-3, "warmup": 200},
        },
    ),
    "paper": (
        LRA,
        {
            "model": {
                "width": 128, "depth": 4, "heads": 8, "mlp_ratio": 1.0,
                "pool": "mean", "dropout": 0.2,
            },
            "optimizer": {"learning_rate": 0.01},
        },
    ),
    "released": (
        LRA,
        {"model": {"width": 32, "mlp_ratio": 1.0}, "optimizer": {"learning_rate": 1e-3}},
    ),
}  # fmt: skip


def get_config(argument: str = "32") -> ConfigDict:
    """The size, then a setting, "small" by default."""
    size, _, setting = argument.partition(",")
    if size not in PRESETS:
        raise unknown("size of configs/pathfinder.py", size, PRESETS)
    setting = setting or "small"
    batch, epochs, positions = SIZES[size]
    config = base()
    config.data.name = "pathfinder"
    config.data.pathfinder = ConfigDict(dataclasses.asdict(PRESETS[size]))
    config.data.image.layout = "pixels"
    config.data.batch_size = batch
    config.model = ConfigDict({"name": "encoder", "positions": positions})
    epoch = IMAGES // batch
    config.train.update({"steps": epochs * epoch, "eval_every": epoch, "eval_batch_size": 64})
    config.optimizer.warmup = epoch
    settings.apply(config, setting, SETTINGS, where="configs/pathfinder.py")
    if setting == "released":
        config.update(RELEASED[size])
    return config
