"""Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) over the bytes of UTF-8.

Any text has ids and comes back from them exactly, blanks and all: nothing is unknown, and no
detokeniser is needed. Words are split as in GPT-2 before pairs are merged. The ids 0 to 2 stand for
no text, and no text yields them: a "<end>" that someone wrote is three or four ordinary tokens.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from efficient_attn.data.base import Config
from efficient_attn.data.cache import digest, stored
from efficient_attn.errors import UserError

PAD, END, START = 0, 1, 2
RESERVED = 3
SMALLEST = 256 + RESERVED  # every byte has an id
VERSION = 1  # of how it is trained: part of the cache's key


class Bpe:
    """A trained vocabulary; `train` and `cached` make one."""

    def __init__(self, serialized: str):
        self.serialized = serialized
        self._tokenizer = _library().Tokenizer.from_str(serialized)
        self.vocab = self._tokenizer.get_vocab_size() + RESERVED

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab: int) -> "Bpe":
        """At most `vocab` ids, padding, end and start among them, of the pairs frequent in `texts`.

        Raises:
            UserError: fewer ids than there are bytes.
        """
        if vocab < SMALLEST:
            raise UserError(f"a byte-pair vocabulary of {vocab} is too small: {SMALLEST} at least")
        library = _library()
        byte_level = library.pre_tokenizers.ByteLevel
        made = library.Tokenizer(library.models.BPE())
        made.pre_tokenizer = byte_level(add_prefix_space=False)
        made.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab - RESERVED,
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(texts, trainer)
        return cls(made.to_str())

    @classmethod
    def cached(cls, texts: Sequence[str], *, vocab: int, config: Config) -> "Bpe":
        """`train`, or what it made of the very same texts before, from the cache folder.

        Raises:
            UserError: fewer ids than there are bytes, or the cache cannot be written.
        """
        content = hashlib.blake2b(digest_size=8)
        for text in texts:
            content.update(text.encode() + b"\0")
        facts = {
            "texts": content.hexdigest(),
            "count": len(texts),
            "vocab": vocab,
            "version": VERSION,
            "tokenizers": _library().__version__,
        }

        def make(_) -> dict[str, np.ndarray]:
            trained = cls.train(texts, vocab=vocab).serialized
            return {"json": np.frombuffer(trained.encode(), np.uint8)}

        found = stored(config, "bpe", digest(facts), make)
        return cls(found["json"].tobytes().decode())

    def encode(self, text: str, *, max_len: int) -> np.ndarray:
        """Ids of the first `max_len` tokens; an empty text is one space."""
        return np.array(self.encode_all([text or " "])[0][:max_len], np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """All ids of each text; none of an empty one."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[number + RESERVED for number in one.ids] for one in encoded]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text up to the first end; padding and start are left out.

        Bytes that are not UTF-8, as a model may write them, become replacement characters.
        """
        kept = []
        for number in map(int, ids):
            if number == END:
                break
            if number >= RESERVED:
                kept.append(number - RESERVED)
        return self._tokenizer.decode(kept)

    @property
    def byte_counts(self) -> np.ndarray:
        """How many bytes each id stands for, [vocab]; 0 for padding, end and start."""
        counts = np.zeros(self.vocab, np.int32)
        for token, number in self._tokenizer.get_vocab().items():
            counts[number + RESERVED] = len(token)  # a token is written with one sign per byte
        return counts


def _library() -> Any:
    """`tokenizers`, imported when it is needed; its own type stubs leave most of it out."""
    import tokenizers

    return tokenizers
