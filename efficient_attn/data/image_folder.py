"""`image_folder`: your own images in class folders, or MNIST's IDX files."""

from functools import partial
from pathlib import Path

import numpy as np

from efficient_attn.data import folders, idx, images
from efficient_attn.data.base import Config, Dataset
from efficient_attn.data.faults import Faults
from efficient_attn.data.progress import track
from efficient_attn.data.sources import Arrays, Items, complete
from efficient_attn.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}

Examples = list[tuple[Path, int]]


def load(config: Config) -> Dataset:
    """The images of config.path.

    Layouts: train/<class>/... and test/<class>/... (and validation, valid or val); or <class>/... ;
    or IDX files. A test split that is missing is held out of train. Images are grey where all are
    grey, RGB otherwise; transparency is dropped.

    Raises:
        UserError: a folder missing or empty, an image that cannot be read (see `config.on_error`),
            or images of several sizes and no `config.image.size`.
    """
    root = folders.existing(config.path)
    pairs = idx.find(root)
    return _from_idx(pairs, config) if pairs else _from_classes(root, config)


def _from_idx(pairs: dict[str, tuple[Path, Path]], config: Config) -> Dataset:
    found = {}
    size = config.image.size
    for split, (image_path, label_path) in pairs.items():
        pixels, labels = idx.read(image_path), idx.read(label_path)
        if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
            raise UserError(
                f"{image_path} and {label_path} do not go together: shapes {pixels.shape} and "
                f"{labels.shape}"
            )
        if size and pixels.shape[1:] != (size, size):
            pixels = np.stack([images.fit(x, (size, size), config.image) for x in pixels])
        found[split] = Arrays(pixels[..., None], labels, images.finish(config.image))
    shapes = {source.inputs.shape[1:] for source in found.values()}
    if len(shapes) > 1:
        raise UserError(
            f"the train and test images in {config.path} differ in size: name the size to bring "
            f"them to in --config.data.image.size"
        )
    classes = 1 + max(int(source.labels.max(initial=0)) for source in found.values())
    splits, about = complete(found, config)
    shape = shapes.pop()
    names = tuple(map(str, range(classes)))
    return Dataset(images.info(config.image, shape=shape, labels=names, about=about), splits)


def _from_classes(root: Path, config: Config) -> Dataset:
    faults = Faults(config.on_error)
    listing = folders.classes(
        root, wanted=lambda path: path.suffix.lower() in SUFFIXES, what="images"
    )
    files, shape = _survey(listing, config.image.size, faults)
    found: dict[str, Arrays | Items] = {}
    for split, examples in files.items():
        items = Items(
            partial(_read, examples, shape[2], faults),
            np.array([label for _, label in examples], np.int32),
            shape=shape,
            fit=partial(images.fit, size=shape[:2], options=config.image),
            finish=images.finish(config.image),
        )
        found[split] = images.keep(items, config.image, text=f"reading {split} images")
        if not len(found[split]):
            raise UserError(f"none of the {len(listing.splits[split])} {split} images can be read")
    faults.report(total=listing.total)
    splits, about = complete(found, config)
    return Dataset(
        images.info(config.image, shape=shape, labels=listing.labels, about=about), splits
    )


def _survey(
    listing: folders.Listing, size: int, faults: Faults
) -> tuple[dict[str, Examples], tuple[int, int, int]]:
    """The files whose headers can be read, and the (H, W, C) that all of them are brought to."""
    kept: dict[str, Examples] = {}
    first: dict[tuple[int, int], Path] = {}
    grey = True
    for split, files in listing.splits.items():
        kept[split] = []
        for path, label in track(files, total=len(files), text=f"looking at {split} images"):
            try:
                height, width, is_grey = images.header(path)
            except images.UNREADABLE as error:
                faults.add(path, f"is not an image that can be read ({error})")
                continue
            kept[split].append((path, label))
            first.setdefault((height, width), path)
            grey = grey and is_grey
    if size:
        height = width = size
    elif len(first) > 1:
        (a, path_a), (b, path_b) = list(first.items())[:2]
        raise UserError(
            f"the images differ in size ({path_a} is {a[0]} x {a[1]}, {path_b} is {b[0]} x {b[1]}):"
            f" name the size to bring them to in --config.data.image.size"
        )
    else:
        height, width = next(iter(first), (0, 0))
    return kept, (height, width, 1 if grey else 3)


def _read(
    examples: Examples, channels: int, faults: Faults, index: int
) -> tuple[np.ndarray, int] | None:
    path, label = examples[index]
    try:
        return images.decode(path, channels), label
    except images.UNREADABLE as error:
        faults.add(path, f"is not an image that can be read ({error})")
        return None
