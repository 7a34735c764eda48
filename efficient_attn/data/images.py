"""From image files to bytes, from bytes to what a model reads; keeping what fits in memory."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from efficient_attn.data.base import Image, Info
from efficient_attn.data.sources import Arrays, Finish, Items

# What pillow raises over a damaged file, and over one that claims to be huge.
UNREADABLE = (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)
GREY = {"1", "L", "LA"}
DEEP = {"I", "F"}  # more than 8 bits: pillow would clip them, not scale them
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # of EXIF: the tag, and its values of 90 degrees

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, what pillow's mode L uses


STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of red, green and blue; grey takes their mean."""


def finish(options: Image, *, peak: int = 255) -> Finish:
    """The map from integer images [B, H, W, C] in 0..peak to a model's inputs."""
    if options.layout == "pixels":
        return partial(_to_pixels, peak=peak)
    return partial(_to_floats, peak=peak, normalize=options.normalize)


def _to_floats(images: np.ndarray, *, peak: int, normalize: str) -> np.ndarray:
    floats = images.astype(np.float32) / np.float32(peak)
    if normalize == "none":
        return floats
    mean, deviation = (np.array(part, np.float32) for part in STATISTICS[normalize])
    if images.shape[-1] == 1:
        mean, deviation = mean.mean(), deviation.mean()
    return (floats - mean) / deviation


def _to_pixels(images: np.ndarray, *, peak: int) -> np.ndarray:
    grey = images @ LUMA if images.shape[-1] == 3 else images[..., 0]
    ids = np.rint(grey * np.float32(255 / peak)).astype(np.int32) + 1
    return ids.reshape(len(images), -1)


def info(
    options: Image, *, shape: tuple[int, int, int], labels: tuple[str, ...], about: str
) -> Info:
    """The description of an image set of this (H, W, C), in the layout asked for."""
    if options.layout == "pixels":
        return Info("tokens", (shape[0] * shape[1],), labels, 257, about)
    return Info("image", shape, labels, None, about)


def header(path: Path) -> tuple[int, int, bool]:
    """(height, width, whether it is grey) of an image file, upright, without decoding it.

    Raises:
        UNREADABLE: no image, or one of more than 8 bits.
    """
    with PIL.Image.open(path) as image:
        if image.mode.partition(";")[0] in DEEP:
            raise ValueError(f"mode {image.mode} has more than 8 bits: convert it to 8")
        # Pillow turns a TIFF by itself, and decodes a PNG in search of what is not in `info`.
        turned = "exif" in image.info and image.getexif().get(ORIENTATION) in QUARTER_TURNS
        size = (image.width, image.height) if turned else (image.height, image.width)
        return *size, image.mode in GREY


def decode(path: Path, channels: int) -> np.ndarray:
    """The image as bytes [h, w, C], C being 1 or 3, upright as its EXIF data say.

    Raises:
        UNREADABLE: the file is damaged.
    """
    with PIL.Image.open(path) as image:
        upright = PIL.ImageOps.exif_transpose(image)
        pixels = np.asarray(upright.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def fit(pixels: np.ndarray, size: tuple[int, int], options: Image) -> np.ndarray:
    """Bytes [h, w, C] brought to `size` = (H, W) as `options.fit` says."""
    if pixels.shape[:2] == size:
        return pixels
    if options.fit == "stretch":
        return resize(pixels, size)
    wanted = [round(side / options.crop) for side in size]
    scale = max(w / side for w, side in zip(wanted, pixels.shape[:2], strict=True))
    whole = [max(round(scale * side), s) for side, s in zip(pixels.shape[:2], size, strict=True)]
    top, left = ((w - s) // 2 for w, s in zip(whole, size, strict=True))
    return resize(pixels, (whole[0], whole[1]))[top : top + size[0], left : left + size[1]]


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bytes [h, w] or [h, w, C] brought to `size` = (H, W): bilinear, averaging when it shrinks."""
    image = to_pil(pixels).resize((size[1], size[0]), PIL.Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(*size, *pixels.shape[2:])


def to_pil(pixels: np.ndarray) -> PIL.Image.Image:
    """Bytes [h, w], [h, w, 1] or [h, w, 3] as pillow has them."""
    return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def keep(items: Items, options: Image, *, text: str) -> Arrays | Items:
    """The items in memory where `options.memory_mb` allows, else as they are."""
    fits = len(items) * math.prod(items.shape) <= options.memory_mb * 2**20
    return items.in_memory(text=text) if fits else items
