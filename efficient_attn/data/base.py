"""What every data set is made of: its options, its description and its splits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from efficient_attn.config import at_least, require
from efficient_attn.data.options import ListOps, Matching, Pathfinder, Probes

Batch = dict[str, Any]
Kind = Literal["image", "tokens", "pair", "text", "masked", "translation"]
PER_TOKEN = frozenset({"text", "masked", "translation"})


@dataclass(frozen=True)
class Text:
    """Options of the sets that hold text (`text_folder`, `text_files`, `matching`, `tfds`).

    max_len: tokens of a row. Where labels are told, the rest of a text is cut off.
    tokenizer: "bytes"; or built from the train split: "chars", "words", or byte-level "bpe".
    vocab: the most ids there may be of the last three, padding and such included.
    predict: "label", the class of each text; "next", the next token at each position; "masked",
        tokens that are hidden (1810.04805). "auto" is "next" in `text_files`, else "label".
    documents: what is one document where tokens are told: a file (of `tfds`, an example), a
        paragraph of it, ended by blank lines, or a line.
    packing: how documents become rows where tokens are told. "stream" puts them end to end and cuts
        anywhere; "pad" gives each rows of its own; "pack" fits several into a row, where they do
        not see each other.
    mask_rate: share of the tokens that "masked" asks for.
    """

    max_len: int = 1000
    tokenizer: Literal["bytes", "chars", "words", "bpe"] = "bytes"
    vocab: int = 20000
    predict: Literal["auto", "label", "next", "masked"] = "auto"
    documents: Literal["files", "paragraphs", "lines"] = "files"
    packing: Literal["stream", "pad", "pack"] = "stream"
    mask_rate: float = 0.15

    def __post_init__(self):
        at_least(self, 1, "max_len")
        at_least(self, 3, "vocab")
        require(0 < self.mask_rate < 1, f"mask_rate must be in (0, 1), not {self.mask_rate}")
        require(
            self.predict != "masked" or self.packing != "pack",
            "predict='masked' reads rows of one document or of a stream: packing must be 'pad' or "
            "'stream', not 'pack'",
        )


@dataclass(frozen=True)
class Image:
    """Options of the sets that hold images (`digits`, `image_folder`, `pathfinder`, `tfds`).

    layout: "image" gives floats in [0, 1]; "pixels" gives one token per pixel, its grey value
        (0..255) + 1, row by row. The 1 keeps black apart from padding: Long Range Arena feeds the
        bare grey value and masks with `inputs > 0`, and so hides every black pixel.
    size: height and width that images are brought to (bilinear); 0 keeps the set's own.
    fit: how: "stretch" both sides to it; "crop" the middle after the shorter side became
        size / crop, as ImageNet is evaluated.
    normalize: what is done to floats in [0, 1]: (x - mean) / std of each channel, with ImageNet's
        or with 0.5 and 0.5 ("half"), as the weights of others expect it.
    memory_mb: a split of at most this many MB (one byte per value) is decoded once and kept; a
        larger one is decoded anew for each batch.
    """

    layout: Literal["image", "pixels"] = "image"
    size: int = 0
    fit: Literal["stretch", "crop"] = "stretch"
    crop: float = 0.875
    normalize: Literal["none", "imagenet", "half"] = "none"
    memory_mb: int = 512

    def __post_init__(self):
        require(0 < self.crop <= 1, f"crop must be in (0, 1], not {self.crop}")
        require(self.size >= 0, f"size must be 0 (the set's own) or positive, not {self.size}")
        require(self.memory_mb >= 0, f"memory_mb must not be negative, not {self.memory_mb}")


@dataclass(frozen=True)
class Augment:
    """How training sees its images changed, anew each time one comes up; all off by default.

    crop: least and largest share of the area of a random crop, such as (0.08, 1.0), of proportions
        between 3 : 4 and 4 : 3, which is then resized; () is off. Of a set that is kept in memory
        (`image.memory_mb`) the images are cut as they are there, brought to `image.size`.
    flip: probability of a left-right flip.
    operations, magnitude, deviation: RandAugment (1909.13719): how many operations are drawn for
        an image, each applied with probability 1/2, and their strength out of 10, normal around
        `magnitude`. DeiT's are 2, 9 and 0.5.
    erase: probability that a rectangle of 2 to 33 % of the area becomes noise (1708.04896).
    mixup, cutmix: of Beta(a, a), by which two images of a batch are mixed (1710.09412,
        1905.04899); 0 is off, both on take turns at random.
    repeats: how often an image comes in a row, each time augmented otherwise (1901.09335).
    """

    crop: tuple[float, ...] = ()
    flip: float = 0.0
    operations: int = 0
    magnitude: float = 9.0
    deviation: float = 0.5
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1

    def __post_init__(self):
        at_least(self, 0, "operations", "deviation", "mixup", "cutmix")
        at_least(self, 1, "repeats")
        require(
            self.crop == () or (len(self.crop) == 2 and 0 < self.crop[0] <= self.crop[1] <= 1),
            f"crop must be () or (least, largest) in (0, 1], not {self.crop}",
        )
        require(0 <= self.magnitude <= 10, f"magnitude must be in [0, 10], not {self.magnitude}")
        for name in ("flip", "erase"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} must be in [0, 1], not {value}")

    @property
    def changes(self) -> bool:
        """Whether single images are changed."""
        return bool(self.crop or self.flip or self.operations or self.erase)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed, which the training step does."""
        return bool(self.mixup or self.cutmix)


@dataclass(frozen=True)
class Translation:
    """Options of `translation`; `translation.py` says how its files are named.

    source, target: the languages, as files end in them or as the TFDS set names them.
    test: name of the test files, such as "test_2016_flickr"; "" takes the one that begins so.
    max_len: longest text in tokens, its end included.
    too_long: whether training pairs longer than that are left out or cut.
    vocab: the most ids of the joint byte-pair vocabulary, at least 259.
    """

    source: str = "en"
    target: str = "de"
    test: str = ""
    max_len: int = 64
    too_long: Literal["drop", "cut"] = "drop"
    vocab: int = 8000

    def __post_init__(self):
        at_least(self, 2, "max_len")
        at_least(self, 259, "vocab")
        require(self.source != self.target, f"source and target are both {self.source!r}")


@dataclass(frozen=True)
class Config:
    """Which data set, and how it is read.

    name: a key of `efficient_attn.data.DATASETS`.
    path: the folder of `text_folder`, `image_folder`, `matching` and `translation`, the file or
        folder of `text_files`; the data_dir of `tfds` ("" is TFDS's own).
    tfds: with name "tfds", the set's name there, such as "mnist" or "imdb_reviews/plain_text"; with
        name "translation", such as "wmt14_translate/de-en", in place of files.
    batch_size: examples in a training batch.
    validation: fraction of train held out, unless the set brings a validation split (and in
        `listops`, which generates one).
    test: fraction of train held out where a set brings no test split; `digits` has its own.
    seed: of the validation split, of what is generated (`listops`, `pathfinder`, `probes`) and of
        which texts `matching` pairs in train and validation; the test split of sets that are not
        generated never depends on it.
    on_error: what an unreadable image or a text that is not UTF-8 does: "raise" stops with its
        name, "skip" leaves it out, counts it and warns.
    cache: folder for what is generated or learned from the data; "" is $EFFICIENT_ATTN_CACHE, or
        else ./data_cache.
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
    augment: Augment = Augment()
    listops: ListOps = ListOps()
    probes: Probes = Probes()
    pathfinder: Pathfinder = Pathfinder()
    matching: Matching = Matching()
    translation: Translation = Translation()

    def __post_init__(self):
        at_least(self, 1, "batch_size")
        at_least(self, 0, "seed")
        require(self.seed < 2**32, f"seed must be less than 2**32, not {self.seed}")
        require(0 <= self.validation < 1, f"validation must be in [0, 1), not {self.validation}")
        require(0 < self.test < 1, f"test must be in (0, 1), not {self.test}")


@dataclass(frozen=True)
class Info:
    """What a model needs to know of a data set.

    kind: what the inputs are, and what is told of them.
        A class of each example, label [B]:
        "image"  float32 [B, H, W, C] in [0, 1], or normalised as `Image.normalize` says
        "tokens" int32 [B, T]
        "pair"   int32 [B, 2, T], two texts to be matched
        A token at each position, label [B, T]:
        "text"   int32 [B, T], the label is the next token; where several documents are packed into
                 one row, {"tokens", "segments", "positions"}, each int32 [B, T]
        "masked" int32 [B, T], tokens of which some are hidden; those have weight 1
        "translation" {"source": int32 [B, S], "target": int32 [B, T]}, the target shifted right
    shape: (H, W, C), or (longest length,); of a translation (S, T).
    labels: the name of each class, in the order of the label numbers; () where a class is a token.
    vocab: number of token ids, of which 0 is always padding; None for images.
    about: one sentence on where the splits come from, for logs and results.
    unit: what a text is measured in, "byte" or "character", where its tokens cover it exactly.
    units: how many units each token id stands for, [vocab]; None is one each.
    units_per_token: the mean over the train split, for the estimates in training.
    tokenizer: between texts and ids, `data.tokenizers.Tokenizer`; None where the ids stand for no
        text.
    end: the id that comes before and after each document of a text.
    """

    kind: Kind
    shape: tuple[int, ...]
    labels: tuple[str, ...]
    vocab: int | None
    about: str = ""
    unit: Literal["byte", "character"] | None = None
    units: np.ndarray | None = field(default=None, compare=False)
    units_per_token: float = 1.0
    tokenizer: Any = field(default=None, compare=False)
    end: int | None = None

    @property
    def per_token(self) -> bool:
        """Whether a token is told at each position, rather than a class of each example."""
        return self.kind in PER_TOKEN

    @property
    def classes(self) -> int:
        """Between how many classes, or tokens, the model chooses."""
        return self.vocab or 0 if self.per_token else len(self.labels)


@runtime_checkable
class Source(Protocol):
    """Random access to examples; `gather` is the way to a batch."""

    def __len__(self) -> int: ...

    def gather(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these examples.

        {"inputs": an array, or a dict of arrays, of first axis B,
         "label": int32 [B] or [B, T],
         "weight": float32 of the label's shape, 0 where it does not count}
        """
        ...


@runtime_checkable
class Drawn(Source, Protocol):
    """A source of which training sees something new each time an example comes up."""

    def draw(self, indices: np.ndarray, *, numbers: np.ndarray, seed: int) -> Batch:
        """A batch like `gather`'s, decided by the seed and these numbers, one for each example.

        The examples of a run are numbered through all its epochs: no number comes twice.
        """
        ...


@dataclass(frozen=True)
class Dataset:
    """A data set: its description and the sources "train", "validation" and "test"."""

    info: Info
    splits: Mapping[str, Source]
