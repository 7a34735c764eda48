"""What every data set is made of: its options, its description and its splits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from efficient_attn.config import require

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Text:
    """Options of the sets that hold text (`text_folder`, `tfds`).

    max_len: tokens kept of each text; the rest is cut off.
    tokenizer: "bytes" (vocabulary 257) or "words" (built from the train split).
    vocab: with "words", the most ids there may be, padding and unknown included.
    """

    max_len: int = 1000
    tokenizer: Literal["bytes", "words"] = "bytes"
    vocab: int = 20000

    def __post_init__(self):
        require(self.max_len >= 1, f"max_len must be at least 1, not {self.max_len}")
        require(self.vocab >= 3, f"vocab must be at least 3, not {self.vocab}")


@dataclass(frozen=True)
class Image:
    """Options of the sets that hold images (`digits`, `image_folder`, `tfds`).

    layout: "image" gives floats in [0, 1]; "pixels" gives one token per pixel, its grey value
        (0..255) + 1, row by row. The 1 keeps black apart from padding: Long Range Arena feeds the
        bare grey value and masks with `inputs > 0`, and so hides every black pixel.
    size: height and width that images are resized to (bilinear); 0 keeps the set's own.
    memory_mb: a split of at most this many MB (one byte per value) is decoded once and kept; a
        larger one is decoded anew for each batch.
    """

    layout: Literal["image", "pixels"] = "image"
    size: int = 0
    memory_mb: int = 512

    def __post_init__(self):
        require(self.size >= 0, f"size must be 0 (the set's own) or positive, not {self.size}")
        require(self.memory_mb >= 0, f"memory_mb must not be negative, not {self.memory_mb}")


@dataclass(frozen=True)
class ListOps:
    """Options of the `listops` generator; the defaults are Long Range Arena's.

    min_length, max_length: tokens of an expression, both ends included (see `listops.py`).
    max_depth: nodes from the root to the deepest digit, both counted.
    max_args: most arguments of an operator; the fewest is 2.
    train, validation, test: examples in each split.
    processes: worker processes that generate; 0 is one per core. Never changes the result.
    """

    min_length: int = 501
    max_length: int = 1999
    max_depth: int = 10
    max_args: int = 10
    train: int = 96000
    validation: int = 2000
    test: int = 2000
    processes: int = 0

    def __post_init__(self):
        require(
            4 <= self.min_length <= self.max_length,
            f"lengths must satisfy 4 <= min_length <= max_length, not "
            f"{self.min_length} and {self.max_length}",
        )
        require(self.max_depth >= 2, f"max_depth must be at least 2, not {self.max_depth}")
        require(self.max_args >= 2, f"max_args must be at least 2, not {self.max_args}")
        require(self.processes >= 0, f"processes must not be negative, not {self.processes}")
        for split in ("train", "validation", "test"):
            count = getattr(self, split)
            require(count >= 1, f"{split} must be at least 1 example, not {count}")


@dataclass(frozen=True)
class Config:
    """Which data set, and how it is read.

    name: a key of `efficient_attn.data.DATASETS`.
    path: the folder of `text_folder` and `image_folder`; the data_dir of `tfds` ("" is TFDS's own).
    tfds: with name "tfds", the set's name there, such as "mnist" or "imdb_reviews/plain_text".
    batch_size: examples in a training batch.
    validation: fraction of train held out, unless the set brings a validation split (and in
        `listops`, which generates one).
    test: fraction of train held out where a set brings no test split; `digits` has its own.
    seed: of the validation split and of `listops`; the test split never depends on it.
    on_error: what an unreadable image or a text that is not UTF-8 does: "raise" stops with its
        name, "skip" leaves it out, counts it and warns.
    cache: folder for generated sets; "" is $EFFICIENT_ATTN_CACHE, or else ./data_cache.
    """

    name: str = "digits"
    path: str = ""
    tfds: str = ""
    batch_size: int = 64
    validation: float = 0.1
    test: float = 0.2
    seed: int = 0
    on_error: Literal["raise", "skip"] = "raise"
    cache: str = ""
    text: Text = Text()
    image: Image = Image()
    listops: ListOps = ListOps()

    def __post_init__(self):
        require(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")
        require(self.seed >= 0, f"seed must not be negative, not {self.seed}")
        require(0 <= self.validation < 1, f"validation must be in [0, 1), not {self.validation}")
        require(0 < self.test < 1, f"test must be in (0, 1), not {self.test}")


@dataclass(frozen=True)
class Info:
    """What a model needs to know of a data set.

    kind: "image" (inputs float32 [B, H, W, C] in [0, 1]) or "tokens" (int32 [B, max_len]).
    shape: (H, W, C), or (max_len,).
    labels: the name of each class, in the order of the label numbers.
    vocab: number of token ids, of which 0 is always padding; None for images.
    about: one sentence on where the splits come from, for logs and results.
    """

    kind: Literal["image", "tokens"]
    shape: tuple[int, ...]
    labels: tuple[str, ...]
    vocab: int | None
    about: str = ""


@runtime_checkable
class Source(Protocol):
    """Random access to examples; `gather` is the way to a batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example: {"inputs": array, "label": int}."""
        ...

    def gather(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The batch {"inputs", "label" int32 [B], "weight" float32 [B]} of these examples."""
        ...


@dataclass(frozen=True)
class Dataset:
    """A data set: its description and the sources "train", "validation" and "test"."""

    info: Info
    splits: Mapping[str, Source]
