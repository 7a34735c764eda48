"""What is special to local attention: the sets of keys, its limit, its cache."""

import numpy as np
import pytest
from flax import nnx

from efficient_attn.attention.local import Local
from efficient_attn.errors import UserError
from kernels import Mask
from tests import support
from tests.attention.visible import core, exact, growth, qkv, run, sets

AT = np.arange(32)
AHEAD = AT[:, None] - AT[None, :]


@pytest.mark.parametrize("window", [1, 2, 5, 17, 31, 64])
def test_a_sliding_window_is_the_last_w_tokens_or_half_of_them_on_each_side(window):
    made = core(Local, options={"window": window})
    expected = (AHEAD >= 0) & (window > AHEAD)
    assert (sets(made, 32, causal=True) == expected[None]).all()
    assert (sets(made, 32, causal=False) == (np.abs(AHEAD) <= window // 2)[None]).all()


def test_blocks_do_not_overlap():
    made = core(Local, options={"window": 6, "pattern": "blocked"})
    same = AT[:, None] // 6 == AT[None, :] // 6
    assert (sets(made, 32, causal=False) == same[None]).all()
    assert (sets(made, 32, causal=True) == (same & (AHEAD >= 0))[None]).all()


@pytest.mark.parametrize(("window", "padded"), [(5, 35), (8, 40)])
def test_interleaved_is_what_the_released_code_reshapes(window, padded):
    """It adds block - T % block positions, a whole block where it divides, and takes columns."""
    columns = np.arange(padded).reshape(window, padded // window)
    column = np.zeros(padded, int)
    for j in range(columns.shape[1]):
        column[columns[:, j]] = j
    same = column[:32, None] == column[None, :32]
    made = core(Local, options={"window": window, "pattern": "interleaved"})
    assert (sets(made, 32, causal=False) == same[None]).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", ["sliding", "blocked"])
def test_a_window_of_the_whole_length_is_softmax(pattern, causal):
    q, k, v = qkv(63)
    made = Local(
        Local.Config(window=126, pattern=pattern), support.site(), rngs=nnx.Rngs(0), shared={}
    )
    got, expected = run(made, q, k, v, causal=causal), exact(q, k, v, causal=causal)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pattern", ["sliding", "blocked"])
def test_work_and_memory_are_linear(pattern):
    made = core(Local, length=8192, width=32, options={"window": 64, "pattern": pattern})
    call = lambda q, k, v: made(q, k, v, mask=Mask(causal=True), shared={})  # noqa: E731
    work, held = growth(call, (2048, 8192))
    assert 0.99 < work < 1.01 and held < 1.15  # XLA's allocation takes a step in between


def test_the_cache_holds_the_window_alone():
    for pattern in ("sliding", "blocked"):
        made = core(Local, options={"window": 6, "pattern": pattern})
        assert made.init_state(3, np.float32).keys.shape == (3, 6, 4, 32)
    assert core(Local, options={"window": 600}).init_state(1, np.float32).keys.shape[1] == 32


@pytest.mark.parametrize("pattern", ["sliding", "blocked", "interleaved"])
def test_no_tokens_are_refused(pattern):
    made, nothing = core(Local, options={"pattern": pattern}), qkv(32)[0][:, :0]
    with pytest.raises(ValueError, match="0 queries and 0 keys: give at least one"):
        made(nothing, nothing, nothing, mask=Mask(), shared={})


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="window=0 must be positive"):
        core(Local, options={"window": 0})
    with pytest.raises(UserError, match="local: kv_heads=3 does not divide heads=4"):
        core(Local, options={"kv_heads": 3})
