"""Step by step equals the causal forward pass, for every mechanism that declares `decode`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from tests import support
from tests.support import BATCH, SEQ, draw_x, holder, one_segment, run, those_with

LENGTH = 63
PICK = np.array([1, 20, 62, 3], np.int32)


@functools.cache
def decoded(expression: str, rotary: bool):
    """Outputs of every step; and of one step whose examples stand at the positions `PICK`."""
    graph, state = nnx.split(holder(expression, rotary=rotary))
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


def forward(expression: str, rotary: bool):
    x = draw_x(expression, LENGTH)
    keys = support.everyone(LENGTH)
    return run(
        expression, x, keys=keys, segments=one_segment(LENGTH), causal=True, rotary=rotary
    ).out


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("expression", those_with("decode"))
def test_steps_equal_the_causal_forward_pass(expression, rotary):
    outs, _ = decoded(expression, rotary)
    np.testing.assert_allclose(outs, forward(expression, rotary), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("expression", those_with("decode"))
def test_examples_of_a_batch_may_stand_at_different_positions(expression, rotary):
    _, mixed = decoded(expression, rotary)
    expected = forward(expression, rotary)[np.arange(BATCH), PICK]
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("expression", those_with("decode"))
def test_the_state_has_the_bytes_that_cost_says(expression):
    mixer = holder(expression).mixer
    state = jax.eval_shape(lambda: mixer.init_state(1, jnp.float32))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert held == attention.cost(expression, support.site(), SEQ).state_bytes


@pytest.mark.parametrize("expression", sorted(set(support.EXPRESSIONS) - set(those_with("decode"))))
def test_what_does_not_decode_says_none(expression):
    assert attention.cost(expression, support.site(), SEQ).state_bytes is None
    with pytest.raises(NotImplementedError):
        holder(expression).mixer.init_state(1, jnp.float32)
