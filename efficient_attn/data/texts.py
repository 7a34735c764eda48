"""From texts and labels to a data set of tokens; what `text_folder` and `tfds` share."""

import numpy as np

from efficient_attn.data.base import Config, Dataset, Info
from efficient_attn.data.sources import Arrays, complete, tokens
from efficient_attn.data.tokenizers import Bytes, Words, matrix
from efficient_attn.errors import UserError

Labelled = list[tuple[str, int]]


def dataset(found: dict[str, Labelled], config: Config, *, labels: tuple[str, ...]) -> Dataset:
    """Splits completed, then every text tokenized and kept in memory.

    A word vocabulary is built from what is left of train once validation and test are out of it.
    """
    raw = {split: _objects(examples) for split, examples in found.items()}
    if not len(raw["train"]):
        raise UserError("no text of the train split can be read")
    splits, about = complete(raw, config)
    options = config.text
    if options.tokenizer == "words":
        tokenizer = Words.build(splits["train"].inputs, vocab=options.vocab)
    else:
        tokenizer = Bytes()
    sources = {
        split: Arrays(
            matrix(tokenizer, source.inputs.tolist(), max_len=options.max_len),
            source.labels,
            tokens,
        )
        for split, source in splits.items()
    }
    return Dataset(Info("tokens", (options.max_len,), labels, tokenizer.vocab, about), sources)


def _objects(examples: Labelled) -> Arrays:
    inputs = np.empty(len(examples), object)
    inputs[:] = [text for text, _ in examples]
    labels = np.array([label for _, label in examples], np.int32)
    return Arrays(inputs, labels, lambda rows: rows)
