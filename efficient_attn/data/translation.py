"""`translation`: pairs of sentences, from two files side by side or from TFDS, in joint BPE.

An example of source ids x and target ids y, E the end and S the start:

    inputs  {"source": x E 0 0 ..., "target": S y 0 0 ...}    both int32 [B, max_len]
    label   y E 0 0 ...                                       weight 1 up to the end, then 0

One vocabulary serves both languages (arXiv 1508.07909, section 3.3); it is learned from what is
left of train once validation and test are out of it. Being of bytes it needs no tokenised text, and
a translation comes out as text, ready for BLEU.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from efficient_attn.data import bpe, folders, tfds_set
from efficient_attn.data.base import Batch, Config, Dataset, Info
from efficient_attn.data.bpe import Bpe
from efficient_attn.data.faults import Faults
from efficient_attn.data.progress import track
from efficient_attn.data.sources import Indices, complete, objects
from efficient_attn.errors import UserError

CHUNK = 10_000  # texts that are encoded at once

Texts = list[tuple[str, str]]


class Ragged(NamedTuple):
    """Rows of different length end to end: row i is flat[starts[i] : starts[i + 1]]."""

    flat: np.ndarray
    starts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """The length of each row."""
        return np.diff(self.starts)

    def row(self, index: int) -> list[int]:
        """One row."""
        return self.flat[self.starts[index] : self.starts[index + 1]].tolist()

    def where(self, kept: np.ndarray) -> "Ragged":
        """The rows where `kept` [N] is True."""
        flat = self.flat[np.repeat(kept, self.lengths)]
        return Ragged(flat, np.concatenate([[0], np.cumsum(self.lengths[kept])]))


class Pairs:
    """Encoded pairs in memory, uncut; `gather` cuts what is longer than `max_len`."""

    def __init__(self, source: Ragged, target: Ragged, *, tokenizer: Bpe, max_len: int):
        self.source = source
        self.target = target
        self.tokenizer = tokenizer
        self.max_len = max_len

    def __len__(self) -> int:
        return len(self.source.starts) - 1

    @property
    def too_long(self) -> np.ndarray:
        """Which pairs are cut, [N]."""
        return np.maximum(self.source.lengths, self.target.lengths) >= self.max_len

    def gather(self, indices: Indices) -> Batch:
        """The batch of these pairs; a text that is cut has no end."""
        shape = (len(indices), self.max_len)
        source, target, label = (np.zeros(shape, np.int32) for _ in range(3))
        for i, index in enumerate(map(int, indices)):
            _fill(source[i], [*self.source.row(index), bpe.END])
            told = [*self.target.row(index), bpe.END]
            _fill(label[i], told)
            _fill(target[i], [bpe.START, *told[:-1]])
        weight = (label != bpe.PAD).astype(np.float32)
        return {"inputs": {"source": source, "target": target}, "label": label, "weight": weight}

    def texts(self, index: int) -> tuple[str, str]:
        """The pair as it was read, source and target."""
        source, target = (side.row(index) for side in (self.source, self.target))
        return self.tokenizer.decode(source), self.tokenizer.decode(target)


def load(config: Config) -> Dataset:
    """The pairs of config.path, or of the TFDS set `config.tfds` prepared there.

    Files are named <split>.<language> or <split>.<language>.gz, a sentence a line: train.en beside
    train.de, then validation (or valid, val, dev) and test, which are held out of train where they
    are missing. Of train, pairs with an empty side are left out, and pairs longer than max_len are
    left out or cut (`config.translation.too_long`); those of the other splits are cut.

    Raises:
        UserError: a file missing, two files of unequal length, a line not in UTF-8 (see
            `config.on_error`), a TFDS set without these languages, nothing left to train on.
    """
    faults = Faults(config.on_error)
    found = _tfds(config, faults) if config.tfds else _files(config, faults)
    faults.report(total=sum(map(len, found.values())) + len(faults.names), what="pairs")
    found["train"] = [pair for pair in found["train"] if all(map(str.strip, pair))]
    if not found["train"]:
        raise UserError("the train split holds no pair of sentences that can be read")
    raw = {split: objects(pairs, [0] * len(pairs)) for split, pairs in found.items()}
    splits, about = complete(raw, config)
    options = config.translation
    train = splits["train"].inputs
    tokenizer = Bpe.cached(train.T.ravel().tolist(), vocab=options.vocab, config=config)
    sources = {split: _encode(s.inputs, tokenizer, options.max_len) for split, s in splits.items()}
    cut = {split: int(sources[split].too_long.sum()) for split in ("validation", "test")}
    sources["train"], said = _shortened(sources["train"], options.too_long)
    shape = (options.max_len, options.max_len)
    said += f", {cut['validation']} validation and {cut['test']} test pairs cut"
    about = f"{options.source}-{options.target}; {said}; {about}"
    info = Info("translation", shape, (), tokenizer.vocab, about, tokenizer=tokenizer)
    return Dataset(info, sources)


def _fill(row: np.ndarray, ids: Sequence[int]) -> None:
    kept = ids[: len(row)]
    row[: len(kept)] = kept


def _encode(texts: np.ndarray, tokenizer: Bpe, max_len: int) -> Pairs:
    sides = (_ragged(texts.reshape(-1, 2)[:, side].tolist(), tokenizer) for side in (0, 1))
    return Pairs(*sides, tokenizer=tokenizer, max_len=max_len)


def _ragged(texts: list[str], tokenizer: Bpe) -> Ragged:
    kind = np.uint16 if tokenizer.vocab <= 2**16 else np.int32
    flat, lengths = [np.zeros(0, kind)], [0]
    starts = range(0, len(texts), CHUNK)
    for start in track(starts, total=len(starts), text="encoding, in tens of thousands"):
        rows = tokenizer.encode_all(texts[start : start + CHUNK])
        lengths += map(len, rows)
        flat.append(np.array([number for row in rows for number in row], kind))
    return Ragged(np.concatenate(flat), np.cumsum(lengths))


def _shortened(pairs: Pairs, too_long: str) -> tuple[Pairs, str]:
    """Train as it is asked for, and how many pairs were too long."""
    fits = ~pairs.too_long
    done = {"drop": "left out", "cut": "cut"}[too_long]
    said = f"{(~fits).sum()} of {len(fits)} training pairs longer than {pairs.max_len} were {done}"
    if too_long == "cut" or fits.all():
        return pairs, said
    if not fits.any():
        raise UserError(
            f"all {len(fits)} training pairs are longer than translation.max_len={pairs.max_len}: "
            "raise it, or set translation.too_long='cut'"
        )
    sides = (side.where(fits) for side in (pairs.source, pairs.target))
    return Pairs(*sides, tokenizer=pairs.tokenizer, max_len=pairs.max_len), said


def _files(config: Config, faults: Faults) -> dict[str, Texts]:
    root = folders.existing(config.path)
    options = config.translation
    languages = (options.source, options.target)
    names = {split: aliases for split, aliases in folders.SPLITS.items() if split != "test"}
    names["validation"] += ("dev",)
    names["test"] = (options.test,) if options.test else _tests(root, languages)
    found: dict[str, Texts] = {}
    for split, aliases in names.items():
        for name in aliases:
            paths = [_path(root, f"{name}.{language}") for language in languages]
            here = [path for path in paths if path is not None]
            if len(here) == 1:
                missing = languages[paths.index(None)]
                raise UserError(f"{here[0]} is there, but not {root / name}.{missing} (or .gz)")
            if here:
                found[split] = _aligned(here[0], here[1], faults)
                break
    needed = {"train": "train", **({"test": options.test} if options.test else {})}
    for split, name in needed.items():
        if split not in found:
            wanted = " and ".join(f"{name}.{language}" for language in languages)
            raise UserError(
                f"{root} has no {wanted} (or .gz): name the folder in --config.data.path and the "
                "languages in --config.data.translation.source and .target"
            )
    return found


def _tests(root: Path, languages: tuple[str, str]) -> tuple[str, ...]:
    """The name of the one test set here, if there is one."""
    ends = tuple(f".{language}{zipped}" for language in languages for zipped in ("", ".gz"))
    files = [path.name for path in root.glob("test*") if path.name.endswith(ends)]
    stems = sorted({name.removesuffix(".gz").rpartition(".")[0] for name in files})
    if len(stems) > 1:
        raise UserError(
            f"{root} has several test sets ({', '.join(stems)}): choose one with "
            f"--config.data.translation.test={stems[0]}"
        )
    return tuple(stems)


def _path(root: Path, name: str) -> Path | None:
    found = [path for path in (root / name, root / f"{name}.gz") if path.is_file()]
    return found[0] if found else None


def _aligned(source: Path, target: Path, faults: Faults) -> Texts:
    first, second = _lines(source), _lines(target)
    if len(first) != len(second):
        raise UserError(
            f"{source} has {len(first)} lines, but {target} has {len(second)}: line by line they "
            "must be translations of each other"
        )
    where = ((f"{source} line {n}", f"{target} line {n}") for n in range(1, len(first) + 1))
    return list(_decoded(zip(first, second, strict=True), where, faults))


def _lines(path: Path) -> list[bytes]:
    """Lines end in a line feed alone: other separators of Unicode may stand inside a sentence."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        raw = raw.removeprefix(codecs.BOM_UTF8)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason})") from error
    lines = raw.removesuffix(b"\n").split(b"\n") if raw else []
    return [line.removesuffix(b"\r") for line in lines]


def _decoded(
    pairs: Iterator[tuple[bytes, bytes]], where: Iterator[tuple[str, str]], faults: Faults
) -> Iterator[tuple[str, str]]:
    """The pairs that are UTF-8 on both sides."""
    for pair, names in zip(pairs, where, strict=True):
        texts = []
        for raw, name in zip(pair, names, strict=True):
            try:
                texts.append(raw.decode("utf-8"))
            except UnicodeDecodeError:
                faults.add(name, "is not UTF-8")
                break
        if len(texts) == 2:
            yield texts[0], texts[1]


def _tfds(config: Config, faults: Faults) -> dict[str, Texts]:
    builder, options = tfds_set.open_set(config), config.translation
    languages = (options.source, options.target)
    features = builder.info.features
    missing = [language for language in languages if language not in features]
    if missing:
        raise UserError(
            f"TFDS set {config.tfds!r} has no language {missing[0]!r}; it holds "
            f"{', '.join(features)}: choose --config.data.translation.source and .target of them"
        )
    found = {}
    for split, records in tfds_set.read_splits(builder, config).items():
        numbers = track(range(len(records)), total=len(records), text=f"reading {split} pairs")
        examples = (records[number] for number in numbers)
        pairs = ((example[languages[0]], example[languages[1]]) for example in examples)
        names = (f"{config.tfds} {split} example {number}" for number in range(len(records)))
        found[split] = list(_decoded(pairs, ((name, name) for name in names), faults))
    return found
