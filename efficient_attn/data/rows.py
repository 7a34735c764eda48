"""Rows of tokens [B, L + 1] cut from documents: L tokens to tell, each after the one before it.

Every token of the documents is told once. The first of a document comes after `end`, which also
stands between documents and so is told as well; the end of the last one of a stream is not. 0 is
padding.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

Ids = Sequence[np.ndarray]


@runtime_checkable
class Rows(Protocol):
    """Random access to the rows of a split."""

    def __len__(self) -> int: ...

    def fixed(self, indices: np.ndarray) -> np.ndarray:
        """These rows, int32 [B, L + 1]; the same whenever they are asked for."""
        ...

    def shifted(self, indices: np.ndarray, *, epochs: np.ndarray, seed: int) -> np.ndarray:
        """These rows as they are cut in these epochs, which may be another way in each."""
        ...


class Stream:
    """All documents end to end, cut every L tokens.

    In training the cut moves: each epoch begins at a random place and ends where it began, the
    first document following the last; all tokens but one are told once in an epoch.
    """

    def __init__(self, documents: Ids, *, length: int, end: int):
        ends = np.array([end])
        parts = [part for ids in documents for part in (ends, ids)]
        kind = np.uint16 if max((int(p.max()) for p in parts), default=0) < 2**16 else np.int32
        self.tokens = np.concatenate([np.zeros(0, kind), *parts], dtype=kind, casting="unsafe")
        self.length = length

    def __len__(self) -> int:
        return -(-max(len(self.tokens) - 1, 0) // self.length)

    def fixed(self, indices: np.ndarray) -> np.ndarray:
        """The stream from its first token on."""
        return self._cut(indices, np.zeros(len(indices), np.int64))

    def shifted(self, indices: np.ndarray, *, epochs: np.ndarray, seed: int) -> np.ndarray:
        """The stream from a place drawn by seed and epoch."""
        starts = {
            int(epoch): np.random.RandomState([seed, epoch]).randint(len(self.tokens))
            for epoch in np.unique(epochs)
        }
        return self._cut(indices, np.array([starts[int(epoch)] for epoch in epochs]))

    def _cut(self, indices: np.ndarray, starts: np.ndarray) -> np.ndarray:
        number = indices[:, None] * self.length + np.arange(self.length + 1)[None]
        there = number < len(self.tokens)
        found = self.tokens[(starts[:, None] + number) % len(self.tokens)]
        return np.where(there, found, 0).astype(np.int32)


class Padded:
    """Each document, with an end before and after it, in rows of its own: as many as it takes."""

    def __init__(self, documents: Ids, *, length: int, end: int):
        pieces = cut(documents, length=length, end=end)
        kind = np.uint16 if max((int(p.max()) for p in pieces), default=0) < 2**16 else np.int32
        self.tokens = np.zeros((len(pieces), length + 1), kind)
        for row, piece in zip(self.tokens, pieces, strict=True):
            row[: len(piece)] = piece

    def __len__(self) -> int:
        return len(self.tokens)

    def fixed(self, indices: np.ndarray) -> np.ndarray:
        """The rows as they are."""
        return self.tokens[indices].astype(np.int32)

    def shifted(self, indices: np.ndarray, *, epochs: np.ndarray, seed: int) -> np.ndarray:
        """The same in every epoch."""
        return self.fixed(indices)


def cut(documents: Ids, *, length: int, end: int) -> list[np.ndarray]:
    """Each document, with an end before and after it, in pieces of up to L + 1 tokens.

    A piece begins with the last token of the one before it, so that each token is told once.
    """
    pieces = []
    for ids in documents:
        whole = np.concatenate([[end], ids, [end]]).astype(np.int32)
        pieces += [whole[i : i + length + 1] for i in range(0, len(whole) - 1, length)]
    return pieces
