"""`matching`: do two texts belong together? Inputs int32 [B, 2, T], label 1 where they do.

From `config.path`, either

- Long Range Arena's Retrieval (2011.04006, section 2.2.3): *.train.tsv, *.eval.tsv and *.test.tsv,
  without a header or quotes, each line label, id1, id2, text1, text2; its files are called
  new_aan_pairs.
- or IMDb reviews, to stand in for it: aclImdb's folder with train/pos/N_R.txt, train/neg/ and
  train/urls_pos.txt, urls_neg.txt, whose line N names the film of review N; test/ likewise, if you
  have it. Two reviews belong together when they are of one film.

Each review comes first with up to `matching.partners` others of its film. For the pairs that
do not belong together the second reviews of the others are dealt out anew, among pairs with the
same two sentiments, until the films differ. So both classes have the same number of pairs of each
two sentiments, and each review comes first, and second, equally often in both: only how the two go
together tells. Where there is no test/, films are held out, and no film is in two splits. Of texts
that occur twice the first is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from efficient_attn.data import folders, texts
from efficient_attn.data.base import Batch, Config, Dataset, Info
from efficient_attn.data.faults import Faults
from efficient_attn.data.progress import track
from efficient_attn.data.sources import TEST_SEED, hold_out
from efficient_attn.data.tokenizers import create, matrix
from efficient_attn.errors import UserError

TABLES = {"train": "train", "validation": "eval", "test": "test"}  # how LRA names its files
LABELS = ("different", "same")
SENTIMENTS = ("neg", "pos")
ROUNDS = 1000  # of exchanges that try to part two reviews of one film


@dataclass(frozen=True)
class Matched:
    """Texts, pairs [M, 2] of their numbers, and labels [M], 1 where a pair belongs together."""

    texts: list[str]
    pairs: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Review:
    """A review, its film's address and its sentiment, a number of `SENTIMENTS`."""

    film: str
    sentiment: int
    text: str


class Pairs:
    """Pairs of texts in memory: rows [N, T] of ids, pairs [M, 2] of row numbers, labels [M]."""

    def __init__(self, rows: np.ndarray, pairs: np.ndarray, labels: np.ndarray):
        self.rows = rows
        self.pairs = pairs
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.pairs)

    def gather(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The batch of these pairs."""
        indices = np.asarray(indices)
        inputs = self.rows[self.pairs[indices]].astype(np.int32)
        weight = np.ones(len(indices), np.float32)
        return {"inputs": inputs, "label": self.labels[indices], "weight": weight}


def load(config: Config) -> Dataset:
    """The pairs in `config.path`; `config.text` says how texts become tokens.

    Raises:
        UserError: neither kind of files there, one of them missing or not as described, a text not
            in UTF-8 (see `config.on_error`), too few films, or `text.predict` asks for tokens.
    """
    texts.need_labels(config)
    root, options = folders.existing(config.path), config.text
    if any(root.glob("*.train.tsv")):
        found, about = _tables(root, Faults(config.on_error)), "its own"
    elif (root / "train" / "urls_pos.txt").is_file():
        found, about = _films(root, config)
    else:
        raise UserError(
            f"{root} holds no pairs: neither *.train.tsv (label, id1, id2, text1, text2), nor "
            f"aclImdb's train/urls_pos.txt"
        )
    tokenizer = create(options, found["train"].texts, config)
    splits = {
        split: Pairs(
            matrix(tokenizer, matched.texts, max_len=options.max_len), matched.pairs, matched.labels
        )
        for split, matched in found.items()
    }
    shape = (options.max_len,)
    info = Info("pair", shape, LABELS, tokenizer.vocab, f"splits: {about}", tokenizer=tokenizer)
    return Dataset(info, splits)


def _tables(root: Path, faults: Faults) -> dict[str, Matched]:
    found = {split: _table(root, name, faults) for split, name in TABLES.items()}
    total = sum(len(table.pairs) for table in found.values()) + len(faults.names)
    faults.report(total=total, what="pairs")
    return found


def _table(root: Path, name: str, faults: Faults) -> Matched:
    paths = sorted(root.glob(f"*.{name}.tsv"))
    if not paths:
        raise UserError(f"{root} has *.train.tsv, but no *.{name}.tsv beside it")
    numbers: dict[str, int] = {}
    kept: list[str] = []
    pairs, labels = [], []
    with paths[0].open("rb") as file:
        for at, raw in enumerate(file, start=1):
            try:
                fields = raw.decode("utf-8-sig").rstrip("\r\n").split("\t")
            except UnicodeDecodeError:
                faults.add(f"{paths[0]} line {at}", "is not UTF-8")
                continue
            if len(fields) != 5 or fields[0] not in ("0", "1", "0.0", "1.0"):
                raise UserError(
                    f"{paths[0]}, line {at}: not label (0 or 1), id1, id2, text1, text2 with tabs "
                    f"between them"
                )
            for key, text in zip(fields[1:3], fields[3:], strict=True):
                if key not in numbers:
                    numbers[key] = len(kept)
                    kept.append(text)
            pairs.append([numbers[key] for key in fields[1:3]])
            labels.append(int(float(fields[0])))
    if not pairs:
        raise UserError(f"{paths[0]} is empty: it holds no pair that can be read")
    return Matched(kept, np.array(pairs), np.array(labels))


def _films(root: Path, config: Config) -> tuple[dict[str, Matched], str]:
    faults = Faults(config.on_error)
    reviews = {"train": list(_reviews(root / "train", faults))}
    own = (root / "test" / "urls_pos.txt").is_file()
    if own:
        reviews["test"] = list(_reviews(root / "test", faults))
    faults.report(total=sum(map(len, reviews.values())) + len(faults.names))
    for split, fraction, seed in (
        ("test", config.test, TEST_SEED),
        ("validation", config.validation, config.seed),
    ):
        if split not in reviews:
            reviews["train"], reviews[split] = _part(reviews["train"], fraction, seed=seed)
    if not reviews["train"]:
        raise UserError(f"{root} has no film left to train on: there are too few films")
    about = f"validation: {config.validation:.0%} of the films by seed {config.seed}; test: " + (
        "the set's own" if own else f"{config.test:.0%} of the films by a fixed seed"
    )
    partners, seeds = config.matching.partners, {"test": TEST_SEED}
    return {
        split: pair(found, partners=partners, seed=seeds.get(split, config.seed), split=split)
        for split, found in reviews.items()
    }, about


def _reviews(folder: Path, faults: Faults) -> Iterator[Review]:
    """The reviews of a folder in sorted order, each text once."""
    seen: set[str] = set()
    for sentiment, name in enumerate(SENTIMENTS):
        urls = folder / f"urls_{name}.txt"
        if not urls.is_file():
            raise UserError(f"{urls} is missing: line N names the film of review N in {name}/")
        films = urls.read_text(encoding="utf-8").split()
        paths = sorted((folder / name).glob("*_*.txt"))
        for path in track(paths, total=len(paths), text=f"reading {folder.name} {name} reviews"):
            number = path.stem.partition("_")[0]
            if not number.isdigit() or int(number) >= len(films):
                raise UserError(f"{path}: {urls} has no line {number}")
            text = texts.read(path, faults)
            if text is not None and text not in seen:
                seen.add(text)
                yield Review(films[int(number)], sentiment, text)


def _part(
    reviews: list[Review], fraction: float, *, seed: int
) -> tuple[list[Review], list[Review]]:
    """(kept, held out): a fraction of the films, with all that was said of them."""
    films = sorted({review.film for review in reviews})
    _, out = hold_out(np.zeros(len(films)), fraction, seed=seed)
    held = {films[i] for i in out}
    kept = [review for review in reviews if review.film not in held]
    return kept, [review for review in reviews if review.film in held]


def pair(reviews: list[Review], *, partners: int, seed: int, split: str) -> Matched:
    """Pairs of one film, each followed by a pair of two films with the same sentiments.

    split: what messages call the reviews; without any there are no pairs.

    Raises:
        UserError: no film has two reviews, or there are too few films to part them.
    """
    if not reviews:
        return Matched([], np.zeros((0, 2), int), np.zeros(0, int))
    random = np.random.RandomState(seed)
    film = np.unique([review.film for review in reviews], return_inverse=True)[1]
    sentiment = np.array([review.sentiment for review in reviews])
    same = []
    for number in range(film.max(initial=-1) + 1):
        members = random.permutation(np.flatnonzero(film == number))
        count = len(members)
        for shift in range(1, min(partners, count // 2) + 1):
            # Half a turn meets every pair twice.
            first = members[: count // 2] if 2 * shift == count else members
            at = np.arange(len(first))
            same.append(np.stack([first, members[(at + shift) % count]], axis=1))
    if not same:
        raise UserError(
            f"matching: no two reviews of one film in the {split} split: there are too few films"
        )
    pairs = random.permutation(np.concatenate(same))
    other = pairs.copy()
    for kind in np.unique(group := sentiment[pairs] @ [2, 1]):
        rows = np.flatnonzero(group == kind)
        other[rows, 1] = _deal(film, pairs[rows], random)
    apart = film[other[:, 0]] != film[other[:, 1]]
    if not apart.any():
        raise UserError(
            f"matching: the {split} split has too few films to pair reviews of different ones"
        )
    both = np.stack([pairs[apart], other[apart]], axis=1).reshape(-1, 2)
    return Matched([review.text for review in reviews], both, np.tile([1, 0], len(both) // 2))


def _deal(film: np.ndarray, pairs: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """The second reviews in another order, in which films differ from those of the first ones."""
    first, second = pairs[:, 0], random.permutation(pairs[:, 1])
    for _ in range(ROUNDS):
        equal = np.flatnonzero(film[first] == film[second])
        if not len(equal):
            break
        for i in equal:
            j = random.randint(len(first))
            if film[first[i]] != film[second[j]] and film[first[j]] != film[second[i]]:
                second[[i, j]] = second[[j, i]]
    return second
