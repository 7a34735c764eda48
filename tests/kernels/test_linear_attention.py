"""`kernels.linear_attention` against its reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import (
    Mask,
    causal_linear_attention,
    linear_attention_init,
    linear_attention_step,
    reference,
)
from kernels import linear_attention as op
from kernels.linear_attention import even
from tests.kernels.compare import MASKS, agree, arrays, both, mask_of


def features(length, *, keys=None, heads=2, rank=5, dim=8, scale=None, seed=0):
    keys = length if keys is None else keys
    given = arrays(
        seed, q=(4, length, heads, rank), k=(4, keys, heads, rank), v=(4, keys, heads, dim)
    )
    given["q"], given["k"] = np.exp(given["q"]), np.exp(given["k"])
    if scale is not None:
        given["log_scale"] = scale * arrays(seed + 1, s=(4, keys, heads))["s"]
    return given


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize(
    ("length", "mask"),
    [(63, mask) for mask in MASKS] + [(length, "all") for length in (1, 7, 100, 257)],
)
def test_output_and_gradients_are_the_references(length, mask, scale):
    given = features(length, scale=scale)
    agree(
        both(op, reference.linear_attention, given, mask_of(mask, length), op_options={"chunk": 16})
    )


@pytest.mark.parametrize("chunk", [1, 31, 32, 33, 64, 1000])
def test_the_size_of_a_chunk_is_of_no_consequence(chunk):
    mask = mask_of("all", 64)
    given = features(64, scale=1.0)
    agree(both(op, reference.linear_attention, given, mask, op_options={"chunk": chunk}))


@pytest.mark.parametrize("mask", ["causal", "segments", "padding", "all"])
def test_scales_of_e_to_the_300_leave_every_row_its_own_precision(mask):
    """Chunks below and above: what the first chunk holds is e^-600 of what the next one does."""
    given = features(63)
    steps = np.where(np.arange(63) % 20 < 10, -300.0, 300.0)
    noise = arrays(3, s=(4, 63, 2))["s"]
    given["log_scale"] = (steps[None, :, None] + noise).astype(np.float32)
    for sign in (1, -1):
        given["log_scale"] = sign * given["log_scale"]
        agree(
            both(
                op, reference.linear_attention, given, mask_of(mask, 63), op_options={"chunk": 16}
            ),
            forward=5e-5,
            backward=1e-4,  # scales near 300 carry an absolute error of 1.5e-5 in float32
        )


def phi(x, at):
    """Exponential features with a scale each, 3 times as many as channels, that know the place."""
    rows = jnp.asarray(arrays(5, w=(3 * x.shape[-1], x.shape[-1]))["w"])
    logits = jnp.einsum("bthd,rd->bthr", x, rows) + jnp.sin(at)[:, :, None, None]
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.exp(logits - top), top[..., 0]


def of_features(q, k, v, *, mask, log_scale=None):
    (q, _), (k, scale) = (phi(x, jnp.arange(x.shape[1])[None]) for x in (q, k))
    scale = scale if log_scale is None else scale + log_scale
    return reference.linear_attention(q, k, v, log_scale=scale, mask=mask)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("mask", MASKS)
def test_features_are_made_chunk_by_chunk(mask, scale):
    given = features(63, scale=scale)
    given |= {name: np.log(given[name]) for name in "qk"}
    how = {"chunk": 8, "features": phi}
    agree(both(op, of_features, given, mask_of(mask, 63), op_options=how))


@pytest.mark.parametrize("level", [-300.0, 300.0])
def test_a_level_common_to_all_keys_cancels(level):
    given = features(63)
    at = {"log_scale": np.full((4, 63, 2), level, np.float32)}
    mask = mask_of("all", 63)
    level_result = both(op, reference.linear_attention, given | at, mask)
    plain = both(op, reference.linear_attention, given, mask)
    np.testing.assert_allclose(level_result.out, plain.out, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [{"heads": 1, "dim": 3}, {"rank": 64, "dim": 1}, {"keys": 31}], ids=str
)
def test_other_shapes(shape):
    mask = mask_of("padding", shape.get("keys", 7))
    agree(both(op, reference.linear_attention, features(7, **shape), mask))


@pytest.mark.parametrize("mask", ["padding", "all"])
def test_bfloat16_is_a_rounding_away(mask):
    given = features(63, scale=1.0)
    result = both(op, reference.linear_attention, given, mask_of(mask, 63), dtype=jnp.bfloat16)
    agree(result, forward=5e-3, backward=1e-2)


@pytest.mark.parametrize("mask", ["padding", "all"])
def test_a_row_that_sees_nothing_is_zero_and_so_are_its_gradients(mask):
    given = features(63, scale=1.0)
    result = both(
        op, reference.linear_attention, given, mask_of(mask, 63), op_options={"chunk": 16}
    )
    np.testing.assert_array_equal(result.out[3], 0)
    for grad in result.grads.values():
        np.testing.assert_array_equal(grad[3], 0)


@pytest.mark.parametrize("mask", ["padding", "all"])
def test_features_that_all_vanish_give_zero_and_no_nan(mask):
    given = features(63)
    given["q"] = np.zeros_like(given["q"])
    result = both(op, reference.linear_attention, given, mask_of(mask, 63))
    np.testing.assert_array_equal(result.out, 0)
    assert all(np.isfinite(g).all() for g in result.grads.values())


@pytest.mark.parametrize("level", [1.0, 300.0])
def test_steps_equal_the_causal_pass(level):
    given = {k: jnp.asarray(v) for k, v in features(40, scale=level).items()}

    def step(state, token):
        token = {k: v[:, None] for k, v in token.items()}
        out, state = linear_attention_step(**{k: token[k] for k in "qkv"}, state=state,
                                           log_scale=token["log_scale"])  # fmt: skip
        return state, out[:, 0]

    tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), given)
    _, outs = jax.lax.scan(step, linear_attention_init(4, 2, 5, 8), tokens)
    from kernels import Mask

    whole = op(**given, mask=Mask(causal=True), chunk=16)
    np.testing.assert_allclose(jnp.swapaxes(outs, 0, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 16, 37])
def test_a_causal_sequence_cut_in_two_gives_what_it_gives_whole(cut):
    """The state carries all over, scales and padding too; a segment that is cut goes on."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)  # noqa: E731
    q, k, v = draw(2, 50, 3, 5) ** 2, draw(2, 50, 3, 5) ** 2, draw(2, 50, 3, 4)
    scale, keys = 20 * draw(2, 50, 3), jnp.asarray(random.random((2, 50)) < 0.7)
    segments = jnp.asarray(np.arange(50) // 23)[None].repeat(2, 0)

    def part(at, state):
        mask = Mask(causal=True, keys=keys[:, at], segments=segments[:, at])
        return causal_linear_attention(
            q[:, at], k[:, at], v[:, at], state, log_scale=scale[:, at], mask=mask, chunk=16
        )

    whole, last = part(slice(0, 50), linear_attention_init(2, 3, 5, 4))
    first, state = part(slice(0, cut), linear_attention_init(2, 3, 5, 4))
    second, end = part(slice(cut, 50), state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-5, atol=1e-5)
    for got, expected in zip(end, last, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    mask = Mask(causal=True, keys=keys, segments=segments)
    at_once = op(q, k, v, log_scale=scale, mask=mask, chunk=16)
    np.testing.assert_array_equal(whole, at_once)


def test_going_on_takes_a_causal_mask():
    ones = jnp.ones((1, 2, 1, 3))
    with pytest.raises(ValueError, match="causal mask"):
        causal_linear_attention(ones, ones, ones, linear_attention_init(1, 1, 3, 3), mask=Mask())


def test_what_is_not_a_number_is_not_hidden():
    ones = jnp.ones((1, 3, 1, 2))
    assert jnp.isnan(op(ones.at[0, 1].set(jnp.nan), ones, ones)[0, 1]).all()
    assert jnp.isnan(op(ones, ones.at[0, 1].set(jnp.nan), ones)).all()


def test_a_first_key_of_no_weight_leaves_an_empty_state():
    one, nothing = jnp.ones((1, 1, 1, 2)), jnp.full((1, 1, 1), -jnp.inf)
    out, state = linear_attention_step(
        one, one, one, linear_attention_init(1, 1, 2, 2), log_scale=nothing
    )
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(state.sums, 0)
    out, _ = linear_attention_step(one, one, 3 * one, state)
    np.testing.assert_array_equal(out, 3)


@pytest.mark.parametrize(
    ("length", "chunk", "expected"),
    [(1, 128, 1), (128, 128, 128), (129, 128, 65), (513, 512, 257), (577, 128, 116)],
)
def test_chunks_are_even(length, chunk, expected):
    assert even(length, chunk) == expected


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_are_repeated_heads(causal):
    given = arrays(q=(2, 21, 4, 6), k=(2, 21, 2, 6), v=(2, 21, 2, 5), log_scale=(2, 21, 2))
    given = {name: jnp.asarray(x) for name, x in given.items()}
    repeated = {name: jnp.repeat(x, 2, axis=2) for name, x in given.items() if name != "q"}
    phi = lambda x, at: (jax.nn.softplus(x), x[..., 0])  # noqa: E731
    how = {"features": phi, "mask": Mask(causal=causal), "chunk": 8}
    out = op(**given, **how)
    expected = op(given["q"], **repeated, **how)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_a_step_of_grouped_heads_is_one_of_repeated_heads():
    given = arrays(q=(2, 1, 4, 6), k=(2, 1, 2, 6), v=(2, 1, 2, 5), log_scale=(2, 1, 2))
    given = {name: jnp.abs(jnp.asarray(x)) for name, x in given.items()}
    repeated = {name: jnp.repeat(x, 2, axis=2) for name, x in given.items() if name != "q"}
    state = linear_attention_init(2, 4, 6, 5)
    out, left = linear_attention_step(**given, state=state)
    expected, kept = linear_attention_step(given["q"], **repeated, state=state)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(left.sums, kept.sums)


def test_groups_that_do_not_divide_are_refused():
    q, k = jnp.ones((1, 4, 4, 2)), jnp.ones((1, 4, 3, 2))
    with pytest.raises(ValueError, match="3 key-value heads do not divide 4 heads"):
        op(q, k, k)
