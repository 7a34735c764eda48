"""`kernels.softmax_attention` against its reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, reference, softmax_attention
from kernels import softmax_attention as op
from tests import support
from tests.kernels.compare import MASKS, agree, arrays, both, mask_of

MODULE = "kernels.softmax_attention"


def qkv(length, *, keys=None, heads=4, groups=4, dim=8, values=None, seed=0):
    keys = length if keys is None else keys
    return arrays(
        seed,
        q=(4, length, heads, dim),
        k=(4, keys, groups, dim),
        v=(4, keys, groups, dim if values is None else values),
    )


@pytest.mark.parametrize(
    ("length", "mask"),
    [(63, mask) for mask in MASKS] + [(length, "all") for length in (1, 7, 100, 257)],
)
def test_output_and_gradients_are_the_references(length, mask):
    agree(both(op, reference.softmax_attention, qkv(length), mask_of(mask, length)))


@pytest.mark.parametrize(
    "shape",
    [
        {"groups": 2},
        {"groups": 1, "dim": 3},
        {"heads": 1, "groups": 1, "dim": 64},
        {"values": 5},
        {"keys": 31},
    ],
    ids=str,
)
def test_other_shapes(shape):
    mask = mask_of("padding", shape.get("keys", 7))
    agree(both(op, reference.softmax_attention, qkv(7, **shape), mask))


@pytest.mark.parametrize("options", [{"scale": 0.7}, {"logit_cap": 1.5}], ids=str)
def test_other_logits(options):
    agree(both(op, reference.softmax_attention, qkv(7), mask_of("all", 7), **options))


@pytest.fixture
def chunked(monkeypatch):
    """At most `logits` logits per head at once: 63 keys then go by 5 queries."""
    import sys

    monkeypatch.setattr(sys.modules[MODULE], "DENSE_LOGITS", 63 * 5)


@pytest.mark.parametrize("mask", ["none", "all"])
def test_queries_in_chunks_give_the_same(chunked, mask):
    given = qkv(63, groups=2)
    agree(both(op, reference.softmax_attention, given, mask_of(mask, 63), logit_cap=3.0))


def test_more_keys_than_a_chunk_may_hold_go_query_by_query(monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules[MODULE], "DENSE_LOGITS", 10)
    agree(both(op, reference.softmax_attention, qkv(7, keys=31), mask_of("padding", 31)))


def temporaries(length):
    shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    step = jax.jit(jax.grad(lambda q, k, v: jnp.sum(softmax_attention(q, k, v)), (0, 1, 2)))
    return step.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_chunks_hold_a_fraction_of_what_the_dense_path_holds(monkeypatch):
    import sys

    dense = temporaries(1024)
    monkeypatch.setattr(sys.modules[MODULE], "DENSE_LOGITS", 1 << 15)
    assert temporaries(1024) < dense / 8
    assert temporaries(2048) < 2.2 * temporaries(1024)
    assert dense > 1024 * 1024 * 2 * 4


def test_one_query_more_than_a_chunk_makes_two_halves():
    """Not a chunk of 1,023 and one more as large for two: the flops are those of one chunk."""

    def flops(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        run = jax.jit(lambda q, k, v: softmax_attention(q, k, v, backend="xla"))
        return run.lower(shape, shape, shape).cost_analysis()["flops"]

    assert 0.5 < flops(1025) / flops(1024) < 0.55


def test_bfloat16_is_a_rounding_away():
    result = both(op, reference.softmax_attention, qkv(63), mask_of("all", 63), dtype=jnp.bfloat16)
    agree(result, forward=1e-2, backward=2e-2)


def test_logits_of_a_thousand_neither_overflow_nor_lose_the_gradient():
    given = qkv(7)
    given = given | {"q": 300 * given["q"]}
    result = both(op, reference.softmax_attention, given, mask_of("all", 7))
    assert np.isfinite(result.out).all()
    assert all(np.isfinite(g).all() for g in result.grads.values())
    agree(result, forward=2e-4, backward=2e-3)


def test_a_row_that_sees_nothing_is_zero_and_so_are_its_gradients():
    mask = mask_of("all", 63)
    result = both(op, reference.softmax_attention, qkv(63), mask)
    np.testing.assert_array_equal(result.out[3], 0)
    for grad in result.grads.values():
        np.testing.assert_array_equal(grad[3], 0)


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_jaxs_own_where_that_is_right(causal):
    q, k, v = qkv(63).values()
    keys = support.ragged_keys(63)[:3]
    keys[:, 0] = True  # a row that sees nothing is mean(v) there
    q, k, v = (jnp.asarray(x[:3]) for x in (q, k, v))
    ours = softmax_attention(q, k, v, mask=Mask(causal=causal, keys=jnp.asarray(keys)))
    seen = jnp.asarray(keys)[:, None, None, :]
    theirs = jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=causal)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_heads_that_do_not_divide_are_refused():
    q, k, v = qkv(7, heads=4, groups=3).values()
    with pytest.raises(ValueError, match="3 key-value heads do not divide 4"):
        softmax_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
