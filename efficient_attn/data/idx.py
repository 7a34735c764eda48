"""IDX, the file format of MNIST, Fashion-MNIST, KMNIST and EMNIST; plain or gzip."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from efficient_attn.errors import UserError

PREFIXES = {"train": ("train",), "test": ("t10k", "test")}


def find(folder: Path) -> dict[str, tuple[Path, Path]]:
    """(images, labels) of the splits in `folder`; empty where there are no IDX files.

    The names are MNIST's: train-images-idx3-ubyte, t10k-labels-idx1-ubyte and so on, with "." or
    "-" before idx, with or without .gz.

    Raises:
        UserError: images without their labels, or a test set without a train set.
    """
    found = {}
    for split, prefixes in PREFIXES.items():
        images = [path for prefix in prefixes for path in _named(folder, prefix, "images", 3)]
        labels = [path for prefix in prefixes for path in _named(folder, prefix, "labels", 1)]
        if bool(images) != bool(labels):
            there, missing = (images, "labels") if images else (labels, "images")
            raise UserError(f"{there[0]} is there, but not the {missing} that go with it")
        if images:
            found[split] = (images[0], labels[0])
    if found and "train" not in found:
        raise UserError(f"{folder} has {found['test'][0].name}, but no train-images-idx3-ubyte")
    return found


def _named(folder: Path, prefix: str, kind: str, rank: int) -> list[Path]:
    return sorted(folder.glob(f"{prefix}*{kind}[-.]idx{rank}-ubyte*"))


def read(path: Path) -> np.ndarray:
    """The array of unsigned bytes in an IDX file.

    Raises:
        UserError: the file is damaged, cut short, or holds another type.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise UserError(f"{path} is not an IDX file of unsigned bytes")
    start = 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw[4:start], ">u4").tolist())
    if len(shape) != raw[3] or len(raw) - start != math.prod(shape):
        raise UserError(f"{path} is cut short: {len(raw)} bytes for the shape {shape}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
