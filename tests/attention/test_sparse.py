"""What is special to the Sparse Transformer: its sets, how heads share them, T^1.5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from efficient_attn.attention.sparse import Sparse
from efficient_attn.errors import UserError
from kernels import Mask
from tests import support
from tests.attention.visible import core, exact, growth, qkv, run, sets
from tests.mechanisms.sparse import near

OPTIONS = [
    {"block": 5, "summary": 2},
    {"block": 12},
    {"block": 7, "summary": 1, "subblocks": "distinct"},
    {"block": 6, "summary": 2, "heads": "separate", "subblocks": "distinct"},
    {"heads": "interleaved"},
    {"pattern": "strided", "block": 5},
    {"pattern": "strided", "heads": "separate"},
    {"pattern": "strided", "block": 7, "heads": "interleaved"},
    {"block": 64, "summary": 8},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_sets_are_the_papers(options):
    for layer in range(2 if options.get("heads") == "interleaved" else 1):
        made = core(Sparse, options=options, layer=layer)
        for causal in (True, False):
            expected = near(made.config, length=32, heads=4, seq=32, layer=layer, causal=causal)
            assert (sets(made, 32, causal=causal) == expected).all()


@pytest.mark.parametrize("pattern", ["fixed", "strided"])
def test_two_layers_of_sparse_heads_reach_all_of_the_past(pattern):
    """The paper's condition on the sets (section 4.2): a path of at most two steps."""
    options = {"pattern": pattern, "heads": "interleaved"}
    first, second = (
        sets(core(Sparse, options=options, layer=i), 32, causal=True)[0].astype(int) for i in (0, 1)
    )
    reached = second @ first + first @ second > 0
    past = np.tri(32, dtype=bool)
    if pattern == "strided":
        assert (reached == past).all()
    else:  # by way of a summary: later blocks see all of earlier ones
        block = np.arange(32) // 6
        assert reached[block[:, None] > block[None, :]].all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"block": 64}, {"block": 4, "summary": 4}, {"pattern": "strided", "block": 1},
     {"pattern": "strided", "block": 64}],
    ids=str,
)  # fmt: skip
def test_all_positions_in_a_set_is_softmax(options, causal):
    q, k, v = qkv(40)
    made = core(Sparse, length=40, width=32, options=options)
    got, expected = run(made, q, k, v, causal=causal), exact(q, k, v, causal=causal)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("pattern", ["fixed", "strided"])
def test_interleaved_layers_decode_from_their_own_set(pattern, layer):
    options = {"pattern": pattern, "block": 5, "summary": 2, "heads": "interleaved"}
    made = core(Sparse, width=32, options=options, layer=layer)
    q, k, v = qkv(32)

    def step(state, given):
        (q, k, v), position = given
        out, state = made.step(q, k, v, state, position=jnp.full(2, position))
        return state, out[:, 0]

    tokens = [jnp.swapaxes(x, 0, 1)[:, :, None] for x in (q, k, v)]
    start = made.init_state(2, jnp.float32)
    _, outs = jax.lax.scan(step, start, (tokens, jnp.arange(32)))
    expected = run(made, q, k, v, causal=True)
    np.testing.assert_allclose(jnp.swapaxes(outs, 0, 1), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("pattern", ["fixed", "strided"])
def test_work_grows_as_t_to_the_3_2_and_memory_linearly(pattern):
    def call(q, k, v):
        made = core(Sparse, length=q.shape[1], width=32, options={"pattern": pattern})
        return made(q, k, v, mask=Mask(causal=True), shared={})

    work, held = growth(call, (1024, 4096))
    assert 1.4 < work < 1.6 and held < 1.15


def test_before_the_first_summary_there_is_nothing_to_see():
    made = core(Sparse, options={"block": 8, "summary": 2, "heads": "separate"})
    seen = sets(made, 32, causal=True)
    assert not seen[2:, :6].any() and seen[2:, 6:].any(-1).all() and seen[:2].any(-1).all()


def test_what_does_not_fit_is_refused():
    for options, message in (
        ({"block": 4, "summary": 5}, "summary=5 exceeds block=4; lower it"),
        ({"summary": 7}, "summary=7 exceeds the block of 6"),
        ({"block": 0}, "block=0 must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            core(Sparse, options=options)
    with pytest.raises(UserError, match="needs two heads or more"):
        core(Sparse, options={"heads": "separate"}, heads=1)


def test_a_sequence_of_no_tokens_is_refused():
    empty = jnp.zeros((1, 0, 4, 32))
    with pytest.raises(ValueError, match="0 queries and 0 keys: give at least one of each"):
        core(Sparse)(empty, empty, empty, mask=Mask(), shared={})


@pytest.mark.parametrize(
    ("expression", "need", "remedy"),
    [("sparse", "segments", "pattern='strided'"), ("longformer", "decode", "tokens=0"),
     ("reformer(layout='sorted')", "causal", "layout='bucket'")],
)  # fmt: skip
def test_a_capability_that_an_option_brings_is_refused_with_that_option(expression, need, remedy):
    """And with it there is nothing to refuse."""
    with pytest.raises(UserError, match=f"not support {need}, .*; set {remedy} or use one of: "):
        attention.build(expression, support.site(), needs={need}, rngs=nnx.Rngs(0))
    with_it = f"{expression.split('(')[0]}({remedy})"
    attention.build(with_it, support.site(), needs={need}, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="not support cross, which this model needs; use one of: "):
        attention.build(expression, support.site(), needs={"cross"}, rngs=nnx.Rngs(0))
