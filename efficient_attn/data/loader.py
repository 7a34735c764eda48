"""From a source to batches: endless and shuffled for training, once and in order for evaluation."""

import sys
from collections.abc import Iterator
from functools import partial

import grain
import numpy as np

from efficient_attn.data.augment import Augmented
from efficient_attn.data.base import Batch, Drawn, Source
from efficient_attn.data.order import Order
from efficient_attn.data.sources import Items
from efficient_attn.errors import UserError


def train_batches(
    source: Source, *, batch_size: int, seed: int, repeats: int = 1
) -> grain.DatasetIterator:
    """An endless iterator of batches; each epoch sees each example once, in an order of its own.

    With `repeats` each comes so many times in a row.

    The order depends on `seed` alone. `get_state` and `set_state` give and take the position, and
    `grain.checkpoint` saves it through orbax. A batch may hold the end of one epoch and the start
    of the next, so every batch is full.

    Raises:
        UserError: the source is empty.
    """
    check(source)
    batches = _Numbered(Order(len(source), seed), batch_size=batch_size, repeats=repeats)
    if isinstance(source, Drawn):
        batches = batches.map(partial(_draw, source, seed))
    else:
        batches = batches.map(partial(_gather, source))
    # One thread prepares the next batch while the model computes; decoding files takes more.
    threads = 4 if isinstance(source, Items | Augmented) else 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(batches.to_iter_dataset(options))


def check(source: Source) -> None:
    """Refuse to train on nothing.

    Raises:
        UserError: the source is empty.
    """
    if len(source) == 0:
        raise UserError("the train split is empty: hold out less of it, or add data")


class _Numbered(grain.MapDataset):
    """Endless batches of (numbers [B] in the run, examples [B]), each example `repeats` times."""

    def __init__(self, order: Order, *, batch_size: int, repeats: int):
        super().__init__()
        self.order, self.batch_size, self.repeats = order, batch_size, repeats

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, index):
        numbers = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        return numbers, self.order.at(numbers // self.repeats)


def _gather(source: Source, batch: tuple[np.ndarray, np.ndarray]) -> Batch:
    return source.gather(batch[1])


def _draw(source: Drawn, seed: int, batch: tuple[np.ndarray, np.ndarray]) -> Batch:
    numbers, indices = batch
    return source.draw(indices, numbers=numbers, seed=seed)


def eval_batches(source: Source, *, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """Batches of the first `limit` examples (all by default), in order.

    The last batch is filled up to `batch_size` with repeats of its last example, of weight 0.
    """
    count = len(source) if limit is None else min(limit, len(source))
    for start in range(0, count, batch_size):
        indices = np.arange(start, start + batch_size)
        batch = source.gather(np.minimum(indices, count - 1))
        weight = batch["weight"].copy()
        weight[indices >= count] = 0
        yield batch | {"weight": weight}
