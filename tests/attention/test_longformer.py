"""What is special to Longformer: dilation by head and layer, global tokens, their projections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from efficient_attn.attention.longformer import Longformer, Sliding
from efficient_attn.errors import UserError
from kernels import Mask
from tests import support
from tests.attention.visible import exact, growth, qkv, run, sets

AHEAD = np.arange(32)[:, None] - np.arange(32)[None, :]


def core(length=32, *, width=None, layer=0, **options):
    site = support.site(width=width or 4 * length, seq=length, layer=layer)
    return Sliding(Longformer.Config(**options), site, rngs=nnx.Rngs(0), shared={})


@pytest.mark.parametrize("causal", [False, True])
def test_dilation_belongs_to_some_heads_and_global_keys_to_all(causal):
    made = core(window=6, dilation=3, dilated=1, tokens=2)
    seen = sets(made, 32, causal=causal)
    plain = AHEAD < 6 if causal else np.abs(AHEAD) <= 3
    dilated = (AHEAD < 18 if causal else np.abs(AHEAD) <= 9) & (AHEAD % 3 == 0)
    past = (AHEAD >= 0) | (not causal)
    known = np.arange(32)[None] < 2
    assert (seen[:3] == ((plain | known) & past)[None]).all()
    assert (seen[3] == ((dilated | known) & past)).all()


def test_windows_and_dilations_go_by_layer():
    for layer, reach in ((0, 1), (1, 2 * 4), (2, 2 * 4)):
        made = core(window=(2, 5), dilation=(1, 4), dilated=None, tokens=0, layer=layer)
        seen = sets(made, 32, causal=False)
        assert (np.abs(AHEAD)[None] * seen).max() == reach


def test_the_window_of_the_whole_length_is_softmax_whatever_is_global():
    q, k, v = qkv(40)
    for tokens in (0, 3, 40):
        for causal in (False, True):
            made = core(40, width=32, window=80, tokens=tokens)
            got, expected = run(made, q, k, v, causal=causal), exact(q, k, v, causal=causal)
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_no_dilation_is_a_dilation_of_one():
    q, k, v = qkv(40)
    one, none = (core(40, width=32, window=8, dilation=1, dilated=d, tokens=0) for d in (4, 0))
    np.testing.assert_array_equal(run(one, q, k, v, causal=True), run(none, q, k, v, causal=True))


def test_all_tokens_global_is_softmax_by_their_own_projections():
    made = support.holder("longformer(window=4, tokens=100)").mixer
    softmax = attention.build("softmax", support.site(), needs=(), rngs=nnx.Rngs(0))
    for name in ("query", "key", "value"):
        nnx.update(getattr(softmax, name), nnx.state(getattr(made, f"global_{name}")))
    nnx.update(softmax.out, nnx.state(made.out))
    x = jnp.asarray(support.draw_x("longformer", 40))
    got, expected = (
        jax.jit(lambda x, m=mixer: m(x, mask=Mask(), shared={}), compiler_options=support.fast())(x)
        for mixer in (made, softmax)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_projections_of_the_global_tokens_begin_as_those_of_the_windows():
    """Copies (2004.05150, section 3.1), in arrays of their own, which a step may donate."""
    made = attention.build("longformer", support.site(), needs=(), rngs=nnx.Rngs(0))
    for name in ("query", "key", "value"):
        pair = (nnx.state(getattr(made, prefix + name)) for prefix in ("", "global_"))
        for one, other in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()


def test_a_global_token_sees_all_and_is_seen_by_all():
    """And one that is not is seen by its neighbours and the global tokens alone."""
    made = support.holder("longformer(window=4, tokens=2)").mixer
    graph, state = nnx.split(made)
    mixed = jax.jit(
        jax.jacobian(lambda x: nnx.merge(graph, state)(x, mask=Mask(), shared={})[0].sum(-1))
    )(jnp.asarray(support.draw_x("longformer", 20, batch=1)))
    influence = np.abs(np.asarray(mixed)[:, 0]).max(-1) > 0
    at = np.arange(20)
    near = np.abs(at[:, None] - at[None, :]) <= 2
    np.testing.assert_array_equal(influence, near | (at[:, None] < 2) | (at[None, :] < 2))


def test_work_and_memory_are_linear():
    def call(q, k, v):
        made = core(q.shape[1], width=32, window=64, dilation=2, dilated=1, tokens=4)
        return made(q, k, v, mask=Mask(), shared={})

    work, held = growth(call, (2048, 8192))
    assert 0.97 < work < 1.03 and held < 1.1
    costs = [
        attention.cost("longformer(window=64)", support.site(seq=t), t).multiply_adds
        for t in (2048, 8192)
    ]
    assert costs[1] == 4 * costs[0] - 3 * support.WIDTH**2  # one query projection, once


def test_the_cache_reaches_as_far_as_the_widest_window():
    made = core(window=4, dilation=5, dilated=1, tokens=0)
    assert made.init_state(2, jnp.float32).keys.shape == (2, 16, 4, 32)
    assert core(window=64, tokens=0).init_state(2, jnp.float32).keys.shape[1] == 32


def test_what_does_not_fit_is_refused():
    for text, message in (
        ("longformer(window=())", r"window=\(\) must be positive"),
        ("longformer(dilation=(1, 0))", r"dilation=\(1, 0\) must be positive"),
        ("longformer(tokens=-1)", "tokens must be at least 0, not -1"),
        ("longformer(dilated=-1)", "dilated=-1 must not be negative"),
        ("longformer(dilated=5, dilation=2)", "dilated=5 exceeds heads=4; lower it"),
    ):
        with pytest.raises(UserError, match=message):
            attention.build(text, support.site(), needs=(), rngs=nnx.Rngs(0))
