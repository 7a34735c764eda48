"""Data sets by name. Everything comes out as numpy; the batches are described in `base.py`."""

from collections.abc import Callable

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


def load(config: Config) -> Dataset:
    """The data set `config.name`.

    Raises:
        UserError: the name is unknown, or the set cannot be read as asked.
    """
    if config.name not in DATASETS:
        raise unknown("data set", config.name, DATASETS)
    loaded, augment = DATASETS[config.name](config), config.augment
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
]
