"""`kernels.window_attention` and `kernels.block_attention` against their float64 references."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Blocks, Mask, block_attention, join, reference, softmax_attention
from kernels import window_attention as window
from kernels.block_attention import Part, compact, runs
from kernels.window_attention import window_blocks
from tests import support
from tests.kernels.compare import MASKS, agree, arrays, both, mask_of

SLOPES = jnp.array([0.5, 0.25, 0.125, 0.0625], jnp.float32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of 4 queries or more, so that short sequences have many."""
    module = sys.modules["kernels.window_attention"]
    monkeypatch.setattr(module, "SMALLEST", 4)
    monkeypatch.setattr(module, "LARGEST", 8)
    window_blocks.cache_clear()
    yield
    window_blocks.cache_clear()


def live_logits(monkeypatch, count):
    module = sys.modules["kernels.block_attention"]
    monkeypatch.setattr(module, "LIVE", 0)
    monkeypatch.setattr(module, "FEW", count)


def one(function):
    """Output and log-sum-exp side by side, the latter 0 where nothing was seen."""

    def call(**given):
        out, lse = function(**given)
        lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return jnp.concatenate([out, lse[..., None].astype(out.dtype)], axis=-1)

    return call


def compare(op, against, given, mask, **options):
    agree(both(one(op), one(against), given, mask, **options))


def qkv(length, *, heads=4, groups=4, dim=8, values=8, seed=0):
    return arrays(
        seed,
        q=(4, length, heads, dim), k=(4, length, groups, dim), v=(4, length, groups, values),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("length", "mask"),
    [(63, mask) for mask in MASKS] + [(length, "all") for length in (1, 7, 100)],
)
def test_a_window_is_the_references(length, mask):
    compare(
        window, reference.window_attention, qkv(length, groups=2), mask_of(mask, length),
        left=9, right=3,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"left": 0, "right": 0},
        {"left": 5, "right": 0, "dilation": 3},
        {"left": 2, "right": 2, "dilation": 200},
        {"left": 1000, "right": 1000},
        {"left": 1, "right": 20, "dilation": 2, "slopes": SLOPES},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_windows(options):
    compare(
        window, reference.window_attention, qkv(37, values=5), mask_of("segments", 37), **options
    )


def scattered() -> Blocks:
    """Blocks in no order, some short, lists of uneven length that differ between two heads."""
    random = np.random.default_rng(5)
    queries = np.full(40, -1)
    queries[random.permutation(40)[:33]] = random.permutation(37)[:33]
    keys = np.full((6, 7), -1)
    keys.flat[random.permutation(42)[:37]] = random.permutation(37)
    listed = random.random((2, 8, 6)) < 0.4
    listed[:, 2] = False
    table = compact(np.where(listed, np.arange(6)[None, None], -1))
    return Blocks(queries=queries.reshape(8, 5), keys=keys, table=table)


@pytest.mark.parametrize("side", ["inside", "outside"])
@pytest.mark.parametrize("chunked", [False, True])
def test_any_blocks_are_the_references(side, chunked, monkeypatch):
    if chunked:  # three blocks at a time: the last chunk is not full
        live_logits(monkeypatch, 3 * scattered().logits // 8)
    blocks = scattered()
    banded = Blocks(
        queries=blocks.queries, keys=blocks.keys, table=blocks.table, band=(15, 10), side=side
    )
    for mask in ("all", "padding") if chunked else ("all",):
        compare(
            block_attention, reference.block_attention, qkv(37, groups=2), mask_of(mask, 37),
            blocks=banded, slopes=SLOPES,
        )  # fmt: skip


def test_parts_join_to_the_softmax_over_all_keys():
    """Inside and outside of a window, forward and gradient."""
    given, length = qkv(37, groups=2), 37

    def joined(q, k, v, mask=None):
        inner = window(q, k, v, left=6, right=2, mask=mask)
        every = Blocks(
            queries=runs(length, 8), keys=runs(length, 5), table=np.tile(np.arange(8), (1, 5, 1)),
            band=(6, 2), side="outside",
        )  # fmt: skip
        return join(inner, block_attention(q, k, v, blocks=every, mask=mask))

    for mask in ("padding", "segments"):
        agree(both(joined, reference.softmax_attention, given, mask_of(mask, length)))


def test_a_join_of_nothing_is_zero_with_gradients_of_zero():
    lse = jnp.full((1, 2, 1), -jnp.inf)
    part = lambda out, lse: Part(out, lse)  # noqa: E731
    loss = lambda out, lse: jnp.sum(join(part(out, lse), part(2 * out, lse)))  # noqa: E731
    value, grads = jax.value_and_grad(loss, (0, 1))(jnp.ones((1, 2, 1, 3)), lse)
    assert value == 0
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


def test_a_window_as_long_as_the_sequence_is_softmax():
    q, k, v = (jnp.asarray(x) for x in qkv(63).values())
    for causal in (False, True):
        got = window(q, k, v, left=62, right=62, mask=Mask(causal=causal)).out
        expected = softmax_attention(q, k, v, mask=Mask(causal=causal))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_large_logits_and_bfloat16():
    given = qkv(37)
    given["q"] = 300 * given["q"]
    result = both(
        one(window), one(reference.window_attention), given, mask_of("all", 37), left=5, right=1
    )
    agree(result, forward=2e-4, backward=2e-3)
    half = both(
        lambda **given: window(**given).out,
        lambda **given: reference.window_attention(**given)[0],
        qkv(37), mask_of("all", 37), dtype=jnp.bfloat16, left=5, right=1,
    )  # fmt: skip
    agree(half, forward=1e-2, backward=2e-2)


def temporaries(length, **options):
    shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    loss = lambda q, k, v: jnp.sum(window(q, k, v, **options).out)  # noqa: E731
    step = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=support.fast())
    return step.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_logits_and_memory_grow_with_the_length():
    for dilation in (1, 4):
        counts = [window_blocks(t, left=8, right=8, dilation=dilation).logits for t in (512, 4096)]
        assert counts[0] == 512 * 24 and counts[1] == 8 * counts[0]
    held = [temporaries(t, left=8, right=8) for t in (1024, 2048, 4096)]
    assert held[1] < 2.1 * held[0] and held[2] < 2.1 * held[1]


def test_chunks_bound_what_is_held(monkeypatch):
    whole = temporaries(4096, left=8, right=8)
    live_logits(monkeypatch, 1 << 12)
    assert temporaries(4096, left=8, right=8) < whole / 2


def test_what_does_not_fit_is_refused():
    q, k, v = (jnp.asarray(x) for x in qkv(7, groups=3).values())
    with pytest.raises(ValueError, match="3 key-value heads do not divide 4"):
        window(q, k, v, left=1, right=1)
    with pytest.raises(ValueError, match="mask.keys has length 5"):
        window(q, q, q, left=1, right=1, mask=Mask(keys=jnp.ones((4, 5), bool)))
    with pytest.raises(NotImplementedError, match="window_attention with backend 'pallas'"):
        window(q, q, q, left=1, right=1, backend="pallas")
