r"""Any image classification set of TFDS, or a folder of your own; grey pixels as Long Range Arena.

    python train.py --config=configs/image.py:mnist --workdir=runs/mnist
    python train.py --config=configs/image.py:cifar10 --workdir=runs/cifar10
    python train.py --config=configs/image.py:PATH --workdir=runs/mine
    python train.py --config=configs/image.py:PATH,pixels --workdir=runs/pixels
    python train.py --config=configs/image.py:cifar10,mobilevit_xs --workdir=runs/mobilevit \
        --config.data.image.size=128
    python train.py --config=configs/image.py:cifar10,paper --workdir=runs/lra
    python train.py --config=configs/image.py:cifar10,released --workdir=runs/lra

PATH is a folder that exists, or begins with "/", "." or "~"; it holds train/<class>/*, or MNIST's
four IDX files. Anything else is a set of TFDS, such as emnist/letters. By default a vision
transformer reads patches; with `,pixels` a small encoder reads one grey pixel after the other; with
the name of a published network (`efficient_attn.backbones.names()`) that network does, with the
attention that is its own unless `--config.attention` says otherwise.

"paper" and "released" are Long Range Arena's Image task (arXiv 2011.04006, section 2.2.4), meant
for cifar10: the model of the paper's appendix, or of the code's Transformer; 200 epochs of 45,000
images. Neither has been run here: an accelerator is needed. Published (Table 1): Transformer
42.44 %, Local 41.46, Sparse Transformer 44.24, Longformer 42.22, Linformer 38.56, Reformer 38.07,
Sinkhorn 41.23, Synthesizer 41.61, BigBird 40.83, Linear Transformer 42.34, Performer 42.77.

Traps: the released code has another shape for each mechanism; its Transformer's queries, keys and
values have width 64 where the model has 128 (here 128); it takes black pixels for padding, in the
mechanisms that look at masks at all; its classifier has a hidden layer (here none).
"""

from pathlib import Path

from ml_collections import ConfigDict

from efficient_attn.train import settings
from efficient_attn.train.config import base

PIXELS = {"data": {"image": {"layout": "pixels"}}, "model": {"name": "encoder"}}
LRA = {
    "data": {"batch_size": 256},
    "model": {"pool": "cls", "positions": "learned"},
    "train": {"steps": 35_000, "eval_every": 875},
    "optimizer": {"warmup": 175, "weight_decay": 0.0, "b2": 0.98, "clip": 0.0},
}
SETTINGS = {
    "patches": (
        {
            "data": {"batch_size": 128},
            "model": {"name": "vit", "patch": 4, "width": 128, "depth": 4, "heads": 4},
        },
    ),
    "pixels": (
        PIXELS,
        {"data": {"batch_size": 32}, "model": {"width": 64, "depth": 2, "heads": 4}},
    ),
    "paper": (
        PIXELS,
        LRA,
        {
            "model": {"width": 64, "depth": 3, "heads": 4, "mlp_ratio": 2.0, "dropout": 0.3},
            "optimizer": {"learning_rate": 0.01},
        },
    ),
    "released": (
        PIXELS,
        LRA,
        {
            "model": {"width": 128, "depth": 1, "heads": 8, "mlp_ratio": 1.0, "dropout": 0.3},
            "optimizer": {"learning_rate": 5e-4},
        },
    ),
}


PUBLISHED = {
    "attention": "native",
    "data": {"batch_size": 128, "augment": {"crop": (0.5, 1.0), "flip": 0.5}},
    "train": {"label_smoothing": 0.1},
    "optimizer": {"weight_decay": 0.05},
}


def _published(setting: str) -> bool:
    if setting in SETTINGS or not setting:
        return False
    from efficient_attn.backbones import VARIANTS  # and with it jax, for such settings alone

    return setting in VARIANTS


def get_config(argument: str = "mnist") -> ConfigDict:
    """NAME or PATH, then a setting or a published network, "patches" by default."""
    name, _, setting = argument.partition(",")
    folder = Path(name).is_dir() or name.startswith(("/", ".", "~"))
    config = base()
    config.data.name = "image_folder" if folder else "tfds"
    config.data.path = name if folder else ""
    config.data.tfds = "" if folder else name
    config.model = ConfigDict()
    config.train.update({"steps": 5000, "eval_every": 500})
    config.optimizer.update({"learning_rate": 1e-3, "warmup": 200})
    if _published(setting):
        config.update(PUBLISHED)
        config.model.name = setting
    else:
        settings.apply(config, setting or "patches", SETTINGS, where="configs/image.py")
    return config
