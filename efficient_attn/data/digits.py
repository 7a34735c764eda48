"""`digits`: the 1,797 handwritten digits that come with scikit-learn, 8 x 8 grey, 10 classes."""

from dataclasses import replace

import numpy as np

from efficient_attn.data import images
from efficient_attn.data.base import Config, Dataset
from efficient_attn.data.sources import Arrays, complete
from efficient_attn.errors import UserError

TEST_FRACTION = 0.2


def load(config: Config) -> Dataset:
    """The embedded set: nothing to download.

    Test is 359 images: 20 % of each class, drawn with a fixed seed, the same for every `config`.
    Validation is `config.validation` of each class of the other 1,438, drawn with `config.seed`.
    Writers are not told apart (scikit-learn does not say who wrote what), so they occur in all
    splits, and accuracies are higher than where the test writers are unseen.

    Raises:
        UserError: `config.image.size` is neither 0 nor 8.
    """
    from sklearn.datasets import load_digits

    if config.image.size not in (0, 8):
        raise UserError(f"digits is 8 x 8: image.size must be 0 or 8, not {config.image.size}")
    flat, labels = load_digits(return_X_y=True)
    pixels = flat.astype(np.uint8).reshape(-1, 8, 8, 1)
    whole = Arrays(pixels, labels, images.finish(config.image, peak=16))
    splits, about = complete({"train": whole}, replace(config, test=TEST_FRACTION))
    names = tuple(map(str, range(10)))
    return Dataset(images.info(config.image, shape=(8, 8, 1), labels=names, about=about), splits)
