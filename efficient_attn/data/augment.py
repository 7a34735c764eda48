"""Images changed at random for training: crop, flip, RandAugment, erasing.

Pillow, which reads the images, has RandAugment's operations; what is here chooses among them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps

from efficient_attn.data.base import Augment, Batch
from efficient_attn.data.images import resize, to_pil
from efficient_attn.data.sources import Finish

Random = np.random.RandomState  # its stream is the same in every numpy (NEP 19)
Picture = PIL.Image.Image

PROPORTIONS = 3 / 4, 4 / 3
ERASED = 0.02, 1 / 3
GREY = 128
SHIFT = 0.45  # largest translation, in sides
TRIES = 10


class Images(Protocol):
    """A source of images whose examples can be had as they are kept."""

    fit: Finish
    finish: Finish

    def __len__(self) -> int: ...
    def gather(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these examples."""
        ...

    def original(self, index: int) -> tuple[np.ndarray, int] | None:
        """Bytes [h, w, C] and the label; None where the example is left out of account."""
        ...


class Augmented:
    """A source of which training (`draw`) sees each image changed, another way each time.

    What happens to an example is decided by the seed and its number in the run, whatever else is
    in its batch.
    """

    def __init__(self, source: Any, shape: tuple[int, ...], options: Augment):
        self.source: Images = source
        self.shape, self.options = shape, options

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[index]  # type: ignore[index]

    def gather(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these examples as they are."""
        return self.source.gather(indices)

    def draw(self, indices: np.ndarray, *, numbers: np.ndarray, seed: int) -> Batch:
        """The batch of these examples, changed as the seed and the numbers decide."""
        inputs = np.zeros((len(indices), *self.shape), np.uint8)
        label = np.zeros(len(indices), np.int32)
        weight = np.zeros(len(indices), np.float32)
        randoms = [np.random.RandomState([seed, int(n)]) for n in numbers]
        for row, index in enumerate(indices):
            found = self.source.original(int(index))
            if found is not None:
                pixels, label[row] = found
                inputs[row] = self._change(pixels, randoms[row])
                weight[row] = 1
        floats = self.source.finish(inputs)
        for row, random in enumerate(randoms):
            if random.random_sample() < self.options.erase:
                erase(floats[row], random)
        return {"inputs": floats, "label": label, "weight": weight}

    def _change(self, pixels: np.ndarray, random: Random) -> np.ndarray:
        options = self.options
        if options.crop:
            pixels = crop(pixels, options.crop, random)
            pixels = resize(pixels, (self.shape[0], self.shape[1]))
        else:
            pixels = self.source.fit(pixels)
        if random.random_sample() < options.flip:
            pixels = pixels[:, ::-1]
        if options.operations:
            pixels = rand_augment(pixels, options, random)
        return pixels


def crop(pixels: np.ndarray, area: tuple[float, ...], random: Random) -> np.ndarray:
    """A part of the image (1409.4842, section 6): its share of the area, and log of its
    proportions, uniform; the largest in the middle that has such proportions if none fits.
    """
    box = _box(pixels.shape[:2], area, random) or _middle(pixels.shape[:2])
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


def _box(shape, area: Sequence[float], random: Random, proportions=PROPORTIONS):
    """(top, left, height, width), or None where `TRIES` gave none that fits."""
    low, high = (math.log(p) for p in proportions)
    for _ in range(TRIES):
        size = random.uniform(area[0], area[1]) * shape[0] * shape[1]
        ratio = math.exp(random.uniform(low, high))
        height, width = round(math.sqrt(size / ratio)), round(math.sqrt(size * ratio))
        if 0 < height <= shape[0] and 0 < width <= shape[1]:
            top = random.randint(shape[0] - height + 1)
            left = random.randint(shape[1] - width + 1)
            return top, left, height, width
    return None


def _middle(shape):
    height, width = shape
    least, most = PROPORTIONS
    height, width = min(height, round(width / least)), min(width, round(height * most))
    return (shape[0] - height) // 2, (shape[1] - width) // 2, height, width


def erase(image: np.ndarray, random: Random) -> None:
    """Fill a random rectangle of the floats [H, W, C] with standard normal noise, in place."""
    box = _box(image.shape[:2], ERASED, random, (0.3, 1 / 0.3))
    if box:
        top, left, height, width = box
        noise = random.standard_normal((height, width, image.shape[2]))
        image[top : top + height, left : left + width] = noise


def rand_augment(pixels: np.ndarray, options: Augment, random: Random) -> np.ndarray:
    """`options.operations` draws from `OPERATIONS`, each applied with probability 1/2."""
    picture = to_pil(np.ascontiguousarray(pixels))
    names = random.choice(list(OPERATIONS), options.operations)
    for name in names:
        if random.random_sample() < 0.5:
            level = random.normal(options.magnitude, options.deviation)
            level = min(max(level, 0.0), 10.0) / 10
            sign = 1 if random.random_sample() < 0.5 else -1
            picture = OPERATIONS[str(name)](picture, level, sign)
    return np.asarray(picture).reshape(pixels.shape)


Row = tuple[float, float, float]
STILL_X, STILL_Y = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


def _affine(picture: Picture, x: Row = STILL_X, y: Row = STILL_Y) -> Picture:
    return picture.transform(
        picture.size, PIL.Image.Transform.AFFINE, (*x, *y),
        resample=PIL.Image.Resampling.BILINEAR, fillcolor=_grey(picture),
    )  # fmt: skip


def _grey(picture: Picture):
    return GREY if picture.mode == "L" else (GREY,) * 3


def _rotate(picture: Picture, level: float, sign: int) -> Picture:
    how = PIL.Image.Resampling.BILINEAR
    return picture.rotate(30 * level * sign, resample=how, fillcolor=_grey(picture))


def _enhance(kind: Any) -> "Operation":
    return lambda picture, level, sign: kind(picture).enhance(1 + 0.9 * level * sign)


def _brighten_below(picture: Picture, level: float, sign: int) -> Picture:
    """SolarizeAdd: what is darker than the middle becomes brighter."""
    added = int(110 * level)
    table = [min(255, i + added) if i < 128 else i for i in range(256)]
    return picture.point(table * len(picture.getbands()))


Operation = Callable[[Picture, float, int], Picture]
OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda picture, level, sign: PIL.ImageOps.autocontrast(picture),
    "equalize": lambda picture, level, sign: PIL.ImageOps.equalize(picture),
    "invert": lambda picture, level, sign: PIL.ImageOps.invert(picture),
    "rotate": _rotate,
    "posterize": lambda picture, level, sign: PIL.ImageOps.posterize(
        picture, max(4 - int(4 * level), 1)
    ),
    "solarize": lambda picture, level, sign: PIL.ImageOps.solarize(picture, 256 - int(256 * level)),
    "solarize_add": _brighten_below,
    "color": _enhance(PIL.ImageEnhance.Color),
    "contrast": _enhance(PIL.ImageEnhance.Contrast),
    "brightness": _enhance(PIL.ImageEnhance.Brightness),
    "sharpness": _enhance(PIL.ImageEnhance.Sharpness),
    "shear_x": lambda picture, level, sign: _affine(picture, x=(1.0, 0.3 * level * sign, 0.0)),
    "shear_y": lambda picture, level, sign: _affine(picture, y=(0.3 * level * sign, 1.0, 0.0)),
    "translate_x": lambda picture, level, sign: _affine(
        picture, x=(1.0, 0.0, SHIFT * level * sign * picture.width)
    ),
    "translate_y": lambda picture, level, sign: _affine(
        picture, y=(0.0, 1.0, SHIFT * level * sign * picture.height)
    ),
}
"""RandAugment's operations by name: (picture, strength in [0, 1], +1 or -1) -> picture. All grow
with the strength, as in the recipe of DeiT ("rand-m9-mstd0.5-inc1"), whose ranges these are."""
