"""Text to ids. 0 is padding; a text without tokens becomes one token, so no row is all padding."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

WORD = re.compile(r"\w+|[^\w\s]")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids below `vocab`."""

    vocab: int

    def encode(self, text: str, *, max_len: int) -> np.ndarray:
        """Ids of the first `max_len` tokens, at least one."""
        ...


class Bytes:
    """The UTF-8 bytes of a text, each as its value + 1; an empty text is one space."""

    vocab = 257

    def encode(self, text: str, *, max_len: int) -> np.ndarray:
        """Ids of the first `max_len` bytes; the last character may be cut."""
        # A character takes a byte at least: no need to encode more of them than that.
        raw = (text[:max_len] or " ").encode("utf-8")[:max_len]
        return np.frombuffer(raw, np.uint8).astype(np.int32) + 1


class Words:
    """Lower-case words and single punctuation marks; 1 is any word outside the vocabulary.

    An empty text is one unknown word.
    """

    UNKNOWN = 1

    def __init__(self, words: Sequence[str]):
        self.ids = {word: i for i, word in enumerate(words, start=2)}
        self.vocab = len(words) + 2

    @classmethod
    def build(cls, texts: Iterable[str], *, vocab: int) -> "Words":
        """The most frequent words of these texts, equal counts in alphabetical order.

        vocab: the most ids there may be, padding and unknown among them.
        """
        counts = Counter(word for text in texts for word in WORD.findall(text.lower()))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ranked[: vocab - 2])

    def encode(self, text: str, *, max_len: int) -> np.ndarray:
        """Ids of the first `max_len` words."""
        ids = [self.ids.get(word, self.UNKNOWN) for word in WORD.findall(text.lower())[:max_len]]
        return np.array(ids or [self.UNKNOWN], np.int32)


def matrix(tokenizer: Tokenizer, texts: Sequence[str], *, max_len: int) -> np.ndarray:
    """Ids [N, max_len] of N texts, padded with 0 on the right, in the smallest type that fits."""
    kind = np.uint16 if tokenizer.vocab <= 2**16 else np.int32
    rows = np.zeros((len(texts), max_len), kind)
    for row, text in zip(rows, texts, strict=True):
        ids = tokenizer.encode(text, max_len=max_len)
        row[: len(ids)] = ids
    return rows
