"""What is special to Linformer: what is projected, by what, and what is shared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.attention.linformer import Linformer
from efficient_attn.errors import UserError
from kernels import Mask, softmax_attention
from tests import support

SHARINGS = ("none", "headwise", "key-value", "layerwise")
PROJECTIONS = ("linear", "mean", "max", "convolution")


def core(*, seq=12, width=support.WIDTH, shared=None, **options):
    shared = {} if shared is None else shared
    site = support.site(seq=seq, width=width)
    return Linformer(Linformer.Config(**options), site, rngs=nnx.Rngs(0), shared=shared)


def qkv(length=12, heads=4, dim=8):
    return [jnp.asarray(support.draw((2, length, heads, dim), seed=i)) for i in range(3)]


@pytest.mark.parametrize("causal_free_mask", [False, True])
def test_with_the_identity_for_e_and_f_it_is_exact_attention(causal_free_mask):
    q, k, v = qkv()
    one = core(rank=12)
    for projection in (one.keys, one.values):
        projection.weight[...] = jnp.eye(12)[None]
    mask = Mask(keys=jnp.ones((2, 12), bool)) if causal_free_mask else Mask()
    got = one(q, k, v, mask=mask, shared={})
    np.testing.assert_allclose(got, softmax_attention(q, k, v), atol=1e-6)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_what_is_shared_is_held_once(sharing, projection):
    shared = {}
    layers = [
        core(seq=13, rank=4, sharing=sharing, projection=projection, shared=shared)
        for _ in range(3)
    ]
    leaves = jax.tree.leaves(nnx.state(nnx.List([*layers, nnx.Dict(shared)]), nnx.Param))
    window = 4  # ceil(13 / 4)
    shape = {"linear": (4, 13), "convolution": (window, 8, 8)}.get(projection)
    count, heads = {"none": (6, 4), "headwise": (6, 1), "key-value": (3, 1), "layerwise": (1, 1)}[
        sharing
    ]
    expected = [] if shape is None else [(heads, *shape)] * count
    assert sorted(leaf.shape for leaf in leaves) == sorted(expected)


def hand(pool, x, valid):
    """Windows of 3 of 7 positions, by hand: two whole ones and the last position alone."""
    windows = [range(0, 3), range(3, 6), range(6, 7)]
    return np.stack([
        pool(x[[s for s in window if valid[s]]], axis=0) if any(valid[s] for s in window)
        else np.full_like(x[0], np.nan)
        for window in windows
    ])  # fmt: skip


@pytest.mark.parametrize("valid", [[1] * 7, [1, 1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 1]], ids=str)
@pytest.mark.parametrize("projection", ["mean", "max"])
def test_pooling_is_of_the_valid_positions_of_each_window(projection, valid):
    one = core(seq=7, rank=3, projection=projection)
    q, k, v = (np.asarray(x[:1]) - 5.0 for x in qkv(7))  # negative: a padded 0 would win a max
    out = one(*map(jnp.asarray, (q, k, v)), mask=Mask(keys=jnp.asarray([valid], bool)), shared={})
    pool = {"mean": np.mean, "max": np.max}[projection]
    keys, values = hand(pool, k[0], valid), hand(pool, v[0], valid)
    there = ~np.isnan(keys[:, 0, 0])
    logits = np.einsum("thd,shd->hts", q[0], keys[there]) / np.sqrt(8)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("hts,shd->thd", weights, values[there])
    np.testing.assert_allclose(out[0], expected, rtol=1e-5, atol=1e-5)


def test_a_convolution_of_means_is_mean_pooling():
    q, k, v = qkv()
    conv, mean = core(rank=4, projection="convolution"), core(rank=4, projection="mean")
    for projection in (conv.keys, conv.values):
        projection.weight[...] = jnp.tile(jnp.eye(8) / 3, (1, 3, 1, 1))
    got = conv(q, k, v, mask=Mask(), shared={})
    np.testing.assert_allclose(got, mean(q, k, v, mask=Mask(), shared={}), atol=1e-6)


def test_the_rank_is_a_quarter_of_the_sequence_unless_given():
    assert core(seq=40).rank == 10
    assert core(seq=3).rank == 1
    assert core(seq=40, rank=7).rank == 7


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="rank=13 exceeds the sequence length 12; lower it"):
        core(rank=13)
    with pytest.raises(ValueError, match="13 keys, but linformer was built for 12"):
        core(rank=4)(*qkv(13), mask=Mask(), shared={})
