import itertools

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from efficient_attn.data import loader
from efficient_attn.data.sources import Arrays, Items
from efficient_attn.errors import UserError


def numbered(count):
    """A source whose inputs and labels are the examples' own numbers."""
    rows = np.arange(count)
    return Arrays(rows[:, None], rows, lambda inputs: inputs.astype(np.float32))


def numbers(batches):
    return np.concatenate([batch["label"] for batch in batches])


def test_train_batch_has_the_types_of_the_contract():
    batch = next(loader.train_batches(numbered(10), batch_size=4, seed=0))
    assert set(batch) == {"inputs", "label", "weight"}
    assert batch["label"].dtype == np.int32 and batch["label"].shape == (4,)
    assert batch["weight"].dtype == np.float32
    np.testing.assert_array_equal(batch["weight"], 1)
    np.testing.assert_array_equal(batch["inputs"][:, 0], batch["label"])


def test_each_epoch_has_each_example_once_in_another_order():
    stream = loader.train_batches(numbered(30), batch_size=4, seed=0)
    epochs = numbers(itertools.islice(stream, 45)).reshape(6, 30)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(30))
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_the_order_depends_on_the_seed_alone():
    def first(seed):
        return numbers(
            itertools.islice(loader.train_batches(numbered(30), batch_size=4, seed=seed), 9)
        )

    np.testing.assert_array_equal(first(3), first(3))
    assert not np.array_equal(first(3), first(4))


@pytest.mark.parametrize("taken", [0, 1, 5, 11])
def test_set_state_resumes_within_and_between_epochs(taken):
    source = numbered(30)
    stream = loader.train_batches(source, batch_size=4, seed=0)
    for _ in range(taken):
        next(stream)
    state = stream.get_state()
    expected = numbers(itertools.islice(stream, 10))
    fresh = loader.train_batches(source, batch_size=4, seed=0)
    next(fresh)
    fresh.set_state(state)
    np.testing.assert_array_equal(numbers(itertools.islice(fresh, 10)), expected)


def test_the_position_survives_an_orbax_checkpoint(tmp_path):
    stream = loader.train_batches(numbered(30), batch_size=4, seed=0)
    for _ in range(9):
        next(stream)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(stream)))
        manager.wait_until_finished()
        expected = numbers(itertools.islice(stream, 5))
        fresh = loader.train_batches(numbered(30), batch_size=4, seed=0)
        restored = manager.restore(
            1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh))
        )
    np.testing.assert_array_equal(numbers(itertools.islice(restored["data"], 5)), expected)


def test_a_batch_larger_than_the_set_is_filled_from_several_epochs():
    batch = next(loader.train_batches(numbered(3), batch_size=6, seed=0))
    np.testing.assert_array_equal(np.sort(batch["label"]), [0, 0, 1, 1, 2, 2])


def test_an_empty_source_is_refused():
    with pytest.raises(UserError, match="train split is empty"):
        loader.train_batches(numbered(0), batch_size=2, seed=0)


def test_a_users_mistake_in_a_file_comes_through_the_loader():
    def read(index):
        raise UserError(f"{index}.png: damaged")

    items = Items(read, np.zeros(3, np.int32), shape=(1,), finish=lambda rows: rows)
    with pytest.raises(UserError, match="damaged"):
        next(loader.train_batches(items, batch_size=2, seed=0))


def test_evaluation_goes_in_order_and_fills_up_with_weight_0():
    batches = list(loader.eval_batches(numbered(10), batch_size=4))
    assert [len(batch["label"]) for batch in batches] == [4, 4, 4]
    weight = np.concatenate([batch["weight"] for batch in batches])
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, [1] * 10 + [0] * 2)
    np.testing.assert_array_equal(numbers(batches)[weight > 0], np.arange(10))


@pytest.mark.parametrize(("limit", "count"), [(None, 10), (0, 0), (3, 3), (8, 8), (99, 10)])
def test_evaluation_stops_at_its_limit(limit, count):
    batches = list(loader.eval_batches(numbered(10), batch_size=4, limit=limit))
    assert len(batches) == -(-count // 4)
    assert sum(batch["weight"].sum() for batch in batches) == count


def test_an_example_left_out_when_it_is_read_weighs_nothing():
    def read(index):
        return None if index == 1 else (np.full(2, index, np.uint8), index)

    items = Items(read, np.zeros(3, np.int32), shape=(2,), finish=lambda rows: rows)
    batch = items.gather([2, 1, 0])
    np.testing.assert_array_equal(batch["weight"], [1, 0, 1])
    np.testing.assert_array_equal(batch["inputs"], [[2, 2], [0, 0], [0, 0]])
    (evaluated,) = loader.eval_batches(items, batch_size=4)
    np.testing.assert_array_equal(evaluated["weight"], [1, 0, 1, 0])
    assert len(items.in_memory(text="")) == 2
