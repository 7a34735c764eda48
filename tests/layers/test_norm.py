"""Norms keep their precision where the mean is far from 0."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.attention.recurrent import head_norm
from efficient_attn.layers.norm import make_norm
from tests import support


@pytest.mark.parametrize("kind", ["block", "head"])
def test_a_mean_a_thousand_times_the_spread_is_taken_out_precisely(kind):
    spread = np.random.default_rng(0).standard_normal((4, 64))
    x = (1000 + spread).astype(np.float32)
    rngs = nnx.Rngs(0)
    norms = {
        "block": make_norm("layernorm", 64, dtype=jnp.float32, rngs=rngs),
        "head": head_norm("layer", 64, support.site(), rngs=rngs),
    }
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    np.testing.assert_allclose(norms[kind](jnp.asarray(x)), exact, rtol=1e-3, atol=1e-4)
