"""The two kinds of source, in memory and decoded on demand, and how a split is held out."""

from collections.abc import Callable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np

from efficient_attn.data.base import Batch, Config
from efficient_attn.data.progress import track

Finish = Callable[[np.ndarray], np.ndarray]
Indices = Sequence[int] | np.ndarray


class Arrays:
    """A set in memory.

    inputs: [N, ...] in a compact type; `finish` turns some rows into what the model reads.
    labels: [N], integers.
    """

    def __init__(self, inputs: np.ndarray, labels: np.ndarray, finish: Finish):
        self.inputs = inputs
        self.labels = np.asarray(labels, np.int32)
        self.finish = finish

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _single(self.gather([index]))

    def gather(self, indices: Indices) -> Batch:
        """The batch of these examples."""
        indices = np.asarray(indices)
        weight = np.ones(len(indices), np.float32)
        inputs = self.finish(self.inputs[indices])
        return {"inputs": inputs, "label": self.labels[indices], "weight": weight}

    def original(self, index: int) -> tuple[np.ndarray, int]:
        """An example as it is kept, and its label."""
        return self.inputs[index], int(self.labels[index])

    def fit(self, pixels: np.ndarray) -> np.ndarray:
        """The same: all are kept in one shape."""
        return pixels

    def take(self, indices: Indices) -> "Arrays":
        """These examples as a source of their own."""
        return Arrays(self.inputs[indices], self.labels[indices], self.finish)


class Items:
    """A set decoded on demand: each example anew whenever it is asked for.

    read: number in the underlying set -> (array, label), or None for an example to leave out of
        account: it comes as zeros of weight 0.
    fit: what brings such an array to `shape`.
    labels: [N], used only to hold out equal parts of each class; all 0 where they are not known
        without reading.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[np.ndarray, int] | None],
        labels: np.ndarray,
        *,
        shape: tuple[int, ...],
        finish: Finish,
        fit: Finish = lambda same: same,
        indices: Indices | None = None,
    ):
        self.read = read
        self.fit = fit
        self.labels = labels
        self.shape = shape
        self.finish = finish
        self.indices = np.arange(len(labels)) if indices is None else np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _single(self.gather([index]))

    def gather(self, indices: Indices) -> Batch:
        """The batch of these examples."""
        inputs = np.zeros((len(indices), *self.shape), np.uint8)
        label = np.zeros(len(indices), np.int32)
        weight = np.zeros(len(indices), np.float32)
        for row, index in enumerate(np.asarray(indices)):
            item = self._fitted(int(index))
            if item is not None:
                inputs[row], label[row] = item
                weight[row] = 1
        return {"inputs": self.finish(inputs), "label": label, "weight": weight}

    def original(self, index: int) -> tuple[np.ndarray, int] | None:
        """An example of its own size, and its label; None where it is left out of account."""
        return self.read(int(self.indices[index]))

    def _fitted(self, index: int) -> tuple[np.ndarray, int] | None:
        found = self.original(index)
        return found and (self.fit(found[0]), found[1])

    def take(self, indices: Indices) -> "Items":
        """These examples as a source of their own."""
        return Items(
            self.read,
            self.labels[indices],
            shape=self.shape,
            finish=self.finish,
            fit=self.fit,
            indices=self.indices[indices],
        )

    def in_memory(self, *, text: str) -> Arrays:
        """Every example decoded once, without those that `read` leaves out."""
        inputs = np.zeros((len(self), *self.shape), np.uint8)
        labels = np.zeros(len(self), np.int32)
        kept = 0
        with ThreadPool(4) as pool:
            done = pool.imap(self._fitted, range(len(self)), chunksize=16)
            for item in track(done, total=len(self), text=text):
                if item is not None:
                    inputs[kept], labels[kept] = item
                    kept += 1
        return Arrays(inputs[:kept], labels[:kept], self.finish)


def _single(batch: Batch) -> dict[str, Any]:
    return {"inputs": batch["inputs"][0], "label": int(batch["label"][0])}


def objects(rows: Sequence[Any], labels: Sequence[int]) -> Arrays:
    """Texts, or pairs of texts, that stay as they are."""
    return Arrays(np.array(rows, object), np.array(labels, np.int32), lambda same: same)


def tokens(rows: np.ndarray) -> np.ndarray:
    """`finish` of token ids: int32."""
    return rows.astype(np.int32)


TEST_SEED = 0  # test sets are drawn with it, whatever the config's seed


def complete(found: Mapping[str, Any], config: Config) -> tuple[dict[str, Any], str]:
    """The three splits from those found, of which "train" is one, and a sentence on their origin.

    A test split that is missing is held out of train with a fixed seed, then a validation split
    that is missing out of what is left, with `config.seed`.
    """
    splits = dict(found)
    about = []
    for split, fraction, seed, whose in (
        ("test", config.test, TEST_SEED, "a fixed seed"),
        ("validation", config.validation, config.seed, f"seed {config.seed}"),
    ):
        if split in found:
            about.append(f"{split}: the set's own")
            continue
        kept, out = hold_out(splits["train"].labels, fraction, seed=seed)
        splits |= {split: splits["train"].take(out), "train": splits["train"].take(kept)}
        about.append(f"{split}: {fraction:.0%} held out of train by {whose}")
    return splits, "; ".join(about)


def hold_out(labels: np.ndarray, fraction: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): sorted indices, `fraction` of each class held out, at random by `seed`.

    Numbers that do not come out even are rounded class by class so that the total is right to
    within one half. Labels all equal give a plain random split.
    """
    # RandomState, not Generator: numpy promises its stream never changes (NEP 19), so a split is
    # the same on every numpy.
    random = np.random.RandomState(seed)
    held: list[np.ndarray] = []
    owed = 0.0
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        owed += fraction * len(members)
        count = min(round(owed), len(members))
        owed -= count
        held.append(members[:count])
    out = np.sort(np.concatenate(held)) if held else np.zeros(0, np.int64)
    return np.setdiff1d(np.arange(len(labels)), out), out
