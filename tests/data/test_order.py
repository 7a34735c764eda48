"""The order of examples, an epoch at a time, against grain's, index by index."""

import grain
import numpy as np
import pytest
from grain.experimental import index_shuffle

from efficient_attn.data.order import Order, permutation


@pytest.mark.parametrize("count", [1, 2, 300, 65_536, 65_537, 65_538, 300_000])
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_a_permutation_is_that_of_grain(count, seed):
    found = permutation(count, seed)
    places = np.unique(np.linspace(0, count - 1, 20).astype(int))
    grains = [index_shuffle(int(i), max_index=count - 1, seed=seed, rounds=4) for i in places]
    np.testing.assert_array_equal(found[places], grains)
    if count != 65_537:  # there grain's own is none
        np.testing.assert_array_equal(np.sort(found), np.arange(count))


@pytest.mark.parametrize("seed", [0, 7])
def test_the_order_of_a_run_is_that_of_a_shuffled_repeated_set(seed):
    grains = grain.MapDataset.range(300).seed(seed).shuffle().repeat(None)
    places = np.array([0, 1, 298, 299, 300, 301, 599, 600, 3333])
    np.testing.assert_array_equal(Order(300, seed).at(places), [grains[int(i)] for i in places])
