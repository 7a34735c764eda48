"""Any image classification set of TFDS, or a folder of your own.

    python train.py --config=configs/image.py:mnist --workdir=runs/mnist
    python train.py --config=configs/image.py:cifar10 --workdir=runs/cifar10
    python train.py --config=configs/image.py:PATH --workdir=runs/mine
    python train.py --config=configs/image.py:PATH,pixels --workdir=runs/pixels

PATH, with a slash in it, holds train/<class>/*, or MNIST's four IDX files. By default a vision
transformer reads patches; with `,pixels` an encoder reads one grey pixel after the other.
"""

from ml_collections import ConfigDict

from efficient_attn.errors import unknown
from efficient_attn.train.config import base

MODELS = {
    "patches": {"name": "vit", "patch": 4, "width": 128, "depth": 4, "heads": 4},
    "pixels": {"name": "encoder", "width": 64, "depth": 2, "heads": 4},
}


def get_config(argument: str = "mnist") -> ConfigDict:
    """NAME or PATH, then patches (by default) or pixels."""
    name, _, layout = argument.partition(",")
    layout = layout or "patches"
    if layout not in MODELS:
        raise unknown("layout of configs/image.py", layout, MODELS)
    folder = "/" in name
    config = base()
    config.data.name = "image_folder" if folder else "tfds"
    config.data.path = name if folder else ""
    config.data.tfds = "" if folder else name
    config.data.image.layout = "pixels" if layout == "pixels" else "image"
    config.data.batch_size = 32 if layout == "pixels" else 128
    config.model = ConfigDict(MODELS[layout])
    config.train.update({"steps": 5000, "eval_every": 500})
    config.optimizer.update({"learning_rate": 1e-3, "warmup": 200})
    return config
