"""What is special to Sinkhorn attention: the operator, what is moved where, noise, SortCut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from efficient_attn.attention.sinkhorn import Sinkhorn, moved, sinkhorn
from efficient_attn.errors import UserError
from kernels import Mask, softmax_attention
from tests import support


def mixer(*, seq=24, **options):
    config = Sinkhorn.Config(**options)
    return Sinkhorn(config, support.site(seq=seq), rngs=nnx.Rngs(0), shared={})


def x_of(length=24, seed=0):
    return jnp.asarray(support.draw((2, length, support.WIDTH), seed=seed))


def call(one, x, *, keys=None, rngs=None):
    if rngs is not None:  # they count, which they may not in a function compiled around them
        return one(x, mask=Mask(keys=keys), rngs=rngs, shared={})
    run = jax.jit(
        lambda x, keys: one(x, mask=Mask(keys=keys), shared={}),
        compiler_options=support.fast(),
    )
    return run(x, keys)


def heads_of(one, x):
    return [part(x).reshape(*x.shape[:2], 4, 8) for part in (one.query, one.key, one.value)]


def everything(number):
    return jnp.ones((1, 1, number), bool)


def test_many_iterations_make_rows_and_columns_of_one():
    scores = 2 * jnp.asarray(support.draw((1, 2, 6, 6), seed=0))
    off = []
    for iterations in (1, 5, 50):
        order = sinkhorn(scores, everything(6), iterations)
        np.testing.assert_allclose(order.sum(-2), 1, atol=1e-5)  # columns come last
        off.append(float(jnp.abs(order.sum(-1) - 1).max()))
    assert off[0] > 0.05 and off[1] < off[0] / 3 and off[2] < 1e-5, off


def test_sharp_scores_give_their_permutation():
    """And not each row's largest, where two rows want the same."""
    by_row = jnp.array([[[[0.0, 3.0, 5.0], [4.0, 0.0, 4.5], [0.0, 1.0, 0.0]]]])
    order = sinkhorn(by_row / 0.05, everything(3), 200)
    wanted = np.eye(3)[[2, 0, 1]]  # the assignment of the largest sum, 5 + 4 + 1
    np.testing.assert_allclose(order[0, 0], wanted, atol=1e-2)


def test_blocks_that_are_not_live_take_no_part():
    scores = jnp.asarray(support.draw((1, 1, 4, 4), seed=1))
    live = jnp.array([[[True, False, True, True]]])
    got = np.asarray(sinkhorn(scores, live, 6))[0, 0]
    rest = np.array([0, 2, 3])
    alone = sinkhorn(scores[:, :, rest][:, :, :, rest], everything(3), 6)[0, 0]
    np.testing.assert_allclose(got[np.ix_(rest, rest)], alone, rtol=1e-5)
    assert not got[1].any() and not got[:, 1].any()


@pytest.mark.parametrize("sortcut", [None, 1, 3])
def test_one_block_is_exact_attention(sortcut):
    one, x = mixer(block=24, sortcut=sortcut), x_of()
    q, k, v = heads_of(one, x)
    expected = one.out(softmax_attention(q, k, v).reshape(x.shape))
    np.testing.assert_allclose(call(one, x), expected, rtol=1e-5, atol=1e-5)


def with_order(one, order):
    """The mixer with S given, the same for all examples and heads."""
    one.order = lambda x, valid, rngs: jnp.broadcast_to(
        jnp.asarray(order, jnp.float32), (2, 4, 4, 4)
    )
    return one


def test_a_permutation_brings_its_block_and_padding_stays_behind():
    """By hand: blocks of 6; query block i sees its own block and block p(i), tokens alone."""
    permutation, x = [2, 0, 3, 1], x_of()
    keys = np.ones((2, 24), bool)
    keys[0, 19:], keys[1, [1, 7, 8]] = False, False
    one = with_order(mixer(block=6), np.eye(4)[permutation])
    q, k, v = heads_of(one, x)
    got = call(one, x, keys=jnp.asarray(keys))
    for i, brought in enumerate(permutation):
        rows = slice(6 * i, 6 * i + 6)
        seen = np.r_[6 * brought : 6 * brought + 6, 6 * i : 6 * i + 6]
        expected = softmax_attention(
            q[:, rows], k[:, seen], v[:, seen], mask=Mask(keys=jnp.asarray(keys[:, seen]))
        )
        expected = one.out(expected.reshape(2, 6, -1))
        np.testing.assert_allclose(got[:, rows], expected, rtol=1e-4, atol=1e-5)
    other = call(with_order(one, np.eye(4)[[1, 2, 3, 0]]), x, keys=jnp.asarray(keys))
    assert np.abs(got - other).max() > 0.1, "the order has no influence in the released code"


def test_sortcut_shows_all_queries_the_first_blocks_sorted():
    permutation, x = [2, 0, 3, 1], x_of()
    one = with_order(mixer(block=6, sortcut=2), np.eye(4)[permutation])
    q, k, v = heads_of(one, x)
    seen = np.r_[12:18, 0:6]
    expected = one.out(softmax_attention(q, k[:, seen], v[:, seen]).reshape(x.shape))
    np.testing.assert_allclose(call(one, x), expected, rtol=1e-5, atol=1e-5)


def test_sortcut_takes_the_first_blocks_that_hold_tokens():
    x, keys = x_of(), np.ones((2, 24), bool)
    keys[:, :6] = False
    one = with_order(mixer(block=6, sortcut=1), np.eye(4))
    q, k, v = heads_of(one, x)
    expected = one.out(softmax_attention(q, k[:, 6:12], v[:, 6:12]).reshape(x.shape))
    got = call(one, x, keys=jnp.asarray(keys))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_soft_order_mixes_tokens_place_by_place():
    order = jnp.array([[[[0.25, 0.75], [0.5, 0.5]]]])
    keys = jnp.arange(4.0).reshape(1, 2, 2, 1, 1)  # block 0 holds 0, 1 and block 1 holds 2, 3
    there = jnp.ones((1, 2, 2), bool)
    got, _, share = moved(keys, keys, there, order)
    np.testing.assert_allclose(got[0, :, :, 0, 0], [[1.5, 2.5], [1.0, 2.0]])
    np.testing.assert_array_equal(share, 1)
    hole = there.at[0, 1, 1].set(False)  # 3 is padding
    got, _, share = moved(jnp.where(hole[..., None, None], keys, 0), keys, hole, order)
    np.testing.assert_allclose(got[0, :, :, 0, 0], [[1.5, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(share[0, ..., 0], [[1, 0.25], [1, 0.5]])


def test_noise_is_for_training_alone():
    one, still, x = mixer(block=6), mixer(block=6, noise="none"), x_of()
    calm = call(one, x)
    np.testing.assert_array_equal(calm, call(one, x))
    noisy = [call(one, x, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert all(np.abs(a - b).max() > 1e-3 for a, b in [(noisy[0], noisy[2]), (noisy[0], calm)])
    without = call(still, x, rngs=nnx.Rngs(dropout=0))
    np.testing.assert_allclose(call(still, x), without, rtol=1e-5, atol=1e-5)


def test_a_low_temperature_sharpens_the_order():
    valid = jnp.ones((2, 24), bool)
    largest = []
    for temperature in (4.0, 0.1):
        one = mixer(block=6, temperature=temperature, network="linear", iterations=50)
        largest.append(float(jnp.mean(jnp.max(one.order(x_of(), valid, None), axis=-1))))
    assert largest[0] < 0.5 and largest[1] > 0.8, largest


def test_gradients_reach_the_sorting_network_through_the_operator():
    x = support.draw_x("sinkhorn(block=16)", 63)
    grads = support.run("sinkhorn(block=16)", x, keys=support.everyone(63)).grad.params
    for leaf in jax.tree.leaves(grads["mixer"]["sort"]):
        assert np.abs(leaf).max() > 1e-5


def test_sortcut_does_linear_work():
    cost = [
        attention.cost("sinkhorn(block=64, sortcut=2)", support.site(seq=t), t).multiply_adds
        for t in (1024, 16384)
    ]
    assert np.log(cost[1] / cost[0]) / np.log(16) < 1.2  # scores are of (T / 64)^2 blocks


def test_a_block_longer_than_the_sequence_costs_no_more_than_the_sequence():
    whole, longer, x = mixer(block=17, seq=17), mixer(block=20, seq=17), x_of(17)
    nnx.update(longer, nnx.state(whole))
    np.testing.assert_allclose(call(longer, x), call(whole, x), rtol=1e-6, atol=1e-6)
    costs = [
        attention.cost(f"sinkhorn(block={block})", support.site(seq=17), 17) for block in (17, 64)
    ]
    assert costs[0] == costs[1]


def test_a_longer_sequence_than_it_was_built_for_is_refused():
    with pytest.raises(ValueError, match="25 tokens, but sinkhorn was built for 24"):
        call(mixer(), x_of(25))


def test_it_is_refused_where_a_model_is_causal():
    with pytest.raises(UserError, match="does not support causal"):
        attention.build("sinkhorn", support.site(), needs={"causal"}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block must be at least 1, not 0"),
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"sortcut": 0}, "sortcut=0 must be positive, or None"),
    ],
)
def test_a_mistake_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sinkhorn.Config(**options)
