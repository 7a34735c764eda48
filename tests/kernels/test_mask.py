"""`kernels.Mask`: what it shows, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, linear_attention, local_conv, softmax_attention, window_attention


def test_visible_is_the_conjunction_of_all_it_says():
    keys = np.array([[1, 1, 0, 1]], bool)
    segments = np.array([[5, 5, 5, 9]], np.int32)
    mask = Mask(causal=True, keys=jnp.asarray(keys), segments=jnp.asarray(segments))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(mask.visible(jnp.arange(4), 4)[0, 0], np.array(expected, bool))
    np.testing.assert_array_equal(
        mask.visible(jnp.array([3, 1]), 4)[0, 0], np.array(expected, bool)[[3, 1]]
    )
    assert mask.needs == {"causal", "padding", "segments"}
    assert Mask().needs == frozenset()


def test_it_is_a_pytree_whose_causality_is_static():
    mask = Mask(causal=True, keys=jnp.ones((2, 3), bool))
    assert len(jax.tree.leaves(mask)) == 1
    first = jax.tree.map(lambda x: x[:1], mask)
    assert first.causal and first.keys.shape == (1, 3)
    assert jax.jit(lambda m: m.keys.sum() * m.causal)(mask) == 6


@pytest.mark.parametrize(
    ("mask", "queries", "keys", "message"),
    [
        (Mask(causal=True), 3, 4, "as many keys as queries, not 4 and 3"),
        (Mask(segments=jnp.zeros((1, 4), int)), 3, 4, "as many keys as queries"),
        (Mask(keys=jnp.ones((1, 3), bool)), 3, 4, "mask.keys has length 3, the keys have 4"),
        (Mask(segments=jnp.zeros((1, 3), int)), 4, 4, "mask.segments has length 3"),
    ],
)
def test_what_does_not_fit_is_refused_by_every_op(mask, queries, keys, message):
    q, k = jnp.ones((1, queries, 2, 4)), jnp.ones((1, keys, 2, 4))
    for op in (softmax_attention, linear_attention):
        with pytest.raises(ValueError, match=message):
            op(q, k, k, mask=mask)
    if queries == keys:
        with pytest.raises(ValueError, match=message):
            local_conv(jnp.ones((1, keys, 4)), jnp.ones((1, 1, 2, 3)), mask=mask)


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 3), (3, 0)])
def test_an_empty_sequence_is_refused(queries, keys):
    q, k = jnp.ones((1, queries, 2, 4)), jnp.ones((1, keys, 2, 4))
    ops = [softmax_attention, linear_attention]
    if queries == keys:
        ops.append(lambda q, k, v: window_attention(q, k, v, left=1, right=1))
    for op in ops:
        with pytest.raises(ValueError, match=f"{queries} queries and {keys} keys: give at least"):
            op(q, k, k)
