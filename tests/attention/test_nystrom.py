"""What is special to Nystromformer: its landmarks, its pseudo-inverse, what it tends to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.attention.nystrom import Nystrom, pseudo_inverse, segment_means, segments
from efficient_attn.errors import UserError
from efficient_attn.tools.count import multiply_adds
from kernels import Mask, softmax_attention
from tests import support


def core(**options):
    return Nystrom(Nystrom.Config(**options), support.site(), rngs=nnx.Rngs(0), shared={})


def call(one, q, k, v, mask=None):
    run = jax.jit(
        lambda q, k, v: one(q, k, v, mask=mask or Mask(), shared={}),
        compiler_options=support.fast(),
    )
    return run(q, k, v)


def qkv(length, *, scale=1.0):
    q, k, v = (jnp.asarray(support.draw((3, length, 4, 8), seed=i)) for i in range(3))
    return scale * q, scale * k, v


@pytest.mark.parametrize("length", [1, 12])
def test_with_a_landmark_for_each_token_it_tends_to_exact_attention(length):
    q, k, v = qkv(length, scale=2.0)
    exact = softmax_attention(q, k, v)
    off = []
    for iterations in (6, 12, 20):
        one = core(landmarks=12, iterations=iterations, kernel=None)
        off.append(float(jnp.abs(call(one, q, k, v) - exact).max()))
    assert off[-1] < 5e-4, off  # rounding times the condition of softmax(q k^T), up to 4e4
    assert length == 1 or off[-1] < off[0] / 10


def test_the_inverse_of_a_known_matrix_is_found_to_the_third_order():
    known = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]], np.float32)
    off = [
        np.linalg.norm(np.eye(3) - known @ np.asarray(pseudo_inverse(jnp.asarray(known), n)), 2)
        for n in range(8)
    ]
    assert off[-1] < 1e-5
    near = [e for e in off if 1e-5 < e < 0.5]
    assert len(near) > 1
    for before, after in zip(near, near[1:], strict=False):
        assert after < 2 * before**3 + 1e-6


def test_rows_and_columns_of_zeros_are_left_out_of_the_inverse():
    known = jnp.asarray([[0.9, 0.1], [0.3, 0.7]])
    wide = jnp.zeros((4, 4)).at[jnp.array([[0], [2]]), jnp.array([[0, 2]])].set(known)
    got = pseudo_inverse(wide, 10)
    np.testing.assert_allclose(got, np.linalg.pinv(np.asarray(wide)), atol=1e-5)
    np.testing.assert_array_equal(pseudo_inverse(jnp.zeros((2, 2)), 6), 0)


def test_segments_are_equal_shares_of_what_is_valid():
    valid = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1, 0]], bool)
    got = np.asarray(segments(jnp.asarray(valid), 3))
    assert [list(g[there]) for g, there in zip(got, valid, strict=True)] == [
        [0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 2], [0, 1],
    ]  # fmt: skip
    x = jnp.arange(21.0).reshape(3, 7, 1, 1)
    means, alive = segment_means(x, jnp.asarray(got), jnp.asarray(valid), 3)
    expected = [[1.0, 3.5, 5.5], [(8 + 10) / 2, 11.0, 13.0], [16.0, 19.0, 0.0]]
    np.testing.assert_allclose(means[..., 0, 0], expected)
    np.testing.assert_array_equal(alive, [[1, 1, 1], [1, 1, 1], [1, 1, 0]])


def test_masked_tokens_are_as_if_they_were_not_there():
    """Holes too, not only a padded end: the landmarks are means over the others."""
    q, k, v = qkv(20)
    there = np.array([t % 3 != 1 for t in range(20)])
    one = core(landmarks=5, kernel=None)
    keys = jnp.asarray(there)[None].repeat(3, 0)
    masked = call(one, q, k, v, Mask(keys=keys))[:, there]
    cut = call(one, q[:, there], k[:, there], v[:, there])
    np.testing.assert_allclose(masked, cut, rtol=1e-4, atol=1e-5)


def test_the_start_of_the_inverse_is_each_matrix_s_own():
    """The released code divides by the largest column sum of the whole batch."""
    matrices = jax.nn.softmax(jnp.asarray(support.draw((2, 5, 5), seed=0)), axis=-1)
    together = pseudo_inverse(matrices, 2)
    np.testing.assert_array_equal(together[0], pseudo_inverse(matrices[:1], 2)[0])
    column_sums = np.asarray(matrices).sum(-2).max(-1)
    assert abs(column_sums[0] - column_sums[1]) > 0.1, "or the released code would agree"


def test_the_convolution_is_added_to_the_attention():
    q, k, v = qkv(9)
    with_it, without = core(landmarks=4, kernel=3), core(landmarks=4, kernel=None)
    with_it.kernel[...] = jnp.asarray([[0.0, 1.0, 0.0]] * 2 + [[1.0, 0.0, 0.0]] * 2)
    added = call(with_it, q, k, v) - call(without, q, k, v)
    np.testing.assert_allclose(added[:, :, :2], v[:, :, :2], atol=1e-5)
    np.testing.assert_allclose(added[:, 1:, 2:], v[:, :-1, 2:], atol=1e-5)
    np.testing.assert_allclose(added[:, 0, 2:], 0, atol=1e-5)


def test_the_work_grows_with_the_length():
    one = core(landmarks=8)
    counts = []
    for length in (256, 512):
        q = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)
        counts.append(multiply_adds(lambda q: one(q, q, q, mask=Mask(), shared={}), q))
    assert counts[1] - counts[0] == 4 * 256 * 8 * 32  # 4 T m E; what is left does not grow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"landmarks": 0}, "landmarks must be at least 1, not 0"),
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
        ({"kernel": 4}, "kernel=4 must be a positive odd number, or None"),
    ],
)
def test_a_mistake_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        core(**options)


def test_the_taps_are_drawn_evenly_on_both_sides_of_zero():
    site = support.site(width=512, heads=64)
    taps = Nystrom(Nystrom.Config(kernel=33), site, rngs=nnx.Rngs(0), shared={}).kernel[...]
    bound = 33**-0.5
    np.testing.assert_allclose([taps.min(), taps.max()], [-bound, bound], rtol=0.01)
    assert abs(taps.mean()) < 0.05 * bound  # the mean's own deviation is 0.013 of it
