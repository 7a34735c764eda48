"""From texts and labels to a data set of tokens; what `text_folder` and `tfds` share."""

from pathlib import Path

from efficient_attn.data.base import Config, Dataset, Info
from efficient_attn.data.faults import Faults
from efficient_attn.data.sources import Arrays, complete, objects, tokens
from efficient_attn.data.tokenizers import create, matrix
from efficient_attn.errors import UserError

Labelled = list[tuple[str, int]]


def dataset(found: dict[str, Labelled], config: Config, *, labels: tuple[str, ...]) -> Dataset:
    """Splits completed, then every text tokenized and kept in memory.

    A vocabulary is built from what is left of train once validation and test are out of it.
    """
    raw = {
        split: objects([text for text, _ in examples], [label for _, label in examples])
        for split, examples in found.items()
    }
    if not len(raw["train"]):
        raise UserError("no text of the train split can be read")
    splits, about = complete(raw, config)
    options = config.text
    tokenizer = create(options, splits["train"].inputs.tolist(), config)
    sources = {
        split: Arrays(
            matrix(tokenizer, source.inputs.tolist(), max_len=options.max_len),
            source.labels,
            tokens,
        )
        for split, source in splits.items()
    }
    info = Info("tokens", (options.max_len,), labels, tokenizer.vocab, about, tokenizer=tokenizer)
    return Dataset(info, sources)


def read(path: Path, faults: Faults) -> str | None:
    """The text of a UTF-8 file, without a byte order mark.

    None where it cannot be read and `faults` lets that pass.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        faults.add(path, f"is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})")
    except OSError as error:
        faults.add(path, f"cannot be read ({error.strerror})")
    return None


def need_labels(config: Config) -> None:
    """Refuse a config that asks for tokens of a set that tells classes.

    Raises:
        UserError: `text.predict` is "next" or "masked".
    """
    if config.text.predict in ("next", "masked"):
        raise UserError(
            f"data.text.predict={config.text.predict!r} is for data.name 'text_files' and 'tfds', "
            f"not {config.name!r}"
        )
