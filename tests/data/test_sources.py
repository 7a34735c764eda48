import numpy as np
import pytest

from efficient_attn.data import Config
from efficient_attn.data.sources import Arrays, Items, complete, hold_out


def test_held_out_parts_are_disjoint_whole_and_of_equal_shares():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    kept, out = hold_out(labels, 0.1, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, out])), np.arange(160))
    np.testing.assert_array_equal(np.bincount(labels[out]), [10, 5, 1])


def test_held_out_total_is_right_though_each_class_is_rounded():
    _, out = hold_out(np.repeat(np.arange(9), 3), 1 / 6, seed=0)
    assert abs(len(out) - 27 / 6) <= 0.5


def test_held_out_part_depends_on_the_seed_alone():
    labels = np.zeros(100, int)
    np.testing.assert_array_equal(
        hold_out(labels, 0.1, seed=1)[1], hold_out(labels, 0.1, seed=1)[1]
    )
    assert not np.array_equal(hold_out(labels, 0.1, seed=1)[1], hold_out(labels, 0.1, seed=2)[1])


def test_held_out_part_is_what_it_always_was():
    _, out = hold_out(np.zeros(40, int), 0.1, seed=0)
    np.testing.assert_array_equal(out, [4, 20, 22, 25])


@pytest.mark.parametrize("fraction", [0.0, 0.01])
def test_a_fraction_of_nothing_holds_out_nothing(fraction):
    kept, out = hold_out(np.zeros(10, int), fraction, seed=0)
    assert len(kept) == 10 and len(out) == 0


def numbered(start, count):
    rows = np.arange(start, start + count)
    return Arrays(rows[:, None], rows % 2, lambda inputs: inputs)


def members(source):
    return set(source.gather(np.arange(len(source)))["inputs"][:, 0].tolist())


@pytest.mark.parametrize("given", [(), ("test",), ("validation",), ("validation", "test")])
def test_missing_splits_come_out_of_train_and_given_ones_stay(given):
    found = {"train": numbered(0, 100)} | {
        split: numbered(1000 * n, 10) for n, split in enumerate(given, start=1)
    }
    splits, about = complete(found, Config(validation=0.1, test=0.2))
    assert set(splits) == {"train", "validation", "test"}
    sets = {split: members(source) for split, source in splits.items()}
    assert set.union(*sets.values()) == set.union(*map(members, found.values()))
    assert sum(map(len, sets.values())) == sum(map(len, found.values()))
    for split in given:
        assert sets[split] == members(found[split])
        assert f"{split}: the set's own" in about


def test_the_test_split_does_not_depend_on_the_configs_seed():
    a, _ = complete({"train": numbered(0, 100)}, Config(seed=0))
    b, _ = complete({"train": numbered(0, 100)}, Config(seed=1))
    assert members(a["test"]) == members(b["test"])
    assert members(a["validation"]) != members(b["validation"])


def test_both_kinds_of_source_give_the_same_examples():
    inputs = np.arange(12, dtype=np.uint8).reshape(6, 2)
    labels = np.arange(6, dtype=np.int32)
    arrays = Arrays(inputs, labels, lambda rows: rows.astype(np.float32))
    items = Items(
        lambda i: (inputs[i], int(labels[i])),
        labels,
        shape=(2,),
        finish=lambda rows: rows.astype(np.float32),
    )
    for one, other in ((arrays, items), (arrays.take([4, 2]), items.take([4, 2]))):
        assert len(one) == len(other)
        for name, value in one.gather([1, 0]).items():
            np.testing.assert_array_equal(other.gather([1, 0])[name], value)
            assert other.gather([1, 0])[name].dtype == value.dtype
        assert one[1]["label"] == other[1]["label"] and isinstance(one[1]["label"], int)
        np.testing.assert_array_equal(one[1]["inputs"], other[1]["inputs"])
    np.testing.assert_array_equal(items.take([5, 1]).labels, [5, 1])
    np.testing.assert_array_equal(items.take([5, 1]).in_memory(text="").labels, [5, 1])
