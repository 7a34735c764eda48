"""`kernels.gated_linear_attention` against its recurrence in float64, and in its exact limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, decode_step, linear_attention, reference
from kernels import gated_linear_attention as op
from tests import support
from tests.kernels.compare import agree
from tests.kernels.recurrent import causal_mask, compared, decays, halves_give_the_whole, tokens

KINDS = ["head", "channel"]

run = jax.jit(op, static_argnames=("chunk", "backend"), compiler_options=support.fast())


def problem(length, kind, *, depth=3.0, key=5, **options):
    given = tokens(length, key=key, **options)
    shape = given["v"].shape[:3] + ((key,) if kind == "channel" else ())
    return given | {"log_decay": decays(shape, depth=depth)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("length", "mask"), [(63, "causal"), (63, "segments"), (1, "all"), (7, "all"), (100, "all")]
)
def test_output_state_and_gradients_are_the_recurrences(length, mask, kind):
    given = problem(length, kind, heads=4, groups=2 if length == 63 else 4)
    mask = causal_mask(mask, length)
    agree(compared(op, reference.gated_linear_attention, given, mask, chunk=32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 5, 48, 1000])
def test_the_size_of_a_chunk_is_of_no_consequence(chunk, kind):
    given, mask = problem(50, kind, state=False), causal_mask("all", 50)
    agree(compared(op, reference.gated_linear_attention, given, mask, chunk=chunk))


@pytest.mark.parametrize("kind", KINDS)
def test_decays_of_e_to_the_minus_20_beside_none_at_all(kind):
    """Sums of logarithms reach -2,000 in a chunk, where float32 resolves 1e-4 of an exponent."""
    given = problem(300, kind)
    random = np.random.default_rng(2)
    given["log_decay"] = np.where(
        random.uniform(size=given["log_decay"].shape) < 0.5, given["log_decay"] * 1e-3, -20.0
    ).astype(np.float32)
    agree(compared(op, reference.gated_linear_attention, given, causal_mask("all", 300), chunk=128))
    given["log_decay"] = np.full_like(given["log_decay"], -20.0)
    result = compared(op, reference.gated_linear_attention, given, causal_mask("all", 300))
    agree(result)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [-1e7, -np.inf])
@pytest.mark.parametrize("at", [0, 15, 20, 39])
def test_one_token_that_forgets_everything_leaves_the_others_precise(at, cut, kind):
    """No sum may hold its decay but those that pass over it."""
    given = {name: x.astype(np.float64) for name, x in problem(40, kind).items()}
    given["log_decay"] = np.full_like(given["log_decay"], -0.1)
    given["log_decay"][:, at] = cut
    out, state = run(**{n: jnp.asarray(x, jnp.float32) for n, x in given.items()}, chunk=40)
    memory, fading = given["initial_state"], np.exp(given["log_decay"])
    fading = fading[..., None] if kind == "channel" else fading[..., None, None]
    for t in range(40):
        memory = memory * fading[:, t] + given["k"][:, t, :, :, None] * given["v"][:, t, :, None]
        expected = np.einsum("bhr,bhrd->bhd", given["q"][:, t], memory)
        np.testing.assert_allclose(out[:, t], expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(state, memory, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_halves_give_the_whole(kind):
    halves_give_the_whole(run, problem(50, kind), 50, 21, chunk=16)


@pytest.mark.parametrize("kind", KINDS)
def test_without_decay_it_is_linear_attention_before_the_division(kind):
    given = problem(40, kind, state=False)
    q, k = np.exp(given["q"]), np.exp(given["k"])
    values = np.concatenate([given["v"], np.ones_like(given["v"][..., :1])], axis=-1)
    none = np.zeros_like(given["log_decay"])
    sums, state = run(q, k, values, none, chunk=16)
    expected = linear_attention(*map(jnp.asarray, (q, k, given["v"])), mask=Mask(causal=True))
    np.testing.assert_allclose(sums[..., :-1] / sums[..., -1:], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, np.einsum("bshr,bshd->bhrd", k, values), rtol=1e-5)


def test_a_fixed_decay_is_the_parallel_form_of_retention():
    """(Q K^T * D) V with D_nm = gamma^(n - m) for n >= m (2307.08621, equation 5)."""
    given = problem(40, "head", state=False)
    gamma = 1 - 2.0 ** (-5 - np.arange(2))
    apart = np.arange(40)[:, None] - np.arange(40)[None]
    matrix = np.where(apart >= 0, gamma[:, None, None] ** np.maximum(apart, 0), 0.0)
    weights = np.einsum("bthr,bshr->bhts", given["q"], given["k"]) * matrix
    expected = np.einsum("bhts,bshd->bthd", weights, given["v"])
    log_decay = np.broadcast_to(np.log(gamma).astype(np.float32), given["log_decay"].shape)
    for chunk in (16, 40):
        out, _ = run(given["q"], given["k"], given["v"], jnp.asarray(log_decay), chunk=chunk)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_chunks(kind):
    given = jax.tree.map(jnp.asarray, problem(30, kind, heads=4, groups=2))
    whole, last = run(**given, chunk=16)
    start = given.pop("initial_state")

    def step(state, token):
        token = {k: v[:, None] for k, v in token.items()}
        out, state = decode_step(**token, state=state)
        return state, out[:, 0]

    state, outs = jax.lax.scan(step, start, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), given))
    np.testing.assert_allclose(jnp.swapaxes(outs, 0, 1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_padding_leaves_the_state_as_it_was(kind):
    given = problem(40, kind)
    result = compared(op, reference.gated_linear_attention, given, causal_mask("padding", 40))
    state = given["initial_state"][3].ravel()
    np.testing.assert_array_equal(result.out[3][-state.size :], state)
    for name in ("k", "v", "log_decay"):
        np.testing.assert_array_equal(result.grads[name][3], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_a_rounding_away(kind):
    given, mask = problem(63, kind), causal_mask("all", 63)
    result = compared(op, reference.gated_linear_attention, given, mask, dtype=jnp.bfloat16)
    agree(result, forward=5e-3, backward=1e-2)


def test_what_it_cannot_do_is_refused():
    given = problem(8, "head", heads=4, groups=3)
    with pytest.raises(ValueError, match="3 groups of keys do not divide 4 heads"):
        run(**given)
    with pytest.raises(ValueError, match="sees the past alone"):
        run(**problem(8, "head"), mask=Mask())
    with pytest.raises(NotImplementedError, match="(no|with) backend 'pallas'"):
        run(**problem(8, "head"), backend="pallas")
