"""Every mechanism against its formula in float64: output and gradient, all masks, odd lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import support
from tests.attention.oracles import Problem, reference_of
from tests.support import EXPRESSIONS, LENGTHS, able, choice, draw_x, everyone, run

FORWARD, BACKWARD = 2e-5, 1e-4
"""Relative tolerances. A float32 dot product of 32 to 100 terms is good to some 1e-6 of its size,
an exponential of a logit near 10 to 1e-6; a few of them in a row stay under 1e-5. The backward pass
goes through each of them twice and divides by the normaliser once more."""
HALF_FORWARD, HALF_BACKWARD = 3e-2, 6e-2
"""Relative 2-norms for bfloat16, of 2^-9 = 0.002 a rounding, through four roundings in a row, two
of which are exponentiated."""

MASKS = {
    "none": {},
    "padding": {"keys"},
    "segments": {"keys", "segments"},
    "causal": {"keys", "causal"},
    "all": {"keys", "segments", "causal"},
}
"""By name, what the mask says; `keys` comes with rows of several kinds, see `ragged_keys`."""


def fits(expression: str, mask: str) -> bool:
    asked = {"padding" if what == "keys" else what for what in MASKS[mask]}
    asked |= set() if "causal" in asked else {"bidirectional"}
    return asked <= able(expression)


def widest(expression: str) -> str:
    """The mask that hides the most of those that it honours."""
    return next(mask for mask in ("all", "padding", "causal", "none") if fits(expression, mask))


def cases():
    """All lengths and masks for a mechanism's first variant, the widest ones for the others."""
    for expression in EXPRESSIONS:
        windows = any(kind in expression for kind in ("mean", "max", "convolution"))
        for length in LENGTHS if expression in support.FIRSTS or windows else (7, 63):
            short = length != 63 or expression not in support.FIRSTS
            masks = ["padding", "all"] if short and fits(expression, "padding") else MASKS
            if expression not in support.FIRSTS and length == 7:
                masks = [widest(expression)]
            yield from ((expression, length, mask) for mask in masks if fits(expression, mask))


def mask_arrays(mask: str, length: int):
    said = MASKS[mask]
    return {
        "keys": support.ragged_keys(length) if "keys" in said else None,
        "segments": support.ragged_segments(length) if "segments" in said else None,
        "causal": "causal" in said,
    }


def oracle(expression, numbers, x, *, keys, segments, causal, context=None, positions="none"):
    made = choice(expression)
    length = (x if context is None else context).shape[1]
    problem = Problem(
        x=x, context=context, causal=causal, positions=positions, heads=support.HEADS,
        seq=support.SEQ, keys=everyone(length) if keys is None else keys,
        segments=support.one_segment(length) if segments is None else segments,
        grid=support.place(expression, length).get("grid"),
        shared=numbers.get("shared", {}),
    )  # fmt: skip
    return reference_of(made.name)(numbers.get("mixer", {}), made.config, problem)


def nudged(numbers, direction, size):
    """`numbers` moved along `direction`, which may lack some of them."""
    if not isinstance(numbers, dict):
        return numbers if direction is None else numbers + size * direction
    return {k: nudged(v, (direction or {}).get(k), size) for k, v in numbers.items()}


def towards(gradient: np.ndarray, seed: int) -> np.ndarray:
    """A direction of length 1, half along the gradient and half anywhere."""
    anywhere = support.draw(gradient.shape, seed=seed).astype(np.float64)
    along = gradient.astype(np.float64)
    both = anywhere / np.linalg.norm(anywhere) + along / max(np.linalg.norm(along), 1e-30)
    return both / np.linalg.norm(both)


def check(expression, x, *, context=None, positions="none", **mask):
    where = support.place(expression, x.shape[1])
    numbers = support.weights(support.holder(expression, positions=positions, **where))
    wide = {"x": x.astype(np.float64), "context": context}
    result = run(expression, x, context=context, positions=positions, **mask)
    expected = oracle(expression, numbers, **wide, positions=positions, **mask)
    assert np.isfinite(result.out).all()
    assert support.relative(result.out, expected) < FORWARD

    moves = jax.tree.map(lambda g: towards(g, g.size), result.grad.params)
    dx = towards(result.grad.x, 5)
    cotangent = support.draw(x.shape, seed=99).astype(np.float64)

    def loss(size):
        there = wide | {"x": wide["x"] + size * dx}
        moved = nudged(numbers, moves, size)
        return np.sum(cotangent * oracle(expression, moved, **there, positions=positions, **mask))

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    grads, directions = (
        jax.tree.leaves((result.grad.params, result.grad.x)),
        jax.tree.leaves((moves, dx)),
    )
    found = sum(np.sum(g.astype(np.float64) * d) for g, d in zip(grads, directions, strict=True))
    size = sum(np.linalg.norm(g) for g in grads)
    assert abs(found - slope) <= BACKWARD * size, (found, slope, size)


@pytest.mark.parametrize(("expression", "length", "mask"), list(cases()))
def test_output_and_gradient_are_those_of_the_formula(expression, length, mask):
    check(expression, draw_x(expression, length), **mask_arrays(mask, length))


@pytest.mark.parametrize("expression", support.those_with("cross"))
def test_cross_attention_is_that_of_the_formula(expression):
    context = draw_x(expression, 63, seed=1)
    keys = support.ragged_keys(63)
    check(
        expression, draw_x(expression, 7), context=context, keys=keys, segments=None, causal=False
    )


POSITIONS = [(e, "rotary") for e in support.FIRSTS] + [
    (e, "alibi") for e in support.those_with("alibi")
]


@pytest.mark.parametrize(("expression", "positions"), POSITIONS)
def test_positions_are_those_of_the_formula(expression, positions):
    masks = ("padding", "causal", "none")
    mask = mask_arrays(next(mask for mask in masks if fits(expression, mask)), 7)
    check(expression, draw_x(expression, 7), positions=positions, **mask)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_bfloat16_stays_near_float32(expression):
    x = jnp.asarray(draw_x(expression, 63), jnp.bfloat16)
    mask = mask_arrays(widest(expression), 63)
    wide = run(expression, np.asarray(x, np.float32), **mask)
    half = run(expression, x, dtype=jnp.bfloat16, **mask)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(half))
    assert support.relative(half.out, wide.out) < HALF_FORWARD
    flat = [np.concatenate([g.ravel() for g in jax.tree.leaves(r.grad)]) for r in (half, wide)]
    assert support.relative(*flat) < HALF_BACKWARD
