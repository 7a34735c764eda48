"""From a source to batches: endless and shuffled for training, once and in order for evaluation."""

from collections.abc import Iterator
from functools import partial

import grain
import numpy as np

from efficient_attn.data.augment import Augmented
from efficient_attn.data.base import Batch, Drawn, Source
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
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    if repeats > 1:
        order = _InARow(order, repeats)
    if isinstance(source, Drawn):
        draw = partial(_draw, source, seed)
        batches = order.map_with_index(_numbered).batch(batch_size).map(draw)
    else:
        batches = order.batch(batch_size).map(source.gather)
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


class _InARow(grain.MapDataset):
    """Each element of an endless data set so many times in a row."""

    def __init__(self, parent: grain.MapDataset, times: int):
        super().__init__(parent)
        self.times = times

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        return self._parent[index // self.times]


def _numbered(number: int, index: int) -> tuple[int, int]:
    return number, index


def _draw(source: Drawn, seed: int, pairs: tuple[np.ndarray, np.ndarray]) -> Batch:
    numbers, indices = pairs
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
