"""`kernels.gated_delta_rule` against its recurrence in float64, and in its exact limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, decode_step, gated_linear_attention, reference
from kernels import gated_delta_rule as op
from kernels.gated_delta_rule import unit_lower_inverse
from tests import support
from tests.kernels.compare import agree
from tests.kernels.recurrent import causal_mask, compared, decays, halves_give_the_whole, tokens

run = jax.jit(op, static_argnames=("chunk", "backend"), compiler_options=support.fast())


def problem(length, *, depth=3.0, top=1.0, **options):
    """Keys of length 1; beta in (0, top)."""
    given = tokens(length, **options)
    given["k"] /= np.linalg.norm(given["k"], axis=-1, keepdims=True)
    shape = given["v"].shape[:3]
    beta = np.random.default_rng(3).uniform(0, top, shape).astype(np.float32)
    return given | {"beta": beta, "log_decay": decays(shape, depth=depth)}


def check(given, mask, *, chunk=16, **tolerance):
    agree(compared(op, reference.gated_delta_rule, given, mask, chunk=chunk), **tolerance)


@pytest.mark.parametrize("top", [1.0, 2.0])
@pytest.mark.parametrize(
    ("length", "mask"), [(63, "causal"), (63, "segments"), (1, "all"), (7, "all"), (100, "all")]
)
def test_output_state_and_gradients_are_the_recurrences(length, mask, top):
    check(problem(length, top=top), causal_mask(mask, length))


@pytest.mark.parametrize("chunk", [1, 5, 48, 1000])
def test_the_size_of_a_chunk_is_of_no_consequence(chunk):
    check(problem(50, state=False), causal_mask("all", 50), chunk=chunk)


def test_decays_of_e_to_the_minus_20_beside_none_at_all():
    given = problem(300, top=2.0)
    strong = np.random.default_rng(2).uniform(size=given["log_decay"].shape) < 0.5
    given["log_decay"] = np.where(strong, -20.0, 1e-3 * given["log_decay"]).astype(np.float32)
    check(given, causal_mask("all", 300), chunk=64)


@pytest.mark.parametrize(("top", "forward"), [(1.0, 1e-5), (1.99, 1e-4)])
def test_a_token_repeated_three_hundred_times(top, forward):
    """Powers of the chunk's matrix grow as binomials; nothing may be computed from them.

    At 1.99 the state changes its sign at each token and shrinks by a hundredth: sums of hundreds of
    numbers of either sign.
    """
    given = problem(300)
    given["k"][:] = given["k"][:1, :1]
    given["beta"][:] = top
    given["log_decay"][:] = 0.0
    check(given, causal_mask("causal", 300), chunk=64, forward=forward, backward=2 * forward)


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_the_inverse_is_one(rows):
    """Also what it ignores, the diagonal and above, and its derivative."""
    a, da = (np.random.default_rng(s).standard_normal((3, rows, rows)) for s in (0, 1))
    expected = np.linalg.inv(np.eye(rows) + np.tril(a, -1))
    slope = -expected @ np.tril(da, -1) @ expected
    both = jax.jvp(unit_lower_inverse, *((jnp.asarray(x, jnp.float32),) for x in (a, da)))
    for got, wanted in zip(both, (expected, slope), strict=True):
        assert support.relative(got, wanted) < 1e-4
        np.testing.assert_array_equal(np.triu(got, 1), 0)


def test_the_inverse_is_made_at_full_precision_on_every_device():
    a = jnp.zeros((8, 8))
    traced = str(jax.make_jaxpr(lambda a: jax.jvp(unit_lower_inverse, (a,), (a,)))(a))
    precise = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    assert traced.count("dot_general[") == traced.count(precise) == 3 * 2 + 2


def test_two_halves_give_the_whole():
    halves_give_the_whole(run, problem(50), 50, 21, chunk=16)


def test_a_key_written_again_forgets_what_it_held():
    """Orthonormal keys, beta 1: a table of values, each read back as last written."""
    random = np.random.default_rng(0)
    slots = random.integers(0, 6, (1, 70))
    k = np.eye(6, dtype=np.float32)[slots][:, :, None]
    v = random.standard_normal((1, 70, 1, 4)).astype(np.float32)
    held, expected = {}, []
    for t, slot in enumerate(slots[0]):
        held[slot] = v[0, t, 0]
        asked = (slot + t) % 6  # another slot than the one written, mostly
        expected.append(held.get(asked, np.zeros(4)))
    q = np.eye(6, dtype=np.float32)[(slots + np.arange(70)) % 6][:, :, None]
    out, state = run(q, k, v, jnp.ones((1, 70, 1)), chunk=32)
    np.testing.assert_allclose(out[0, :, 0], expected, atol=1e-6)
    np.testing.assert_allclose(state[0, 0], [held[s] for s in range(6)], atol=1e-6)


def test_beta_two_reflects():
    """S = (I - 2 k k^T) S + 2 k v^T: what k holds is now 2 v less what it held."""
    given = problem(1)
    given["beta"][:], given["log_decay"][:] = 2.0, 0.0
    _, state = run(**given)
    before = np.einsum("bhr,bhrd->bhd", given["k"][:, 0], given["initial_state"])
    after = np.einsum("bhr,bhrd->bhd", given["k"][:, 0], state)
    np.testing.assert_allclose(after, 2 * given["v"][:, 0] - before, atol=1e-5)


def test_keys_that_never_meet_make_it_linear_attention():
    """Nothing to overwrite: values beta v, keys orthogonal, decays as they are."""
    given = problem(12, key=12, state=False)
    given["k"][:] = np.eye(12, dtype=np.float32)[None, :, None]
    out, state = run(**given, chunk=5)
    values = given["v"] * given["beta"][..., None]
    expected = jax.jit(gated_linear_attention)(given["q"], given["k"], values, given["log_decay"])
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(state, expected[1], atol=1e-5)


def test_steps_equal_the_chunks():
    given = jax.tree.map(jnp.asarray, problem(30, top=2.0))
    whole, last = run(**given, chunk=16)
    start = given.pop("initial_state")

    def step(state, token):
        token = {k: v[:, None] for k, v in token.items()}
        out, state = decode_step(**token, state=state)
        return state, out[:, 0]

    state, outs = jax.lax.scan(step, start, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), given))
    np.testing.assert_allclose(jnp.swapaxes(outs, 0, 1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-5)
    token = {k: v[:, :1] for k, v in given.items() if k != "log_decay"}
    out, _ = decode_step(**token, state=start)
    np.testing.assert_allclose(out, run(**token, initial_state=start)[0], atol=1e-5)


def test_a_row_of_padding_writes_nothing():
    result = compared(op, reference.gated_delta_rule, problem(40), causal_mask("all", 40))
    for name in ("k", "v", "beta", "log_decay"):
        np.testing.assert_array_equal(result.grads[name][3], 0)


def test_bfloat16_is_a_rounding_away():
    given, mask = problem(63), causal_mask("all", 63)
    result = compared(op, reference.gated_delta_rule, given, mask, dtype=jnp.bfloat16)
    agree(result, forward=5e-3, backward=1e-2)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="sees the past alone"):
        run(**problem(8), mask=Mask())
    with pytest.raises(NotImplementedError, match="has no backend 'cudnn'"):
        run(**problem(8), backend="cudnn")
