"""`make_rngs` draws what `nnx.Rngs` draws, traced or not."""

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_attn.layers.rngs import make_rngs

SEEDS = {"number": lambda: 3, "key": lambda: jax.random.key(5)}


def draws(rngs):
    keys = [rngs.params(), rngs.params(), rngs.dropout(), rngs.params(), rngs.fork().params()]
    return np.stack([jax.random.key_data(key) for key in keys])


@pytest.mark.parametrize("kind", SEEDS)
def test_the_keys_are_those_of_flax(kind):
    seed = SEEDS[kind]()
    expected = draws(nnx.Rngs(seed))
    np.testing.assert_array_equal(draws(make_rngs(seed)), expected)
    assert len(np.unique(expected, axis=0)) == 5


@pytest.mark.parametrize("kind", SEEDS)
def test_a_layer_made_in_a_trace_has_the_weights_of_one_that_was_not(kind):
    def weights(make):
        rngs = make(SEEDS[kind]())
        layers = [nnx.Linear(3, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)]
        return [
            jax.tree.leaves(nnx.state(layer)) for layer in [*layers, nnx.Linear(4, 3, rngs=rngs)]
        ]

    traced = jax.jit(lambda: weights(make_rngs))()
    for one, other in zip(jax.tree.leaves(traced), jax.tree.leaves(weights(nnx.Rngs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
