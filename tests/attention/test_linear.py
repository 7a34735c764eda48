"""What is special to linear attention: its feature maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from efficient_attn.attention.linear import FIXED
from efficient_attn.errors import UserError
from kernels import Mask
from tests import support

X = jnp.asarray(support.draw((2, 9, 3, 4), seed=0))


def core(kind):
    mixer = attention.build(
        f"linear(feature_map='{kind}')",
        attention.Site(width=12, heads=3, seq=9),
        needs=(),
        rngs=nnx.Rngs(0),
    )
    return mixer.core


def test_the_maps_without_parameters_are_the_textbook_functions():
    np.testing.assert_allclose(FIXED["elu"](X), np.where(X > 0, X + 1, np.exp(X)), rtol=1e-6)
    np.testing.assert_array_equal(FIXED["relu"](X), np.maximum(X, 0))
    np.testing.assert_allclose(FIXED["squared_relu"](X), np.maximum(X, 0) ** 2, rtol=1e-6)
    shares = np.exp(X) / np.exp(X).sum(-1, keepdims=True)
    np.testing.assert_allclose(FIXED["softmax"](X), shares, rtol=1e-5)


def test_taylor_features_give_the_exponential_to_second_order():
    logits = np.einsum("bthd,bshd->bhts", X, X) / 2.0
    phi = FIXED["taylor"](X)
    found = np.einsum("bthr,bshr->bhts", phi, phi)
    np.testing.assert_allclose(found, 1 + logits + logits**2 / 2, rtol=1e-4, atol=1e-5)
    assert found.min() >= 0.5 - 1e-5, "the parabola's least value"


def test_a_fresh_hedgehog_is_the_softmax_of_the_input_and_of_its_negative():
    phi, scale = core("hedgehog").features(X, None)
    assert scale is None
    first, second = np.split(np.asarray(phi), 2, axis=-1)
    np.testing.assert_allclose(first, jax.nn.softmax(X), rtol=1e-5)
    np.testing.assert_allclose(second, jax.nn.softmax(-X), rtol=1e-5)


@pytest.mark.parametrize("kind", [*FIXED, "hedgehog", "t2r"])
def test_there_are_as_many_features_as_the_cost_counts(kind):
    made = core(kind)
    phi, _ = made.features(X, None)
    assert phi.shape[-1] == made.count(made.config, made.site)
    state = made.init_state(2, jnp.float32)
    assert state.sums.shape == (2, 3, phi.shape[-1], 4)


def test_equal_keys_give_the_mean_of_the_values():
    made = core("elu")
    k = jnp.ones_like(X)
    out = made(X, k, X, mask=Mask(), shared={})
    expected = jnp.broadcast_to(jnp.mean(X, axis=1, keepdims=True), X.shape)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_map_is_refused_by_name():
    with pytest.raises(UserError, match="feature_map"):
        attention.pattern("linear(feature_map='elou')", 1)
