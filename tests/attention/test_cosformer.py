"""What is special to cosFormer: the cosine of the distance."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from efficient_attn.errors import UserError
from kernels import Mask
from tests import support

SITE = attention.Site(width=32, heads=4, seq=64)


def mixer(expression):
    return attention.build(expression, SITE, needs=(), rngs=nnx.Rngs(0))


def test_a_far_horizon_is_linear_attention_with_relu():
    x = jnp.asarray(support.draw((2, 64, 32), seed=0))
    one, other = mixer("cosformer(horizon=1_000_000)"), mixer("linear(feature_map='relu')")
    nnx.update(other, nnx.state(one))
    out, expected = (made(x, mask=Mask(causal=True), shared={}) for made in (one, other))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_a_weight_falls_as_the_cosine_of_the_distance():
    core = mixer("cosformer").core
    ones = jnp.ones((1, 64, 4, 8))
    phi, _ = core.features(ones, jnp.arange(64)[None])
    weights = np.einsum("tr,sr->ts", phi[0, :, 0], phi[0, :, 0]) / 8
    distance = np.arange(64)[:, None] - np.arange(64)[None]
    np.testing.assert_allclose(weights, np.cos(np.pi * distance / 128), atol=1e-5)
    assert weights.min() > 0, "no weight is negative within the horizon"


def test_a_horizon_within_the_sequence_is_refused():
    with pytest.raises(UserError, match="horizon=63 is shorter than the sequence, 64"):
        mixer("cosformer(horizon=63)")


def test_there_is_no_distance_between_two_sequences():
    with pytest.raises(UserError, match="cosformer does not support cross"):
        attention.build("cosformer", SITE, needs={"cross"}, rngs=nnx.Rngs(0))
