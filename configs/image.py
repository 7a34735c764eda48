"""A vision transformer on any image classification set of TFDS, or on a folder of your own.

    python train.py --config=configs/image.py:mnist --workdir=runs/mnist
    python train.py --config=configs/image.py:cifar10 --workdir=runs/cifar10
    python train.py --config=configs/image.py:PATH --workdir=runs/mine

PATH holds train/<class>/*, or MNIST's four IDX files. `--config.data.image.layout=pixels
--config.model.name=encoder` (and the model options of the encoder) reads an image pixel by pixel.
"""

from ml_collections import ConfigDict

from efficient_attn.train.config import base


def get_config(name: str = "mnist") -> ConfigDict:
    """Patches of 4 x 4 pixels, 4 layers of width 128."""
    config = base()
    folder = "/" in name and name.startswith((".", "/", "~"))
    config.data.name = "image_folder" if folder else "tfds"
    config.data.path = name if folder else ""
    config.data.tfds = "" if folder else name
    config.data.batch_size = 128
    config.model = ConfigDict(
        {"name": "vit", "patch": 4, "width": 128, "depth": 4, "heads": 4, "dropout": 0.1}
    )
    config.train.update({"steps": 5000, "eval_every": 500})
    config.optimizer.update({"learning_rate": 1e-3, "warmup": 200})
    return config
