"""The feed-forward layer: its formula, and dropout only when asked."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn.layers.mlp import Mlp
from tests import support


def test_it_is_linear_gelu_linear():
    mlp = Mlp(8, 12, dropout=0.5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = support.draw((2, 3, 8), seed=0)
    w = support.weights(mlp)
    hidden = x @ w["expand"]["kernel"] + w["expand"]["bias"]
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    expected = hidden @ w["contract"]["kernel"] + w["contract"]["bias"]
    np.testing.assert_allclose(mlp(jnp.asarray(x), rngs=None), expected, rtol=1e-5, atol=1e-5)


def test_it_drops_only_with_rngs():
    mlp = Mlp(8, 12, dropout=0.5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 3, 8))
    outs = [mlp(x, rngs=rngs) for rngs in (None, None, nnx.Rngs(dropout=0), nnx.Rngs(dropout=1))]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert np.abs(outs[2] - outs[0]).max() > 1e-3 < np.abs(outs[2] - outs[3]).max()
    assert jax.tree.leaves(nnx.state(mlp, nnx.RngState)) == []
