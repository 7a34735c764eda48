"""Text to ids. 0 is padding; a text without tokens becomes one token, so no row is all padding."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from efficient_attn.config import require
from efficient_attn.data.base import Config, Text
from efficient_attn.data.bpe import SMALLEST, Bpe

WORD = re.compile(r"\w+|[^\w\s]")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids below `vocab`."""

    vocab: int

    def encode(self, text: str, *, max_len: int) -> np.ndarray:
        """Ids of the first `max_len` tokens, at least one."""
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of these ids, without those that stand for none."""
        ...


def create(
    options: Text, texts: Sequence[str], config: Config, *, reserved: int = 0
) -> "Tokenizer":
    """The tokenizer `options.tokenizer`, built from these texts where it has to be.

    reserved: ids of `options.vocab` that the caller adds.

    Raises:
        UserError: `options.vocab` leaves no id for a token.
    """
    if options.tokenizer == "bytes":
        return Bytes()
    least = reserved + (SMALLEST if options.tokenizer == "bpe" else Chars.UNKNOWN + 2)
    require(
        options.vocab >= least,
        f"text.vocab={options.vocab} is too small for tokenizer={options.tokenizer!r} here: "
        f"{least} at least",
    )
    vocab = options.vocab - reserved
    if options.tokenizer == "bpe":
        return Bpe.cached(texts, vocab=vocab, config=config)
    return (Words if options.tokenizer == "words" else Chars).build(texts, vocab=vocab)


class Bytes:
    """The UTF-8 bytes of a text, each as its value + 1; an empty text is one space."""

    vocab = 257

    def encode(self, text: str, *, max_len: int) -> np.ndarray:
        """Ids of the first `max_len` bytes; the last character may be cut."""
        # A character takes a byte at least: no need to encode more of them than that.
        raw = (text[:max_len] or " ").encode("utf-8")[:max_len]
        return np.frombuffer(raw, np.uint8).astype(np.int32) + 1

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text; bytes that are not UTF-8 become replacement characters."""
        return bytes(int(i) - 1 for i in ids if 0 < i < self.vocab).decode(errors="replace")


class Chars:
    """Characters (code points); 1 is any outside the vocabulary, and so is an empty text."""

    UNKNOWN = 1

    def __init__(self, characters: Sequence[str]):
        self.characters = ("", "\N{REPLACEMENT CHARACTER}", *characters)
        self.vocab = len(self.characters)
        codes = np.array([ord(c) for c in characters], np.uint32)
        self._order = np.argsort(codes)
        self._codes = codes[self._order]

    @classmethod
    def build(cls, texts: Iterable[str], *, vocab: int) -> "Chars":
        """The most frequent characters of these texts, numbered in the order of their codes.

        vocab: the most ids there may be, padding and unknown among them.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        ranked = sorted(counts, key=lambda c: (-counts[c], c))
        return cls(sorted(ranked[: vocab - 2]))

    def encode(self, text: str, *, max_len: int) -> np.ndarray:
        """Ids of the first `max_len` characters."""
        codes = np.frombuffer(text[:max_len].encode("utf-32-le"), np.uint32)
        if not len(codes) or not len(self._codes):
            return np.full(max(len(codes), 1), self.UNKNOWN, np.int32)
        at = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        known = self._codes[at] == codes
        return np.where(known, self._order[at] + 2, self.UNKNOWN).astype(np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text; what is unknown becomes a replacement character."""
        return "".join(self.characters[int(i)] for i in ids if 0 <= i < self.vocab)


class Words:
    """Lower-case words and single punctuation marks; 1 is any word outside the vocabulary.

    An empty text is one unknown word.
    """

    UNKNOWN = 1

    def __init__(self, words: Sequence[str]):
        self.words = ("", "<unknown>", *words)
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

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The words, a blank between each two: how they were written is lost."""
        return " ".join(self.words[int(i)] for i in ids if 0 < i < self.vocab)


def matrix(tokenizer: Tokenizer, texts: Sequence[str], *, max_len: int) -> np.ndarray:
    """Ids [N, max_len] of N texts, padded with 0 on the right, in the smallest type that fits."""
    kind = np.uint16 if tokenizer.vocab <= 2**16 else np.int32
    rows = np.zeros((len(texts), max_len), kind)
    for row, text in zip(rows, texts, strict=True):
        ids = tokenizer.encode(text, max_len=max_len)
        row[: len(ids)] = ids
    return rows
