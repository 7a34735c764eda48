"""What every mechanism promises about who sees whom; over all of `support.VARIANTS`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from efficient_attn.backbones.base import Objective
from efficient_attn.errors import UserError
from efficient_attn.tools.count import multiply_adds
from kernels import Mask
from tests import support
from tests.support import (
    EXPRESSIONS,
    choice,
    draw_x,
    everyone,
    holder,
    one_segment,
    padded_keys,
    place,
    run,
    those_with,
)

LENGTH, HALF, SHORT = 63, 31, 7
TIGHT = {"rtol": 1e-5, "atol": 1e-5}


def modes(expression):
    """The masks under which a mechanism is asked not to leak: causal too, where it can."""
    if "bidirectional" in support.able(expression):
        yield {"causal": False, "segments": None}
    if support.able(expression) >= {"causal", "segments"}:
        yield {"causal": True, "segments": one_segment(LENGTH)}


def replaced(x, where, by):
    return np.where(where[..., None], np.asarray(by, x.dtype), x)


# padding


@pytest.mark.parametrize("expression", those_with("padding"))
def test_what_stands_in_padding_changes_no_valid_output_or_gradient(expression):
    x, keys = draw_x(expression, LENGTH), support.ragged_keys(LENGTH)
    cotangent = support.draw(x.shape, seed=3) * keys[..., None]
    for mode in modes(expression):
        before = run(expression, x, keys=keys, cotangent=cotangent, **mode)
        for content in (1e3, -1e3, draw_x(expression, LENGTH, seed=4)):
            there = replaced(x, ~keys, content)
            after = run(expression, there, keys=keys, cotangent=cotangent, **mode)
            np.testing.assert_array_equal(before.out[keys], after.out[keys])
            np.testing.assert_array_equal(before.grad.x[keys], after.grad.x[keys])
            np.testing.assert_array_equal(after.grad.x[~keys], 0)


@pytest.mark.parametrize("expression", those_with("padding"))
def test_a_padded_sequence_gives_what_the_cut_one_gives(expression):
    x, keys = draw_x(expression, LENGTH), everyone(LENGTH)
    keys[:, SHORT:] = False
    for mode in modes(expression):
        padded = run(expression, x, keys=keys, **mode)
        short = mode | {"segments": one_segment(SHORT)} if mode["causal"] else mode
        if "segments" in support.able(expression):  # as compiled for other tests
            short |= {"segments": one_segment(SHORT)}
        cut = run(expression, x[:, :SHORT], keys=everyone(SHORT), **short)
        np.testing.assert_allclose(padded.out[:, :SHORT], cut.out, **TIGHT)


# causal


@pytest.mark.parametrize("expression", those_with("causal"))
def test_the_second_half_says_nothing_to_the_first(expression):
    x, other = draw_x(expression, LENGTH), draw_x(expression, LENGTH, seed=5)
    for keys in (everyone(LENGTH), support.ragged_keys(LENGTH)):
        mask = {"causal": True, "segments": one_segment(LENGTH), "keys": keys}
        before = run(expression, x, **mask)
        for factor in (1.0, 1e3, -1e3):
            later = x.copy()
            later[:, HALF:] = factor * other[:, HALF:]
            after = run(expression, later, **mask)
            np.testing.assert_array_equal(before.out[:, :HALF], after.out[:, :HALF])
        assert np.abs(before.out[:2, HALF:] - after.out[:2, HALF:]).max() > 0.1


@pytest.mark.parametrize("expression", those_with("causal"))
def test_no_output_has_a_derivative_by_a_later_input(expression):
    x, keys = draw_x(expression, SHORT), support.ragged_keys(SHORT)
    keys[0, 2] = False
    for t in range(SHORT):
        cotangent = np.zeros_like(x)
        cotangent[:, t] = support.draw((support.BATCH, support.WIDTH), seed=t)
        result = run(
            expression, x, keys=keys, segments=one_segment(SHORT), causal=True, cotangent=cotangent
        )
        np.testing.assert_array_equal(result.grad.x[:, t + 1 :], 0)
        visible = np.where(keys[0, : t + 1])[0]
        assert np.abs(result.grad.x[0, visible]).max() > 1e-4


# segments

DIRECTIONS = [(e, False) for e in those_with("segments", "bidirectional")] + [
    (e, True) for e in those_with("segments", "causal")
]


@pytest.mark.parametrize(("expression", "causal"), DIRECTIONS)
def test_a_segment_gives_what_it_gives_alone(expression, causal):
    x, keys = draw_x(expression, LENGTH), support.ragged_keys(LENGTH)
    segments = np.repeat(np.arange(LENGTH // SHORT), SHORT)[None].repeat(support.BATCH, 0)
    segments = segments.astype(np.int32)
    together = run(expression, x, keys=keys, segments=segments, causal=causal)
    for start in range(0, LENGTH, SHORT):
        at = slice(start, start + SHORT)
        own = {"keys": keys[:, at], "segments": one_segment(SHORT), "causal": causal}
        alone = run(expression, x[:, at], **own)
        np.testing.assert_allclose(together.out[:, at], alone.out, **TIGHT)


@pytest.mark.parametrize(("expression", "causal"), DIRECTIONS)
def test_what_other_segments_hold_changes_nothing(expression, causal):
    x, segments = draw_x(expression, LENGTH), support.ragged_segments(LENGTH)
    keys = everyone(LENGTH)
    keys[1, ::4] = False
    before = run(expression, x, keys=keys, segments=segments, causal=causal)
    for chosen in (0, 1, 2):
        mine = segments == chosen
        for content in (1e3, draw_x(expression, LENGTH, seed=6)):
            there = replaced(x, ~mine, content)
            after = run(expression, there, keys=keys, segments=segments, causal=causal)
            np.testing.assert_array_equal(before.out[mine], after.out[mine])


# cross


@pytest.mark.parametrize("expression", those_with("cross"))
def test_padding_of_the_context_is_not_seen(expression):
    x, context = draw_x(expression, SHORT), draw_x(expression, LENGTH, seed=1)
    keys = support.ragged_keys(LENGTH)
    before = run(expression, x, context=context, keys=keys)
    after = run(expression, x, context=replaced(context, ~keys, 1e3), keys=keys)
    np.testing.assert_array_equal(before.out, after.out)
    np.testing.assert_array_equal(after.grad.context[~keys], 0)
    seen = replaced(context, keys, draw_x(expression, LENGTH, seed=2))
    moved = run(expression, x, context=seen, keys=keys)
    assert np.abs(before.out[:3] - moved.out[:3]).max() > 1e-2


@pytest.mark.parametrize("expression", those_with("cross"))
def test_a_context_read_once_is_the_context_and_costs_a_query_what_its_size_does(expression):
    """But for softmax, no query pays for the length of a context that was read before."""
    made = holder(expression, **place(expression, LENGTH))
    queries = jnp.asarray(draw_x(expression, SHORT))
    context = jnp.asarray(draw_x(expression, LENGTH, seed=1))
    mask = Mask(keys=jnp.asarray(support.ragged_keys(LENGTH)))

    def read(length):
        seen = Mask(keys=mask.keys[:, :length])
        return made.mixer.init_cross(context[:, :length], mask=seen, shared=made.shared)

    memory = read(LENGTH)
    assert all(leaf.shape[0] == support.BATCH for leaf in jax.tree.leaves(memory))
    each = [made.mixer.cross(queries[:, t : t + 1], memory, shared=made.shared) for t in range(3)]
    whole = made(queries, context, mask=mask)
    np.testing.assert_allclose(jnp.concatenate(each, 1), whole[:, :3], rtol=1e-5, atol=1e-5)

    def cost(length):
        look = lambda x, seen: made.mixer.cross(x, seen, shared=made.shared)  # noqa: E731
        return multiply_adds(look, queries[:, :1], read(length))

    assert (cost(LENGTH) == cost(LENGTH // 2)) is not expression.startswith("softmax")


@pytest.mark.parametrize("expression", sorted(set(EXPRESSIONS) - set(those_with("cross"))))
def test_a_context_is_refused_where_there_is_no_cross_attention(expression):
    x = jnp.asarray(draw_x(expression, SHORT))
    with pytest.raises(ValueError, match="no cross-attention; use softmax"):
        made = holder(expression, **place(expression, SHORT))
        made(x, x, mask=support.plain(expression))


# nothing to see, and neighbours


def bias(numbers):
    """What a mixer gives where its core gives 0."""
    parts = [numbers["out"]] if "out" in numbers else [
        numbers["attention"]["out"], numbers["local"]["leave"],
    ]  # fmt: skip
    width = support.WIDTH // len(parts)
    return np.concatenate([part.get("bias", np.zeros(width)) for part in parts])


@pytest.mark.parametrize("expression", those_with("padding"))
def test_a_query_that_sees_nothing_gets_zero_and_no_nan(expression):
    """0 out of the core is the bias alone out of the projection that follows."""
    x, keys = draw_x(expression, LENGTH), support.ragged_keys(LENGTH)
    numbers = support.weights(holder(expression))["mixer"]
    ways = [numbers[way] for way in ("forwards", "backwards") if way in numbers] or [numbers]
    nothing = sum(bias(way) for way in ways)
    for mode in modes(expression):
        result = run(expression, x, keys=keys, **mode)
        blind = np.repeat(~keys.any(1, keepdims=True), LENGTH, axis=1)
        if mode["causal"]:
            blind |= ~np.maximum.accumulate(keys, axis=1)
        if "attention" in numbers:  # a convolution does not look as far as the attention
            blind = np.repeat(~keys.any(1, keepdims=True), LENGTH, axis=1)
        nothing = nothing.astype(np.float32)
        np.testing.assert_array_equal(result.out[blind], np.tile(nothing, (blind.sum(), 1)))
        for leaf in jax.tree.leaves(result):
            assert np.isfinite(leaf).all()
        np.testing.assert_array_equal(result.grad.x[3], 0)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_example_does_not_know_its_neighbours(expression):
    x, keys = draw_x(expression, LENGTH), padded_keys(expression, LENGTH)
    for mode in modes(expression):
        before = run(expression, x, keys=keys, **mode)
        for content in (1e3, draw_x(expression, LENGTH, seed=7)[1:]):
            there, other = x.copy(), keys[[0, 2, 1, 0]]
            there[1:] = content
            after = run(expression, there, keys=other, **mode)
            np.testing.assert_array_equal(before.out[0], after.out[0])
            np.testing.assert_array_equal(before.grad.x[0], after.grad.x[0])


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_large_logits_and_repeated_tokens_stay_finite(expression):
    """Inputs of 100 make logits of 1e4 and more out of queries and keys of 8 channels."""
    x, keys = draw_x(expression, LENGTH), padded_keys(expression, LENGTH)
    for content in (100 * x, np.broadcast_to(x[:, :1], x.shape), np.zeros_like(x)):
        for mode in modes(expression):
            result = run(expression, np.asarray(content), keys=keys, **mode)
            for leaf in jax.tree.leaves(result):
                assert np.isfinite(leaf).all()


# refusals

WORDS = {
    "padding": {"keys": everyone(SHORT)},
    "segments": {"segments": one_segment(SHORT)},
    "causal": {},
}
UNDECLARED = [
    (expression, capability)
    for expression in EXPRESSIONS
    for capability in attention.CAPABILITIES
    if capability not in support.able(expression)
]


@pytest.mark.parametrize(("expression", "capability"), UNDECLARED)
def test_what_is_not_declared_is_refused_at_build(expression, capability):
    with pytest.raises(UserError, match=f"does not support.*{capability}") as refusal:
        site = support.site(**place(expression, support.SEQ))
        attention.build(expression, site, needs={capability}, rngs=nnx.Rngs(0))
    would_do = [
        name
        for name, cls in attention.MIXERS.items()
        if capability in cls.capabilities(cls.Config())
    ]
    for name in would_do:
        assert name in str(refusal.value).split("use one of")[1]
    if not would_do:
        assert "use one of" not in str(refusal.value), "a remedy that is none"


@pytest.mark.parametrize(("expression", "capability"), [u for u in UNDECLARED if u[1] in WORDS])
def test_a_mask_that_is_not_declared_is_refused_at_call(expression, capability):
    causal = capability == "causal" or "bidirectional" not in support.able(expression)
    mask = Mask(causal=causal, **jax.tree.map(jnp.asarray, WORDS[capability]))
    with pytest.raises(ValueError, match=f"cannot honour a mask with.*{capability}"):
        made = holder(expression, **place(expression, SHORT))
        made(jnp.asarray(draw_x(expression, SHORT)), mask=mask)


@pytest.mark.parametrize("expression", sorted(set(EXPRESSIONS) - set(those_with("bidirectional"))))
def test_a_recurrence_refuses_to_look_ahead(expression):
    with pytest.raises(ValueError, match="sees the past alone"):
        holder(expression)(jnp.asarray(draw_x(expression, SHORT)), mask=Mask())


def test_an_unknown_need_is_refused():
    with pytest.raises(UserError, match="unknown capability 'sparsity'"):
        attention.build("softmax", support.site(), needs={"sparsity"}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("backend", ["pallas", "cudnn"])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_backend_that_cannot_run_here_says_so(expression, backend):
    made = holder(expression, backend=backend, **place(expression, SHORT))
    with pytest.raises(NotImplementedError, match=f"(has no|with) backend '{backend}'"):
        jax.eval_shape(lambda x: made(x, mask=support.plain(expression)), draw_x(expression, SHORT))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_is_its_own_label(expression):
    assert choice(str(choice(expression))) == choice(expression)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_training_may_watch_it(expression):
    """`nnx.capture`, within which an objective is computed, adds attributes to every module."""
    parts = nnx.split(holder(expression, **place(expression, SHORT)))
    given = {"mask": support.plain(expression)}

    def plain(x):
        return nnx.merge(*parts)(x, **given)

    def watched(x):
        return nnx.capture(nnx.merge(*parts), Objective)(x, **given)[0]

    x = draw_x(expression, SHORT)
    assert jax.eval_shape(watched, x) == jax.eval_shape(plain, x)
