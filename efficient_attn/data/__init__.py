"""Data sets by name. Everything comes out as numpy; the batches are described in `base.py`."""

from collections.abc import Callable

import numpy as np

from efficient_attn.data import (
    digits,
    image_folder,
    listops,
    matching,
    pathfinder,
    probes,
    text_files,
    text_folder,
    tfds_set,
    translation,
)
from efficient_attn.data.augment import Augmented
from efficient_attn.data.base import (
    Augment,
    Config,
    Dataset,
    Image,
    Info,
    ListOps,
    Matching,
    Pathfinder,
    Probes,
    Source,
    Text,
)
from efficient_attn.data.sources import Arrays
from efficient_attn.errors import UserError, unknown

DATASETS: dict[str, Callable[[Config], Dataset]] = {
    "digits": digits.load,
    "listops": listops.load,
    "matching": matching.load,
    "pathfinder": pathfinder.load,
    "probes": probes.load,
    "tfds": tfds_set.load,
    "text_files": text_files.load,
    "text_folder": text_folder.load,
    "image_folder": image_folder.load,
    "translation": translation.load,
}
DESCRIBED: dict[str, Callable[[Config], Info]] = {
    "listops": listops.describe,
    "pathfinder": pathfinder.describe,
    "probes": probes.describe,
}
"""What is generated, and can be described before it is."""


def load(config: Config) -> Dataset:
    """The data set `config.name`.

    Raises:
        UserError: the name is unknown, or the set cannot be read as asked.
    """
    if config.name not in DATASETS:
        raise unknown("data set", config.name, DATASETS)
    return _augmented(DATASETS[config.name](config), config)


def outline(config: Config) -> Dataset:
    """For what needs no more than shapes: `load`'s description, with an example in "train".

    Of a set that is generated nothing is: the example is blank. Other sets are loaded.

    Raises:
        UserError: as `load`, but for what only generating brings to light.
    """
    if config.name not in DESCRIBED:
        return load(config)
    info = DESCRIBED[config.name](config)
    kind = np.float32 if info.kind == "image" else np.int32
    blank = Arrays(np.zeros((1, *info.shape), kind), np.zeros(1), lambda same: same)
    return _augmented(Dataset(info, {"train": blank}), config)


def _augmented(loaded: Dataset, config: Config) -> Dataset:
    augment = config.augment
    if augment == Augment():
        return loaded
    if loaded.info.kind != "image":
        raise UserError(
            "config.data.augment changes images, and this set gives "
            f"{loaded.info.kind}; leave it out, or set data.image.layout='image'"
        )
    if augment.operations and config.name == "digits":
        raise UserError("RandAugment works on 256 grey levels, digits has 17: set operations=0")
    if not augment.changes:
        return loaded
    train = Augmented(loaded.splits["train"], loaded.info.shape, augment)
    return Dataset(loaded.info, {**loaded.splits, "train": train})


__all__ = [
    "DATASETS",
    "Augment",
    "Config",
    "Dataset",
    "Image",
    "Info",
    "ListOps",
    "Matching",
    "Pathfinder",
    "Probes",
    "Source",
    "Text",
    "load",
    "outline",
]
