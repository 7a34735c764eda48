"""Step by step equals the causal forward pass, for every mechanism that declares `decode`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from kernels import Mask
from tests import support
from tests.support import BATCH, SEQ, draw_x, holder, those_with

LENGTH = 63
PICK = np.array([1, 20, 62, 3], np.int32)
CASES = [
    (expression, positions)
    for expression in those_with("decode")
    for positions in ("none", "rotary", "alibi")
    if positions == "none" or (positions == "rotary" and expression in support.FIRSTS)
    or (positions == "alibi" and "alibi" in support.able(expression))
]  # fmt: skip


@functools.cache
def decoded(expression: str, positions: str):
    """Outputs of every step; and of one step whose examples stand at the positions `PICK`."""
    graph, state = nnx.split(holder(expression, positions=positions))
    x = draw_x(expression, LENGTH)

    def call(state, x):
        mixer = nnx.merge(graph, state).mixer

        def step(carry, given):
            token, position = given
            out, after = mixer.step(token[:, None], carry, position=jnp.full(BATCH, position))
            return after, (out[:, 0], carry)

        start = mixer.init_state(BATCH, jnp.float32)
        tokens = jnp.swapaxes(x, 0, 1)
        _, (outs, states) = jax.lax.scan(step, start, (tokens, jnp.arange(LENGTH)))
        rows = jnp.arange(BATCH)
        mixed = jax.tree.map(lambda s: s[PICK, rows], states)
        out, _ = mixer.step(x[rows, PICK][:, None], mixed, position=jnp.asarray(PICK))
        return jnp.swapaxes(outs, 0, 1), out[:, 0]

    return jax.tree.map(np.asarray, jax.jit(call, compiler_options=support.fast())(state, x))


@functools.cache
def forward(expression: str, positions: str) -> np.ndarray:
    graph, state = nnx.split(holder(expression, positions=positions))

    def call(state, x):
        return nnx.merge(graph, state)(x, mask=Mask(causal=True))

    with support.short_chunks():
        compiled = jax.jit(call, compiler_options=support.fast())
        return np.asarray(compiled(state, draw_x(expression, LENGTH)))


@pytest.mark.parametrize(("expression", "positions"), CASES)
def test_steps_equal_the_causal_forward_pass(expression, positions):
    outs, _ = decoded(expression, positions)
    np.testing.assert_allclose(outs, forward(expression, positions), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("expression", "positions"), CASES)
def test_examples_of_a_batch_may_stand_at_different_positions(expression, positions):
    _, mixed = decoded(expression, positions)
    expected = forward(expression, positions)[np.arange(BATCH), PICK]
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("expression", those_with("decode"))
def test_a_prompt_is_read_in_parallel(expression):
    """Not a scan over its tokens: the longest loop is shorter."""
    mixer = holder(expression).mixer
    state = jax.eval_shape(lambda: mixer.init_state(1, jnp.float32))
    x, keys = jax.ShapeDtypeStruct((1, 97, support.WIDTH), jnp.float32), jnp.ones((1, 97), bool)
    traced = str(jax.make_jaxpr(lambda x, state: mixer.prefill(x, state, keys=keys))(x, state))
    assert "length=97" not in traced


@pytest.mark.parametrize("expression", those_with("decode"))
def test_the_state_has_the_bytes_that_cost_says(expression):
    mixer = holder(expression).mixer
    state = jax.eval_shape(lambda: mixer.init_state(1, jnp.float32))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert held == attention.cost(expression, support.site(), SEQ).state_bytes


@pytest.mark.parametrize("expression", sorted(set(support.EXPRESSIONS) - set(those_with("decode"))))
def test_what_does_not_decode_says_none(expression):
    site = support.site(**support.place(expression, SEQ))
    assert attention.cost(expression, site, SEQ).state_bytes is None
    with pytest.raises(NotImplementedError):
        holder(expression).mixer.init_state(1, jnp.float32)


@pytest.mark.parametrize(("expression", "positions"), CASES)
def test_a_prompt_read_at_once_leaves_the_state_of_its_last_token(expression, positions):
    """Prompts of different lengths in one batch; then a few tokens more."""
    lengths, more = np.array([21, 5, 16, 1]), 4
    prompt, whole = 21, draw_x(expression, LENGTH)
    keys = np.arange(prompt)[None] < lengths[:, None]
    x = np.where(keys[..., None], whole[:, :prompt], 1e3).astype(np.float32)
    graph, numbers = nnx.split(holder(expression, positions=positions))

    def call(numbers, x, later):
        mixer = nnx.merge(graph, numbers).mixer
        out, state = mixer.prefill(x, mixer.init_state(BATCH, jnp.float32), keys=jnp.asarray(keys))
        outs = []
        for t in range(more):
            one, state = mixer.step(later[:, t : t + 1], state, position=jnp.asarray(lengths + t))
            outs.append(one[:, 0])
        return out, jnp.stack(outs, axis=1)

    at = lengths[:, None] + np.arange(more)
    later = whole[np.arange(BATCH)[:, None], at]
    out, outs = jax.jit(call, compiler_options=support.fast())(numbers, x, later)
    expected = forward(expression, positions)
    np.testing.assert_allclose(
        np.asarray(out)[keys], expected[:, :prompt][keys], rtol=1e-5, atol=2e-5
    )
    np.testing.assert_allclose(outs, expected[np.arange(BATCH)[:, None], at], rtol=1e-5, atol=2e-5)
