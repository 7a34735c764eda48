"""What is special to BigBird: the blocks that a block sees, and which of them are drawn."""

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import attention
from efficient_attn.attention.bigbird import BigBird
from efficient_attn.errors import UserError
from kernels import Mask
from tests import support
from tests.attention.visible import core, exact, growth, qkv, run, sets


def blocks(seen, size):
    """[H,N,N]: which blocks see which, all of their tokens or none."""
    whole = seen.reshape(len(seen), -1, size, seen.shape[2] // size, size)
    assert (whole.any((2, 4)) == whole.all((2, 4))).all()
    return whole.any((2, 4))


@pytest.mark.parametrize(("first", "last", "window"), [(1, 1, 3), (2, 0, 1), (0, 3, 5)])
def test_a_block_sees_window_globals_and_as_many_drawn_ones_as_asked(first, last, window):
    made = core(
        BigBird, length=48,
        options={"block": 4, "window": window, "random": 2, "first": first, "last": last},
    )  # fmt: skip
    seen = blocks(sets(made, 48, causal=False), 4)
    number = np.arange(12)
    dense = (number < first) | (number >= 12 - last)
    near = np.abs(number[:, None] - number[None, :]) <= window // 2
    known = near | dense[:, None] | dense[None, :]
    assert (seen | ~known[None]).all()
    drawn = (seen & ~known[None]).sum(-1)
    assert (drawn == np.minimum(2, (~known).sum(-1))[None]).all()


def test_what_is_drawn_differs_by_head_layer_and_seed_and_is_the_same_again():
    def seen(seed=0, layer=0):
        made = core(BigBird, length=48, layer=layer, options={"block": 4, "seed": seed})
        return sets(made, 48, causal=False)

    first = seen()
    assert (first[0] != first[1]).any() and (first[1] != first[2]).any()
    assert (seen(layer=1) != first).any() and (seen(seed=1) != first).any()
    assert (seen() == first).all()


def test_a_shorter_sequence_sees_the_same_blocks():
    made = core(BigBird, length=48, options={"block": 4})
    whole = sets(made, 48, causal=False)
    for length in (22, 37):
        site = core(BigBird, length=length, seq=48, options={"block": 4})
        assert (sets(site, length, causal=False) == whole[:, :length, :length]).all()


@pytest.mark.parametrize("options", [{"random": 10}, {"window": 21}, {"first": 10}], ids=str)
def test_all_blocks_are_softmax(options):
    q, k, v = qkv(38)
    made = core(BigBird, length=38, width=32, options={"block": 4} | options)
    np.testing.assert_allclose(run(made, q, k, v), exact(q, k, v), rtol=1e-6, atol=1e-6)


def test_work_and_memory_are_linear():
    def call(q, k, v):
        made = core(BigBird, length=q.shape[1], width=32, options={"block": 16})
        return made(q, k, v, mask=Mask(), shared={})

    work, held = growth(call, (2048, 8192))
    assert 0.97 < work < 1.03 and held < 1.05


def test_what_does_not_fit_is_refused():
    for options, message in (
        ({"window": 2}, "window=2 must be odd"),
        ({"block": 0}, "block must be at least 1, not 0"),
        ({"random": -1}, "random must be at least 0, not -1"),
    ):
        with pytest.raises(UserError, match=message):
            core(BigBird, options=options)


def test_a_sequence_of_no_tokens_is_refused():
    empty = jnp.zeros((1, 0, 4, 32))
    with pytest.raises(ValueError, match="0 queries and 0 keys: give at least one of each"):
        core(BigBird)(empty, empty, empty, mask=Mask(), shared={})


def test_a_block_longer_than_the_sequence_is_softmax_at_its_cost():
    q, k, v = qkv(17)
    made = core(BigBird, length=64, width=32, options={"block": 64})
    np.testing.assert_allclose(run(made, q, k, v), exact(q, k, v), rtol=1e-6, atol=1e-6)
    where = support.site(seq=64)
    costs = [attention.cost(text, where, 17).multiply_adds for text in ("bigbird", "softmax")]
    assert costs[0] == costs[1]
