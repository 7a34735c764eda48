"""The order of examples: each epoch has every one once, in an order that never changes."""

import numpy as np
import pytest

from efficient_attn.data.order import Order


@pytest.mark.parametrize("count", [1, 2, 300, 65_537])
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_every_epoch_has_every_example_once(count, seed):
    order = Order(count, seed)
    epochs = order.at(np.arange(3 * count)).reshape(3, count)
    np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(count), (3, count)))
    if count >= 300:
        assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
        assert (epochs[0] != Order(count, 1).at(np.arange(count))).any()


def test_a_place_has_its_example_whatever_was_asked_before():
    whole = Order(7, 3).at(np.arange(35))
    order, places = Order(7, 3), np.array([34, 0, 8, 6, 7, 20, 34])
    np.testing.assert_array_equal(order.at(places), whole[places])


def test_the_order_is_that_of_all_runs_before():
    assert Order(5, 0).at(np.arange(10)).tolist() == [2, 0, 3, 4, 1, 0, 1, 3, 2, 4]
