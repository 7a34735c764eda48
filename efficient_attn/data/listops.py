"""`listops`: nested operations on digits, a test of hierarchy over long sequences.

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]   ->   5

The task is Nangia & Bowman's (1804.06028) in the setting of Long Range Arena (2011.04006):
operators MIN, MAX, MED (median; the mean of the middle two, rounded down) and SM (sum modulo 10),
each with 2 to `max_args` arguments; an argument is a digit with probability 3/4, an expression
otherwise, and always a digit at `max_depth`. An expression of another length is thrown away and a
new one drawn; one that came up before is left out.

Length counts operators, digits and closing brackets, so it is the number of tokens a model reads.
Long Range Arena counts the same way (its files hold further round brackets, which it neither counts
nor tokenizes) with strict bounds, 500 < length < 2000: here 501 and 1999.

Trap: before March 2021 Long Range Arena's tokenizer split on anything but letters and digits, and
so dropped the closing brackets, without which most expressions have several values. Ours keeps
them.
"""

import math
from collections.abc import Iterator

import numpy as np

from efficient_attn.data import cache
from efficient_attn.data.base import Config, Dataset, Info
from efficient_attn.data.options import ListOps
from efficient_attn.data.progress import track
from efficient_attn.data.sources import Arrays, tokens
from efficient_attn.errors import UserError

TOKENS = ("<pad>", "[MIN", "[MAX", "[MED", "[SM", "]", *"0123456789")
CLOSE, ZERO = TOKENS.index("]"), TOKENS.index("0")
EXPRESSION = 0.25  # probability that an argument is an expression
VERSION = 1  # of the generator: part of the cache's key
SHARD = 256  # examples drawn from one seed
TRIES = 20_000  # draws in a row without one of the right length before giving up
SPLITS = ("test", "validation", "train")  # in this order, so that test never depends on the others

Shard = list[tuple[bytes, int]]  # (token ids, value)


def load(config: Config) -> Dataset:
    """The set as `config.listops` and `config.seed` describe it, generated on first use.

    Raises:
        UserError: the options allow too few expressions, or the cache cannot be written.
    """
    options = config.listops
    stored = cache.stored(
        config,
        "listops",
        cache.key(options, seed=config.seed, version=VERSION, shard=SHARD),
        lambda _: generate(options, seed=config.seed),
    )
    sources = {}
    for split in reversed(SPLITS):
        lengths = stored[f"{split}_lengths"]
        rows = np.zeros((len(lengths), options.max_length), np.uint8)
        rows[np.arange(options.max_length) < lengths[:, None]] = stored[f"{split}_tokens"]
        sources[split] = Arrays(rows, stored[f"{split}_labels"], tokens)
    return Dataset(describe(config), sources)


def describe(config: Config) -> Info:
    """The description of the set, which need not be generated for it."""
    options = config.listops
    about = f"ListOps of {options.min_length} to {options.max_length} tokens, seed {config.seed}"
    return Info("tokens", (options.max_length,), tuple("0123456789"), len(TOKENS), about)


def encode(text: str) -> list[int]:
    """Token ids of an expression written with spaces between its tokens."""
    return [TOKENS.index(token) for token in text.split()]


def decode(ids: np.ndarray | list[int] | bytes) -> str:
    """The expression that these token ids spell; padding is left out."""
    return " ".join(TOKENS[i] for i in ids if i)


def generate(options: ListOps, *, seed: int) -> dict[str, np.ndarray]:
    """Every split: "<split>_tokens" (end to end), "<split>_lengths" and "<split>_labels".

    No expression occurs twice, within a split or in two.
    """
    longest = _longest(options)
    if longest < options.min_length:
        raise UserError(
            f"listops.max_depth={options.max_depth} and max_args={options.max_args} give at most "
            f"{longest} tokens, fewer than listops.min_length={options.min_length}: raise them"
        )
    wanted = sum(getattr(options, split) for split in SPLITS)
    shards = math.ceil(wanted / SHARD)
    with cache.workers(options.processes, jobs=shards / 16) as run:
        return _merge(options, seed=seed, run=run)


def _longest(options: ListOps) -> int:
    length = 1
    for _ in range(options.max_depth - 1):
        length = min(2 + options.max_args * length, options.max_length)
    return length


def _merge(options: ListOps, *, seed: int, run: cache.Map) -> dict[str, np.ndarray]:
    """Shards in their order, without repeats, until each split is full."""
    seen: set[bytes] = set()
    result: dict[str, np.ndarray] = {}
    for split in SPLITS:
        wanted = getattr(options, split)
        kept: Shard = []
        drawn = 0
        while len(kept) < wanted:
            count = math.ceil((wanted - len(kept)) / SHARD)
            before = len(kept)
            for shard in _shards(options, f"{seed}/{split}", range(drawn, drawn + count), run):
                new = {ids: value for ids, value in shard if ids not in seen}
                seen.update(new)
                kept.extend(new.items())
            drawn += count
            if len(kept) - before < 0.01 * count * SHARD and len(kept) < wanted:
                raise UserError(
                    f"listops: of the {wanted} {split} examples asked for only {len(kept)} differ "
                    f"from one another and from the other splits: widen listops.min_length and "
                    f"max_length, or ask for fewer"
                )
        result[f"{split}_tokens"] = np.frombuffer(
            b"".join(ids for ids, _ in kept[:wanted]), np.uint8
        )
        result[f"{split}_lengths"] = np.array([len(ids) for ids, _ in kept[:wanted]], np.int32)
        result[f"{split}_labels"] = np.array([value for _, value in kept[:wanted]], np.uint8)
    return result


def _shards(options: ListOps, stream: str, numbers: range, run: cache.Map) -> Iterator[Shard]:
    jobs = [(options, f"{stream}/{number}") for number in numbers]
    text = f"generating listops {stream.split('/')[1]}"
    return track(run(_shard, jobs), total=len(jobs), text=text)


def _shard(job: tuple[ListOps, str]) -> Shard:
    """`SHARD` examples that depend on the options and the stream's name alone."""
    options, stream = job
    draw = cache.stream(stream)
    examples: Shard = []
    tries = 0
    while len(examples) < SHARD:
        ids: list[int] = []
        value = _expression(draw, options, depth=1, ids=ids)
        if options.min_length <= len(ids) <= options.max_length:
            examples.append((bytes(ids), value))
            tries = 0
        tries += 1
        if tries > TRIES:
            raise UserError(
                f"listops: no expression of {options.min_length} to {options.max_length} tokens in "
                f"{TRIES} draws with max_depth={options.max_depth} and "
                f"max_args={options.max_args}: widen the lengths"
            )
    return examples


def _expression(draw, options: ListOps, *, depth: int, ids: list[int]) -> int:
    """Append one expression to `ids`, or what there is of it when it gets too long; its value."""
    operator = 1 + int(draw() * 4)
    ids.append(operator)
    values = []
    for _ in range(2 + int(draw() * (options.max_args - 1))):
        if len(ids) >= options.max_length:
            ids.append(CLOSE)
            return 0
        if depth + 1 < options.max_depth and draw() < EXPRESSION:
            values.append(_expression(draw, options, depth=depth + 1, ids=ids))
        else:
            digit = int(draw() * 10)
            ids.append(ZERO + digit)
            values.append(digit)
    ids.append(CLOSE)
    return _apply(TOKENS[operator], values)


def _apply(operator: str, values: list[int]) -> int:
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[SM":
        return sum(values) % 10
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) // 2
