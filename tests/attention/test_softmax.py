"""What is special to exact attention: shared key-value heads, capped logits, the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.attention.softmax import KeyValueCache, Softmax
from efficient_attn.errors import UserError
from kernels import Mask
from tests import support


def core(seq=support.SEQ, **options):
    return Softmax(Softmax.Config(**options), support.site(seq=seq), rngs=nnx.Rngs(0), shared={})


def qkv(groups=4):
    shapes = [(2, 9, 4, 8), (2, 9, groups, 8), (2, 9, groups, 8)]
    return [jnp.asarray(support.draw(s, seed=i)) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_heads_are_repeated_heads(groups):
    q, k, v = qkv(groups)
    whole = [jnp.repeat(x, 4 // groups, axis=2) for x in (k, v)]
    few = core(kv_heads=groups)(q, k, v, mask=Mask(), shared={})
    np.testing.assert_allclose(few, core()(q, *whole, mask=Mask(), shared={}), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_jaxs_own(causal):
    q, k, v = qkv()
    ours = core()(q, k, v, mask=Mask(causal=causal), shared={})
    theirs = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("cap", [0.5, 5.0])
def test_a_cap_bounds_the_ratio_of_any_two_weights(cap):
    """Of two keys, one with a huge logit: the other keeps at least e^(-2 cap) of its weight."""
    q = jnp.zeros((1, 1, 4, 8)).at[..., 0].set(100.0)
    k = jnp.zeros((1, 2, 4, 8)).at[:, 0, :, 0].set(100.0).at[:, 1, :, 0].set(-100.0)
    v = jnp.zeros((1, 2, 4, 8)).at[:, 1].set(1.0)
    out = core(logit_cap=cap)(q, k, v, mask=Mask(), shared={})
    np.testing.assert_allclose(out, 1 / (1 + np.exp(2 * cap)), rtol=1e-5)


def test_a_large_cap_changes_nothing():
    q, k, v = qkv()
    capped = core(logit_cap=1e4)(q, k, v, mask=Mask(), shared={})
    np.testing.assert_allclose(capped, core()(q, k, v, mask=Mask(), shared={}), atol=1e-5)


def test_the_cache_has_the_dtype_that_was_asked_for():
    state = core(kv_heads=2).init_state(3, jnp.bfloat16)
    assert state.keys.shape == state.values.shape == (3, support.SEQ, 2, 8)
    assert state.keys.dtype == state.values.dtype == jnp.bfloat16


def test_key_value_heads_divide_the_heads():
    with pytest.raises(UserError, match="kv_heads=3 does not divide heads=4"):
        core(kv_heads=3)


@pytest.mark.parametrize("farthest", [0, 127, 128, 255, 256, 299])
def test_a_step_reads_the_shortest_beginning_of_the_cache_that_will_do(farthest):
    """The other example is near; rows that need not be read are NaN, and are not."""
    long = core(seq=300)
    q, k, v = (jnp.asarray(support.draw((2, 300, 4, 8), seed=i)) for i in range(3))
    position = jnp.asarray([farthest, min(farthest, 3)])
    written = next(count for count in (128, 256, 300) if count > farthest)
    state = KeyValueCache(*(x.at[:, written:].set(jnp.nan) for x in (k, v)))
    of = (jnp.arange(2), position)
    out, after = long.step(*(x[of][:, None] for x in (q, k, v)), state, position=position)
    expected = long(q, k, v, mask=Mask(causal=True), shared={})[of][:, None]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.keys, state.keys)
